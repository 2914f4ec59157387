// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/math.hpp>
#include <talpa/cuda/loops.hpp>
#include <talpa/ops/adamw.hpp>

#include <cmath>

namespace talpa::ops {

template <kernel_backend B>
struct adamw_impl<B> {
  template <class T>
  static void run(context<B>& ctx, const adamw_numbers& numbers, matrix_view<const T, B> dvalue,
                  matrix_view<T, B> first, matrix_view<T, B> second, matrix_view<T, B> value) {
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
    kernels::for_each_element(ctx, value.rows, value.cols, [=] TALPA_HD(index n, index d) {
      const T g = dvalue(n, d);
      const T m = beta1 * first(n, d) + new1 * g;
      const T v = beta2 * second(n, d) + new2 * (g * g);
      first(n, d) = m;
      second(n, d) = v;
      value(n, d) -= decay * value(n, d) + rate * m / (unbias * math::sqrt(v) + epsilon);
    });
  }
};

}  // namespace talpa::ops
