// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/cuda/loops.hpp>
#include <talpa/ops/rank_gate.hpp>

namespace talpa::ops {

template <kernel_backend B>
struct rank_gate_impl<B> {
  template <class T>
  static void forward(context<B>& ctx, T scale, matrix_view<const T, B> gates,
                      matrix_view<const T, B> u, matrix_view<T, B> z) {
    const index ranks = u.cols / gates.cols;
    kernels::for_each_element(ctx, u.rows, u.cols, [=] TALPA_DEVICE(index n, index j) {
      z(n, j) = scale * gates(n, j / ranks) * u(n, j);
    });
  }

  /// One thread an expert of a token, which sums over its ranks in order; du may be dz.
  template <class T>
  static void backward(context<B>& ctx, T scale, matrix_view<const T, B> gates,
                       matrix_view<const T, B> u, matrix_view<const T, B> dz, matrix_view<T, B> du,
                       matrix_view<T, B> dgates) {
    const index ranks = u.cols / gates.cols;
    kernels::for_each_element(ctx, u.rows, gates.cols, [=] TALPA_DEVICE(index n, index e) {
      const T factor = scale * gates(n, e);
      T sum{0};
      for (index j = e * ranks; j < (e + 1) * ranks; ++j) {
        const T up = dz(n, j);
        sum += up * u(n, j);
        du(n, j) = factor * up;
      }
      dgates(n, e) = scale * sum;
    });
  }
};

}  // namespace talpa::ops
