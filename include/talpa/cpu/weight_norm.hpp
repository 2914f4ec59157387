// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/math.hpp>
#include <talpa/cpu/loops.hpp>
#include <talpa/ops/weight_norm.hpp>

#include <algorithm>

namespace talpa::ops {

template <>
struct weight_norm_impl<cpu> {
  template <class T>
  static void forward(context<cpu>& ctx, matrix_view<const T, cpu> v, matrix_view<const T, cpu> m,
                      matrix_view<T, cpu> norm, matrix_view<T, cpu> ratio,
                      matrix_view<T, cpu> shift) {
    detail::for_each_row(ctx, v.rows, std::max<index>(1, v.cols), [&](index o) {
      const T* const row = v.row(o);
      const T length =
          math::sqrt(detail::lane_sum<T>(v.cols, [&](index d) { return row[d] * row[d]; }));
      norm(0, o) = length;
      ratio(0, o) = length == T{0} ? T{1} : m(0, o) / length;
      shift(0, o) = length == T{0} ? T{0} : (m(0, o) - length) / length;
    });
  }

  template <class T>
  static void backward(context<cpu>& ctx, matrix_view<const T, cpu> v,
                       matrix_view<const T, cpu> norm, matrix_view<const T, cpu> ratio,
                       matrix_view<const T, cpu> dratio, matrix_view<T, cpu> dm,
                       matrix_view<T, cpu> dv) {
    detail::for_each_row(ctx, v.rows, std::max<index>(1, v.cols), [&](index o) {
      const bool none = norm(0, o) == T{0};
      const T dmagnitude = none ? T{0} : dratio(0, o) / norm(0, o);
      dm(0, o) += dmagnitude;
      if (dv.empty()) return;
      const T factor = none ? T{0} : -dmagnitude * ratio(0, o) / norm(0, o);
      const T* const from = v.row(o);
      T* const to = dv.row(o);
      for (index d = 0; d < v.cols; ++d) to[d] = factor * from[d];
    });
  }
};

}  // namespace talpa::ops
