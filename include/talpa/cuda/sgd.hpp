// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/cuda/loops.hpp>
#include <talpa/ops/sgd.hpp>

namespace talpa::ops {

template <kernel_backend B>
struct sgd_impl<B> {
  template <class T>
  static void run(context<B>& ctx, const sgd_numbers& numbers, matrix_view<const T, B> dvalue,
                  matrix_view<T, B> velocity, matrix_view<T, B> value) {
    const T rate = static_cast<T>(numbers.learning_rate);
    const T momentum = static_cast<T>(numbers.momentum);
    const T decay = static_cast<T>(numbers.weight_decay);
    if (momentum == T{0}) {
      kernels::for_each_element(ctx, value.rows, value.cols, [=] TALPA_DEVICE(index n, index d) {
        value(n, d) -= rate * (dvalue(n, d) + decay * value(n, d));
      });
      return;
    }
    // Plain momentum steps along v; looking ahead steps along g + momentum v.
    const T own = numbers.nesterov ? T{1} : T{0};
    const T ahead = numbers.nesterov ? momentum : T{1};
    kernels::for_each_element(ctx, value.rows, value.cols, [=] TALPA_DEVICE(index n, index d) {
      const T slope = dvalue(n, d) + decay * value(n, d);
      const T v = momentum * velocity(n, d) + slope;
      velocity(n, d) = v;
      value(n, d) -= rate * (own * slope + ahead * v);
    });
  }
};

}  // namespace talpa::ops
