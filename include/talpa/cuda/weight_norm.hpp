// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/math.hpp>
#include <talpa/cuda/loops.hpp>
#include <talpa/ops/weight_norm.hpp>

namespace talpa::kernels {

template <class T, class B>
struct weight_norm_row {
  matrix_view<const T, B> v, m;
  matrix_view<T, B> norm, ratio, shift;
  template <class Warp>
  TALPA_HD void operator()(const Warp& warp, index o) const {
    const T* const row = v.row(o);
    const T length =
        math::sqrt(warp.template sum<T>(v.cols, [&](index d) { return row[d] * row[d]; }));
    if (warp.lane() != 0) return;
    const T magnitude = m(0, o);
    norm(0, o) = length;
    ratio(0, o) = length == T{0} ? T{1} : magnitude / length;
    shift(0, o) = length == T{0} ? T{0} : (magnitude - length) / length;
  }
};

/// Each lane reads and writes its own elements only, so dv may be v.
template <class T, class B>
struct weight_norm_gradient_row {
  matrix_view<const T, B> v, norm, ratio, dratio;
  matrix_view<T, B> dm, dv;
  template <class Warp>
  TALPA_HD void operator()(const Warp& warp, index o) const {
    const T length = norm(0, o);
    const bool none = length == T{0};
    const T dmagnitude = none ? T{0} : dratio(0, o) / length;
    if (warp.lane() == 0) dm(0, o) += dmagnitude;
    if (dv.empty()) return;
    const T factor = none ? T{0} : -dmagnitude * ratio(0, o) / length;
    const T* const from = v.row(o);
    T* const to = dv.row(o);
    warp.for_each(v.cols, [&](index d) { to[d] = factor * from[d]; });
  }
};

}  // namespace talpa::kernels

namespace talpa::ops {

template <kernel_backend B>
struct weight_norm_impl<B> {
  template <class T>
  static void forward(context<B>& ctx, matrix_view<const T, B> v, matrix_view<const T, B> m,
                      matrix_view<T, B> norm, matrix_view<T, B> ratio, matrix_view<T, B> shift) {
    kernels::for_each_row(ctx, v.rows, kernels::weight_norm_row<T, B>{v, m, norm, ratio, shift});
  }

  template <class T>
  static void backward(context<B>& ctx, matrix_view<const T, B> v, matrix_view<const T, B> norm,
                       matrix_view<const T, B> ratio, matrix_view<const T, B> dratio,
                       matrix_view<T, B> dm, matrix_view<T, B> dv) {
    kernels::for_each_row(ctx, v.rows,
                          kernels::weight_norm_gradient_row<T, B>{v, norm, ratio, dratio, dm, dv});
  }
};

}  // namespace talpa::ops
