// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/talpa.hpp>

#include <algorithm>
#include <chrono>
#include <ctime>
#include <utility>
#include <vector>

namespace talpa::bench {

/// The value below which a share of the values lies, 0 <= share < 1.
inline double quantile(std::vector<double> values, double share) {
  const auto place =
      values.begin() + static_cast<std::ptrdiff_t>(share * static_cast<double>(values.size()));
  std::nth_element(values.begin(), place, values.end());
  return *place;
}
inline double median(std::vector<double> values) { return quantile(std::move(values), 0.5); }

template <class F>
double seconds(F f) {
  const auto start = std::chrono::steady_clock::now();
  f();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

/// Seconds that this process has computed, in nanoseconds where std::clock counts microseconds.
inline double processor_time() {
  std::timespec now{};
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

/// Seconds that this process computes for f: on one thread what f takes on an idle machine, however
/// busy this one is.
template <class F>
double busy_seconds(F f) {
  const double start = processor_time();
  f();
  return processor_time() - start;
}

/// Of the processor on one thread, else those that pass.
template <class F>
double seconds_on(int threads, F f) {
  return threads == 1 ? busy_seconds(f) : seconds(f);
}

/// Normal numbers in a fresh matrix.
inline matrix<float, cpu> normal_matrix(index rows, index cols, double deviation,
                                        generator& random) {
  matrix<float, cpu> m(rows, cols);
  fill_normal(m.view(), deviation, random);
  return m;
}

}  // namespace talpa::bench
