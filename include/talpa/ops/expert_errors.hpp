// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/check.hpp>
#include <talpa/core/scalar.hpp>

namespace talpa::ops {

template <class B>
struct expert_errors_impl {
  static_assert(detail::always_false<B>,
                "talpa: ops::expert_errors has no implementation for this backend here, include "
                "talpa/cpu/expert_errors.hpp for cpu, talpa/cuda/expert_errors.hpp for gpu "
                "(docs/architecture.md)");
};

/// Computes how far each expert by itself is from a target:
/// errors[n, e] = 1 / O sum over d of (outputs[e N + n, d] - share target[n, d])^2.
///
/// Shapes: outputs [E N, O], an expert's tokens one behind the other, as slots of experts that are
/// on for all tokens lie; target [N, O], errors [N, E].
/// Backward: none; whoever ranks experts by it takes the ranks for constants.
/// Cost: reads E N O elements.
/// Determinism: same bits for any number of threads.
/// Throws: shape_error when the shapes do not fit.
/// Source: the distance behind the pseudo-labels of FactorLLM (arXiv 2408.11855).
template <class B, floating T>
void expert_errors(context<B>& ctx, input<T, B> outputs, input<T, B> target, double share,
                   matrix_view<T, B> errors) {
  constexpr const char* function = "ops::expert_errors";
  check_shape(function, "errors", errors, target.rows, errors.cols, "tokens, experts");
  check_shape(function, "outputs", outputs, errors.cols * target.rows, target.cols,
              "experts x tokens, width of target");
  expert_errors_impl<B>::run(ctx, outputs, target, static_cast<T>(share), errors);
}

}  // namespace talpa::ops
