// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concepts>

namespace talpa {

/// Tag of the host backend: Eigen for dense products, OpenMP over tokens when the program has it.
struct cpu {
  struct backend_identifier {};
  static constexpr const char* name = "cpu";
};

/// Tag of the device backend. It is called gpu because a name `cuda` would hide the namespace of
/// the CUDA standard library.
struct gpu {
  struct backend_identifier {};
  static constexpr const char* name = "gpu";
};

/// A backend is a tag with a nested marker type, so that the answer never depends on which headers
/// were included before the question.
template <class B>
concept backend = requires {
  typename B::backend_identifier;
};

namespace detail {
template <class B>
inline constexpr bool always_false = false;
}  // namespace detail

/// What executes: threads and workspace on the CPU, stream, handle and workspace on a device.
/// Every op takes one by reference as its first argument.
template <class B>
struct context {
  static_assert(detail::always_false<B>,
                "talpa: context<B> has no definition yet, include talpa/talpa.hpp for "
                "context<cpu>, talpa/cuda.cuh for context<gpu> (docs/architecture.md)");
};

}  // namespace talpa
