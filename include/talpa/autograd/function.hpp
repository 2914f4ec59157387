// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/autograd/tape.hpp>

#include <array>
#include <cstddef>
#include <span>
#include <type_traits>

namespace talpa {

/// Records y = f(inputs) of the user's own on a tape, from a forward and its backward:
///   saved forward(ctx, const std::array<matrix_view<const T, B>, N>& inputs, matrix_view<T, B> y);
///   void backward(ctx, const saved&, inputs, matrix_view<const T, B> dy,
///                 std::span<const gradient_target<T, B>> targets);
/// forward may return nothing; backward then has no argument for it.
///
/// backward writes the gradient of inputs[i] to targets[i].grad as targets[i].mode says, one input
/// after the other: the same variable may be given twice, the second target then adds to the first.
/// Shapes: y [rows, cols]; inputs any.
/// Both functions and saved are copied into an arena: what they hold is trivially destructible and
/// lives as long as the step. saved may point into ctx.memory.
/// Throws: value_error for an input of another tape or from before its reset.
template <floating T, backend B, std::size_t N, class Forward, class Backward>
variable<T, B> function(tape<T, B>& t, const variable<T, B> (&inputs)[N], index rows, index cols,
                        Forward forward, Backward backward) {
  using values_type = std::array<matrix_view<const T, B>, N>;
  using targets_type = std::span<const gradient_target<T, B>>;
  values_type values;
  for (std::size_t i = 0; i < N; ++i) values[i] = t.value_of("function", "inputs", inputs[i]);
  const matrix_view<T, B> y = t.make(rows, cols);
  const std::span<const variable<T, B>> sources(inputs);
  using saved_type = decltype(forward(t.executor(), values, y));
  if constexpr (std::is_void_v<saved_type>) {
    forward(t.executor(), values, y);
    return t.record(
        y, sources,
        [values, backward](context<B>& ctx, matrix_view<const T, B> dy, targets_type targets) {
          backward(ctx, values, dy, targets);
        });
  } else {
    const saved_type saved = forward(t.executor(), values, y);
    return t.record(y, sources,
                    [values, saved, backward](context<B>& ctx, matrix_view<const T, B> dy,
                                              targets_type targets) {
                      backward(ctx, saved, values, dy, targets);
                    });
  }
}

}  // namespace talpa
