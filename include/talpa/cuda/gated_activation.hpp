// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/cuda/loops.hpp>
#include <talpa/ops/gated_activation.hpp>

namespace talpa::ops {

template <kernel_backend B>
struct gated_activation_impl<B> {
  template <class F, class T>
  static void forward(context<B>& ctx, const F& f, matrix_view<const T, B> a,
                      matrix_view<const T, B> b, matrix_view<T, B> h) {
    const F function = f;
    kernels::for_each_element(ctx, h.rows, h.cols, [=] TALPA_DEVICE(index n, index d) {
      h(n, d) = function.value(a(n, d)) * b(n, d);
    });
  }

  /// da may be a, db may be b.
  template <class F, class T>
  static void backward(context<B>& ctx, const F& f, matrix_view<const T, B> a,
                       matrix_view<const T, B> b, matrix_view<const T, B> dh, matrix_view<T, B> da,
                       matrix_view<T, B> db) {
    const F function = f;
    kernels::for_each_element(ctx, a.rows, a.cols, [=] TALPA_DEVICE(index n, index d) {
      const T up = dh(n, d), gate = a(n, d), by_gate = up * b(n, d) * function.derivative(gate);
      db(n, d) = up * function.value(gate);
      da(n, d) = by_gate;
    });
  }
};

}  // namespace talpa::ops
