// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/check.hpp>
#include <talpa/core/scalar.hpp>
#include <talpa/core/view.hpp>

namespace talpa {

/// Numbers of one step of stochastic gradient descent.
struct sgd_numbers {
  double learning_rate = 1e-2;
  double momentum = 0.0;      ///< 0..1; 0: no velocity is read or written
  double weight_decay = 0.0;  ///< of the L2 kind: added to the gradient
  bool nesterov = false;      ///< look ahead along the velocity
};

}  // namespace talpa

namespace talpa::ops {

template <class B>
struct sgd_impl {
  static_assert(detail::always_false<B>,
                "talpa: ops::sgd_update has no implementation for this backend here, include "
                "talpa/cpu/sgd.hpp for cpu, talpa/cuda/sgd.hpp for gpu "
                "(docs/architecture.md)");
};

/// Moves weights one step down their gradient:
/// g = dvalue + weight_decay value; v = momentum v + g;
/// value -= learning_rate (nesterov ? g + momentum v : v).
///
/// Shapes: dvalue, velocity and value of one shape; velocity starts as zeros and may be an empty
/// view when momentum is 0.
/// Cost: reads three, writes two. Determinism: same bits for any number of threads.
/// Throws: shape_error when the shapes differ.
/// Source: torch.optim.SGD with dampening 0; Sutskever et al., 2013, On the importance of
/// initialization and momentum, for the look-ahead.
template <class B, floating T>
void sgd_update(context<B>& ctx, const sgd_numbers& numbers, input<T, B> dvalue,
                output<T, B> velocity, matrix_view<T, B> value) {
  check_shape("ops::sgd_update", "dvalue", dvalue, value.rows, value.cols, "shape of value");
  if (numbers.momentum != 0.0) {
    check_shape("ops::sgd_update", "velocity", velocity, value.rows, value.cols, "shape of value");
  }
  sgd_impl<B>::run(ctx, numbers, dvalue, velocity, value);
}

}  // namespace talpa::ops
