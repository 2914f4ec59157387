// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/cpu/context.hpp>
#include <talpa/ops/rank_gate.hpp>

#include <algorithm>

namespace talpa::detail {

/// dz *= scale gate, a row of ranks; returns the gradient of the gate, scale <dz, u>. Not inlined:
/// every caller gets the same bits.
template <class T>
[[gnu::noinline]] T gate_backward(T scale, T gate, const T* u, index ranks, T* dz) {
  const T factor = scale * gate;
  T sum{};
  for (index r = 0; r < ranks; ++r) {
    sum += dz[r] * u[r];
    dz[r] = factor * dz[r];
  }
  return scale * sum;
}

}  // namespace talpa::detail

namespace talpa::ops {

template <>
struct rank_gate_impl<cpu> {
  static constexpr index task_rows = 128;
  /// Fewest elements for which other threads are called.
  static constexpr index threaded_elements = 65536;

  template <class T>
  static void forward(context<cpu>& ctx, T scale, matrix_view<const T, cpu> gates,
                      matrix_view<const T, cpu> u, matrix_view<T, cpu> z) {
    const index ranks = u.cols / gates.cols;
    const auto threads = detail::threads_from(ctx, u.rows * u.cols, threaded_elements);
    detail::parallel_for_blocks(threads, u.rows, task_rows, [&](index first, index rows, int) {
      for (index n = first; n < first + rows; ++n) {
        for (index e = 0; e < gates.cols; ++e) {
          const T factor = scale * gates(n, e);
          const T* const from = u.row(n) + e * ranks;
          T* const to = z.row(n) + e * ranks;
          for (index r = 0; r < ranks; ++r) to[r] = factor * from[r];
        }
      }
    });
  }

  template <class T>
  static void backward(context<cpu>& ctx, T scale, matrix_view<const T, cpu> gates,
                       matrix_view<const T, cpu> u, matrix_view<const T, cpu> dz,
                       matrix_view<T, cpu> du, matrix_view<T, cpu> dgates) {
    const index ranks = u.cols / gates.cols;
    const auto threads = detail::threads_from(ctx, u.rows * u.cols, threaded_elements);
    detail::parallel_for_blocks(threads, u.rows, task_rows, [&](index first, index rows, int) {
      for (index n = first; n < first + rows; ++n) {
        for (index e = 0; e < gates.cols; ++e) {
          const T* const from = dz.row(n) + e * ranks;
          T* const to = du.row(n) + e * ranks;
          if (to != from) std::copy_n(from, ranks, to);
          dgates(n, e) =
              detail::gate_backward<T>(scale, gates(n, e), u.row(n) + e * ranks, ranks, to);
        }
      }
    });
  }
};

}  // namespace talpa::ops
