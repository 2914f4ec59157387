// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/autograd/parameter.hpp>
#include <talpa/core/check.hpp>
#include <talpa/core/math.hpp>
#include <talpa/core/workspace.hpp>
#include <talpa/ops/fill.hpp>
#include <talpa/ops/item.hpp>
#include <talpa/ops/reduce.hpp>
#include <talpa/ops/scale.hpp>

#include <limits>
#include <span>
#include <type_traits>

namespace talpa {

/// Scales the gradients of all parameters together so that their norm is at most max_norm, and
/// returns the norm they had: sqrt(sum of squares over everything that trains).
///
/// Where norm > max_norm every gradient is multiplied by max_norm / norm; else nothing is touched.
/// Parameters: max_norm > 0; infinity only measures.
/// Edges: a norm that is not finite (NaN, infinity, squares beyond the range of T) changes nothing
/// and is returned: skip the step then. Frozen parameters count as zero.
/// Cost: reads each gradient once, and writes it where it clips. Reads one number to the host: on a
/// device this waits for the backward pass.
/// Determinism: parameters in the given order, fixed trees within: the same bits for any number of
/// threads.
/// Throws: value_error when max_norm is not > 0.
/// Source: Pascanu, Mikolov, Bengio, 2013, On the difficulty of training recurrent neural networks,
/// algorithm 1; no epsilon is added to the norm, unlike torch.nn.utils.clip_grad_norm_.
template <floating T, backend B>
T clip_gradients(context<B>& ctx, std::span<parameter<T, B>* const> parameters,
                 std::type_identity_t<T> max_norm) {
  check_value(max_norm > T{0}, "clip_gradients", "max_norm", static_cast<double>(max_norm),
              "a number > 0");
  const typename workspace<B>::scope scope(ctx.scratch);
  const matrix_view<T, B> sum = ctx.scratch.template take<T>(1, 1);
  ops::fill(ctx, T{0}, sum);
  for (parameter<T, B>* p : parameters) {
    if (p->trainable()) ops::sum_of_squares(ctx, p->grad(), T{1}, sum);
  }
  const T norm = math::sqrt(ops::item(ctx, sum));
  if (norm > max_norm && norm <= std::numeric_limits<T>::max()) {
    for (parameter<T, B>* p : parameters) {
      if (p->trainable()) ops::scale(ctx, max_norm / norm, p->grad(), p->grad());
    }
  }
  return norm;
}

}  // namespace talpa
