// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/cuda/loops.hpp>
#include <talpa/ops/rank_share.hpp>

namespace talpa::ops {

template <kernel_backend B>
struct rank_share_impl<B> {
  template <class T>
  static void spread(context<B>& ctx, T scale, matrix_view<const T, B> gates,
                     matrix_view<const T, B> u, matrix_view<T, B> z) {
    const index ranks = u.cols;
    kernels::for_each_element(ctx, z.rows, z.cols, [=] TALPA_DEVICE(index n, index j) {
      const index e = j / ranks;
      z(n, j) = scale * gates(n, e) * u(n, j - e * ranks);
    });
  }

  template <class T>
  static void collapse(context<B>& ctx, T scale, matrix_view<const T, B> gates,
                       matrix_view<const T, B> u, matrix_view<T, B> z) {
    const index ranks = z.cols;
    kernels::for_each_element(ctx, z.rows, ranks, [=] TALPA_DEVICE(index n, index r) {
      T sum{0};
      for (index e = 0; e < gates.cols; ++e) sum += scale * gates(n, e) * u(n, e * ranks + r);
      z(n, r) = sum;
    });
  }

  template <class T>
  static void gates(context<B>& ctx, T scale, matrix_view<const T, B> each,
                    matrix_view<const T, B> shared, matrix_view<T, B> dgates) {
    const index ranks = shared.cols;
    kernels::for_each_element(ctx, dgates.rows, dgates.cols, [=] TALPA_DEVICE(index n, index e) {
      T sum{0};
      for (index r = 0; r < ranks; ++r) sum += each(n, e * ranks + r) * shared(n, r);
      dgates(n, e) = scale * sum;
    });
  }
};

}  // namespace talpa::ops
