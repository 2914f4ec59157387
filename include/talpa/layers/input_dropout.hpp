// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/check.hpp>
#include <talpa/core/mode.hpp>
#include <talpa/core/workspace.hpp>
#include <talpa/ops/dropout.hpp>
#include <talpa/routing/routing.hpp>

namespace talpa {

/// The dropout mask of one call on the input of its adapters, as a value: the mask itself is drawn
/// anew from the stream wherever it is needed.
struct input_dropout {
  random_stream stream{};
  float keep = 1.0F;  ///< probability that an element stays
  bool active = false;

  /// Takes a stream from batch.random when `dropped` > 0 in training; throws value_error without
  /// one.
  template <class T, backend B>
  static input_dropout draw(const char* function, double dropped, mode m,
                            const batch_info<T, B>& batch) {
    if (m == mode::inference || dropped == 0.0) return {};
    if (batch.random == nullptr) {
      detail::throw_value(function, "batch.random", "null",
                          "a generator = source of the dropout mask in training");
    }
    return {batch.random->next(), static_cast<float>(1.0 - dropped), true};
  }

  /// x itself, or x after dropout in scratch of the caller's scope.
  template <class T, class B>
  matrix_view<const T, B> apply(context<B>& ctx, matrix_view<const T, B> x) const {
    if (!active) return x;
    const auto dropped = ctx.scratch.template take<T>(x.rows, x.cols);  // [N, D]
    ops::dropout(ctx, stream, keep, x, dropped);
    return dropped;
  }

  /// Runs `write(share, mode)`, which makes the gradient of the dropped input, so that it arrives
  /// in dx through the mask; `add` is ignore or accumulate.
  template <class T, class B, class Write>
  void through(context<B>& ctx, matrix_view<T, B> dx, grad_mode add, Write write) const {
    if (!active || add == grad_mode::ignore) {
      write(dx, add);
      return;
    }
    const typename workspace<B>::scope scope(ctx.scratch);
    const auto share = ctx.scratch.template take<T>(dx.rows, dx.cols);  // [N, D]
    write(share, grad_mode::overwrite);
    ops::dropout_backward(ctx, stream, keep, share, dx, add);
  }
};

}  // namespace talpa
