// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/check.hpp>
#include <talpa/core/scalar.hpp>

#include <cmath>
#include <cstdint>

namespace talpa::ops {

template <class B>
struct sinkhorn_impl {
  static_assert(detail::always_false<B>,
                "talpa: ops::sinkhorn has no implementation for this backend here, include "
                "talpa/cpu/sinkhorn.hpp for cpu, talpa/cuda/sinkhorn.hpp for gpu "
                "(docs/architecture.md)");
};

/// Scales exp(logits) until its rows and columns have equal sums.
///
/// Forward: from c = 0, in turn r_n = -log T - log sum_e exp(u_ne + c_e) and
/// c_e = -log E - log sum_n exp(u_ne + r_n), until the mean over e of |exp(c_e) - exp(c_e before)|
/// is at most `tolerance`, or `iterations` times. The plan is exp(u_ne + r_n + c_e): its columns
/// sum to 1 / E, its rows to 1 / T in the limit, T the number of tokens that take part.
/// Backward: none; the plan serves to choose.
/// Shapes: logits [N, E], padding_mask [N] or empty, row [N] = r, column [1, E] = c.
/// Edges: padding and rows with NaN, +inf, or -inf everywhere take no part, and have r = 0; an
/// expert that all others mask with -inf has c = 0. Sums are taken of exponentials below one, so
/// that logits of any finite size work. A change that is not a number counts as too large, so the
/// loop ends with `iterations` at the latest.
/// Cost: 2 N E exponentials an iteration.
/// Determinism: same bits on every backend and for any number of threads.
/// Throws: shape_error; value_error for a tolerance below 0 or a negative number of iterations.
template <class B, floating T>
void sinkhorn(context<B>& ctx, matrix_view<const T, B> logits,
              vector_input<std::uint8_t, B> padding_mask, double tolerance, index iterations,
              vector_view<T, B> row, output<T, B> column) {
  constexpr const char* function = "ops::sinkhorn";
  check_size(function, "row", row, logits.rows, "tokens");
  check_shape(function, "column", column, 1, logits.cols, "one number an expert");
  if (!padding_mask.empty()) {
    check_size(function, "padding_mask", padding_mask, logits.rows, "one flag a token");
  }
  check_value(tolerance >= 0.0 && std::isfinite(tolerance), function, "tolerance", tolerance,
              ">= 0 and finite = change of a scale to stop at");
  check_at_least(function, "iterations", iterations, 0, "times to scale at most");
  sinkhorn_impl<B>::template run<T>(ctx, logits, padding_mask, tolerance, iterations, row, column);
}

}  // namespace talpa::ops
