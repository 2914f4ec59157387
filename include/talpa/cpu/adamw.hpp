// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/math.hpp>
#include <talpa/cpu/loops.hpp>
#include <talpa/ops/adamw.hpp>

#include <cmath>

namespace talpa::ops {

template <>
struct adamw_impl<cpu> {
  template <class T>
  static void run(context<cpu>& ctx, const adamw_numbers& numbers, matrix_view<const T, cpu> dvalue,
                  matrix_view<T, cpu> first, matrix_view<T, cpu> second,
                  matrix_view<T, cpu> value) {
    const double step = static_cast<double>(numbers.step);
    const double correction1 = 1.0 - std::pow(numbers.beta1, step);
    const double correction2 = 1.0 - std::pow(numbers.beta2, step);
    // Subtracted as a small number: 1 - decay would keep only its leading digits in T.
    const T decay = static_cast<T>(numbers.learning_rate * numbers.weight_decay);
    const T rate = static_cast<T>(numbers.learning_rate / correction1);
    const T unbias = static_cast<T>(1.0 / std::sqrt(correction2));
    const T beta1 = static_cast<T>(numbers.beta1), new1 = static_cast<T>(1.0 - numbers.beta1);
    const T beta2 = static_cast<T>(numbers.beta2), new2 = static_cast<T>(1.0 - numbers.beta2);
    const T epsilon = static_cast<T>(numbers.epsilon);
    detail::for_each_row(ctx, value.rows, value.cols, [&](index n) {
      const T* const g = dvalue.row(n);
      T *const m = first.row(n), *const v = second.row(n), *const w = value.row(n);
      for (index d = 0; d < value.cols; ++d) {
        m[d] = beta1 * m[d] + new1 * g[d];
        v[d] = beta2 * v[d] + new2 * (g[d] * g[d]);
        w[d] -= decay * w[d] + rate * m[d] / (unbias * math::sqrt(v[d]) + epsilon);
      }
    });
  }
};

}  // namespace talpa::ops
