// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/cpu/loops.hpp>
#include <talpa/ops/rank_share.hpp>

namespace talpa::ops {

template <>
struct rank_share_impl<cpu> {
  template <class T>
  static void spread(context<cpu>& ctx, T scale, matrix_view<const T, cpu> gates,
                     matrix_view<const T, cpu> u, matrix_view<T, cpu> z) {
    detail::for_each_row(ctx, z.rows, z.cols, [&](index n) {
      for (index e = 0; e < gates.cols; ++e) {
        const T g = scale * gates(n, e);
        const T* const un = u.row(n);
        T* const zn = z.row(n) + e * u.cols;
        for (index r = 0; r < u.cols; ++r) zn[r] = g * un[r];
      }
    });
  }

  template <class T>
  static void collapse(context<cpu>& ctx, T scale, matrix_view<const T, cpu> gates,
                       matrix_view<const T, cpu> u, matrix_view<T, cpu> z) {
    detail::for_each_row(ctx, u.rows, u.cols, [&](index n) {
      T* const zn = z.row(n);
      for (index r = 0; r < z.cols; ++r) zn[r] = T{};
      for (index e = 0; e < gates.cols; ++e) {
        const T g = scale * gates(n, e);
        const T* const un = u.row(n) + e * z.cols;
        for (index r = 0; r < z.cols; ++r) zn[r] += g * un[r];
      }
    });
  }

  template <class T>
  static void gates(context<cpu>& ctx, T scale, matrix_view<const T, cpu> each,
                    matrix_view<const T, cpu> shared, matrix_view<T, cpu> dgates) {
    detail::for_each_row(ctx, each.rows, each.cols, [&](index n) {
      const T* const sn = shared.row(n);
      for (index e = 0; e < dgates.cols; ++e) {
        const T* const en = each.row(n) + e * shared.cols;
        T sum{};
        for (index r = 0; r < shared.cols; ++r) sum += en[r] * sn[r];
        dgates(n, e) = scale * sum;
      }
    });
  }
};

}  // namespace talpa::ops
