// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/check.hpp>
#include <talpa/core/scalar.hpp>
#include <talpa/core/view.hpp>

namespace talpa {

/// Numbers of one step of AdamW.
struct adamw_numbers {
  double learning_rate = 1e-3;
  double beta1 = 0.9;          ///< 0..1, decay of the mean gradient
  double beta2 = 0.999;        ///< 0..1, decay of the mean squared gradient
  double epsilon = 1e-8;       ///< > 0, added outside the square root
  double weight_decay = 1e-2;  ///< decoupled: shrinks the weights, never enters the moments
  index step = 1;              ///< number of this step, from 1
};

}  // namespace talpa

namespace talpa::ops {

template <class B>
struct adamw_impl {
  static_assert(detail::always_false<B>,
                "talpa: ops::adamw_update has no implementation for this backend here, include "
                "talpa/cpu/adamw.hpp for cpu, talpa/cuda/adamw.hpp for gpu "
                "(docs/architecture.md)");
};

/// Moves weights one step of AdamW:
/// m = beta1 m + (1 - beta1) g; v = beta2 v + (1 - beta2) g^2;
/// value -= learning_rate (weight_decay value + mhat / (sqrt(vhat) + epsilon)),
/// mhat = m / (1 - beta1^step), vhat = v / (1 - beta2^step).
///
/// Shapes: dvalue g, first m, second v and value of one shape; m and v start as zeros.
/// Edges: a zero gradient still shrinks the weights and lets the moments fade: rows that must not
/// move need weight_decay 0 and no history, or must not train.
/// Cost: reads four, writes three. Determinism: same bits for any number of threads.
/// Throws: shape_error when the shapes differ; value_error when step < 1.
/// Source: Loshchilov and Hutter, 2019, Decoupled weight decay regularization, algorithm 2, with
/// epsilon and learning rate as in torch.optim.AdamW.
template <class B, floating T>
void adamw_update(context<B>& ctx, const adamw_numbers& numbers, input<T, B> dvalue,
                  output<T, B> first, output<T, B> second, matrix_view<T, B> value) {
  check_shape("ops::adamw_update", "dvalue", dvalue, value.rows, value.cols, "shape of value");
  check_shape("ops::adamw_update", "first", first, value.rows, value.cols, "shape of value");
  check_shape("ops::adamw_update", "second", second, value.rows, value.cols, "shape of value");
  check_at_least("ops::adamw_update", "step", numbers.step, 1, "number of this step");
  adamw_impl<B>::run(ctx, numbers, dvalue, first, second, value);
}

/// Whether a backend counts the steps itself, so that a captured step can be replayed: see
/// adamw_update_counted.
template <class B>
inline constexpr bool adamw_counts = requires {
  requires adamw_impl<B>::counts;
};

/// Begins the next step of weights whose steps the device counts: powers = [beta1^t, beta2^t] of
/// one step more. powers [1, 2] starts as ones.
template <class B>
void adamw_advance(context<B>& ctx, const adamw_numbers& numbers, matrix_view<double, B> powers) {
  check_shape("ops::adamw_advance", "powers", powers, 1, 2, "one power of each beta");
  adamw_impl<B>::advance(ctx, numbers, powers);
}

/// adamw_update with the bias corrections 1 - powers instead of those of numbers.step. Shapes: as
/// there, powers [1, 2] as adamw_advance left it.
template <class B, floating T>
void adamw_update_counted(context<B>& ctx, const adamw_numbers& numbers, input<double, B> powers,
                          input<T, B> dvalue, output<T, B> first, output<T, B> second,
                          matrix_view<T, B> value) {
  constexpr const char* function = "ops::adamw_update_counted";
  check_shape(function, "powers", powers, 1, 2, "one power of each beta");
  check_shape(function, "dvalue", dvalue, value.rows, value.cols, "shape of value");
  check_shape(function, "first", first, value.rows, value.cols, "shape of value");
  check_shape(function, "second", second, value.rows, value.cols, "shape of value");
  adamw_impl<B>::run_counted(ctx, numbers, powers, dvalue, first, second, value);
}

}  // namespace talpa::ops
