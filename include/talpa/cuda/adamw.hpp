// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/math.hpp>
#include <talpa/cuda/loops.hpp>
#include <talpa/ops/adamw.hpp>

#include <cmath>

namespace talpa::kernels {

/// One weight each. `powers`, where it is there, replaces the corrections of the host's count.
template <class T, class B>
struct adamw_element {
  matrix_view<const T, B> dvalue;
  matrix_view<T, B> first, second, value;
  matrix_view<const double, B> powers;
  double learning_rate, correction1, correction2;
  // Subtracted as a small number: 1 - decay would keep only its leading digits in T.
  T decay, beta1, new1, beta2, new2, epsilon;

  adamw_element(const adamw_numbers& numbers, matrix_view<const double, B> powers_,
                matrix_view<const T, B> dvalue_, matrix_view<T, B> first_,
                matrix_view<T, B> second_, matrix_view<T, B> value_)
      : dvalue(dvalue_),
        first(first_),
        second(second_),
        value(value_),
        powers(powers_),
        learning_rate(numbers.learning_rate),
        correction1(1.0 - std::pow(numbers.beta1, static_cast<double>(numbers.step))),
        correction2(1.0 - std::pow(numbers.beta2, static_cast<double>(numbers.step))),
        decay(static_cast<T>(numbers.learning_rate * numbers.weight_decay)),
        beta1(static_cast<T>(numbers.beta1)),
        new1(static_cast<T>(1.0 - numbers.beta1)),
        beta2(static_cast<T>(numbers.beta2)),
        new2(static_cast<T>(1.0 - numbers.beta2)),
        epsilon(static_cast<T>(numbers.epsilon)) {}

  TALPA_HD void operator()(index n, index d) const {
    const bool counted = powers.data != nullptr;
    const double part1 = counted ? 1.0 - powers(0, 0) : correction1;
    const double part2 = counted ? 1.0 - powers(0, 1) : correction2;
    const T rate = static_cast<T>(learning_rate / part1);
    const T unbias = static_cast<T>(1.0 / math::sqrt(part2));
    const T g = dvalue(n, d);
    const T m = beta1 * first(n, d) + new1 * g;
    const T v = beta2 * second(n, d) + new2 * (g * g);
    first(n, d) = m;
    second(n, d) = v;
    value(n, d) -= decay * value(n, d) + rate * m / (unbias * math::sqrt(v) + epsilon);
  }
};

}  // namespace talpa::kernels

namespace talpa::ops {

template <kernel_backend B>
struct adamw_impl<B> {
  /// The steps are counted on the device: a captured step counts on when it is replayed.
  static constexpr bool counts = true;

  template <class T>
  static void run(context<B>& ctx, const adamw_numbers& numbers, matrix_view<const T, B> dvalue,
                  matrix_view<T, B> first, matrix_view<T, B> second, matrix_view<T, B> value) {
    run_counted<T>(ctx, numbers, {}, dvalue, first, second, value);
  }
  template <class T>
  static void run_counted(context<B>& ctx, const adamw_numbers& numbers,
                          matrix_view<const double, B> powers, matrix_view<const T, B> dvalue,
                          matrix_view<T, B> first, matrix_view<T, B> second,
                          matrix_view<T, B> value) {
    kernels::for_each_element(
        ctx, value.rows, value.cols,
        kernels::adamw_element<T, B>(numbers, powers, dvalue, first, second, value));
  }
  static void advance(context<B>& ctx, const adamw_numbers& numbers,
                      matrix_view<double, B> powers) {
    const double beta1 = numbers.beta1, beta2 = numbers.beta2;
    kernels::for_each_element(
        ctx, 1, 2, [=] TALPA_DEVICE(index, index i) { powers(0, i) *= i == 0 ? beta1 : beta2; });
  }
};

}  // namespace talpa::ops
