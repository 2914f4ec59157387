// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/cpu/loops.hpp>
#include <talpa/ops/sgd.hpp>

namespace talpa::ops {

template <>
struct sgd_impl<cpu> {
  template <class T>
  static void run(context<cpu>& ctx, const sgd_numbers& numbers, matrix_view<const T, cpu> dvalue,
                  matrix_view<T, cpu> velocity, matrix_view<T, cpu> value) {
    const T rate = static_cast<T>(numbers.learning_rate);
    const T momentum = static_cast<T>(numbers.momentum);
    const T decay = static_cast<T>(numbers.weight_decay);
    if (momentum == T{0}) {
      detail::for_each_row(ctx, value.rows, value.cols, [&](index n) {
        const T* const g = dvalue.row(n);
        T* const w = value.row(n);
        for (index d = 0; d < value.cols; ++d) w[d] -= rate * (g[d] + decay * w[d]);
      });
      return;
    }
    // Plain momentum steps along v; looking ahead steps along g + momentum v.
    const T own = numbers.nesterov ? T{1} : T{0};
    const T ahead = numbers.nesterov ? momentum : T{1};
    detail::for_each_row(ctx, value.rows, value.cols, [&](index n) {
      const T* const g = dvalue.row(n);
      T *const v = velocity.row(n), *const w = value.row(n);
      for (index d = 0; d < value.cols; ++d) {
        const T slope = g[d] + decay * w[d];
        v[d] = momentum * v[d] + slope;
        w[d] -= rate * (own * slope + ahead * v[d]);
      }
    });
  }
};

}  // namespace talpa::ops
