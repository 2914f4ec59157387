// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "text.hpp"

#include <talpa/version.hpp>

#include <cstdint>
#include <ctime>
#include <string>
#include <vector>

namespace talpa::examples {

/// What a reader needs to repeat a run: the head of the log and of the report.
struct run_info {
  std::string version;     // of talpa
  std::string compiler;    // name and version
  std::string build_type;  // as CMake knows it
  std::string flags;       // as the compiler got them
  std::string isa;         // instruction sets the code was compiled for
  bool optimised = false;
  std::string device = "cpu";  // or the name of a CUDA device
  int threads = 1;
  std::vector<std::uint64_t> seeds;
  std::string command;  // the arguments, as given
  std::string started;  // UTC, ISO 8601
};

inline std::string version_text() {
  return format("%d.%d.%d", version_major, version_minor, version_patch);
}

inline std::string compiler_text() {
#if defined(__clang__)
  return format("clang %d.%d.%d", __clang_major__, __clang_minor__, __clang_patchlevel__);
#elif defined(__GNUC__)
  return std::string("g++ ") + __VERSION__;
#else
  return "unknown";
#endif
}

/// Instruction sets this translation unit was compiled for, the widest first.
inline std::string isa_text() {
  std::string text;
  const auto add = [&](const char* name) { text += (text.empty() ? "" : " ") + std::string(name); };
#if defined(__AVX512F__)
  add("avx512f");
#endif
#if defined(__AVX2__)
  add("avx2");
#endif
#if defined(__FMA__)
  add("fma");
#endif
#if defined(__AVX__) && !defined(__AVX2__)
  add("avx");
#endif
#if defined(__SSE4_2__) && !defined(__AVX__)
  add("sse4.2");
#endif
#if defined(__SSE2__) && !defined(__SSE4_2__)
  add("sse2");
#endif
#if defined(__ARM_FEATURE_SVE)
  add("sve");
#endif
#if defined(__ARM_NEON)
  add("neon");
#endif
#if defined(__riscv_v)
  add("rvv");
#endif
  if (text.empty()) add("baseline");
#if defined(__x86_64__)
  return "x86-64: " + text;
#elif defined(__aarch64__)
  return "aarch64: " + text;
#else
  return text;
#endif
}

/// Whether this translation unit was compiled with optimisation and without assertions.
constexpr bool built_optimised() {
#if defined(__OPTIMIZE__) && defined(NDEBUG)
  return true;
#else
  return false;
#endif
}

/// A line for who watches the run, or nothing where the seconds mean something.
inline std::string build_warning(const run_info& info) {
  if (info.optimised) return "";
  return "warning: this is not an optimised build, seconds mean nothing; configure with "
         "-DCMAKE_BUILD_TYPE=Release\n";
}

/// The time now in UTC: `2026-11-22T12:58:03Z`.
inline std::string utc_now() {
  const std::time_t now = std::time(nullptr);
  std::tm parts{};
  ::gmtime_r(&now, &parts);
  char text[32];
  return std::strftime(text, sizeof text, "%Y-%m-%dT%H:%M:%SZ", &parts) > 0 ? text : "";
}

}  // namespace talpa::examples
