// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/check.hpp>
#include <talpa/core/mode.hpp>
#include <talpa/core/workspace.hpp>
#include <talpa/ops/dropout.hpp>
#include <talpa/routing/routing.hpp>

#include <cstddef>
#include <cstdint>

namespace talpa {

/// The dropout mask of one call on the input of its adapters. Where reading a mask takes less time
/// than drawing it, forward draws it once into ctx.memory; elsewhere it is a value that is drawn
/// anew wherever it is needed.
template <class B>
struct input_dropout {
  dropout_mask mask;
  dropout_bits<B> bits{};  ///< of a mask that has been drawn

  bool active() const { return mask.active; }

  /// Takes a stream from batch.random when `dropped` > 0 in training; throws value_error without
  /// one.
  template <class T>
  static input_dropout draw(const char* function, double dropped, mode m,
                            const batch_info<T, B>& batch) {
    if (m == mode::inference || dropped == 0.0) return {};
    if (batch.random == nullptr) {
      detail::throw_value(function, "batch.random", "null",
                          "a generator = source of the dropout mask in training");
    }
    return {{batch.random->next(), static_cast<float>(1.0 - dropped), true}};
  }

  /// Bytes of ctx.memory for the mask of x [N, D].
  static std::size_t saved_bytes(double dropped, index rows, index cols) {
    if (!has_dropout_bits<B> || dropped == 0.0) return 0;
    return workspace<B>::rounded(static_cast<std::size_t>(rows * mask_words(cols)) *
                                 sizeof(std::uint32_t));
  }
  /// Room in ctx.memory for the mask of x [N, D], where it is kept; for as many rows as `most`.
  void keep(context<B>& ctx, index rows, index cols, index most) {
    if constexpr (has_dropout_bits<B>) {
      if (!mask.active) return;
      bits = {ctx.memory.template take<std::uint32_t>(most, mask_words(cols)).row_range(0, rows),
              mask.keep};
    }
  }

  /// x itself, or x after dropout in scratch of the caller's scope; the mask is drawn.
  template <class T>
  matrix_view<const T, B> begin(context<B>& ctx, matrix_view<const T, B> x) {
    if constexpr (has_dropout_bits<B>) {
      if (mask.active) {
        if (!bits.active()) keep(ctx, x.rows, x.cols, x.rows);
        ops::draw_dropout(ctx, mask.stream, x.cols, bits);
      }
    }
    return apply(ctx, x);
  }
  /// The same by the mask that begin has drawn.
  template <class T>
  matrix_view<const T, B> apply(context<B>& ctx, matrix_view<const T, B> x) const {
    if (!mask.active) return x;
    const auto dropped = ctx.scratch.template take<T>(x.rows, x.cols);  // [N, D]
    through(ctx, x, dropped, grad_mode::overwrite);
    return dropped;
  }

  /// Runs `write(share, mode)`, which makes the gradient of the dropped input, so that it arrives
  /// in dx through the mask; `add` is ignore or accumulate.
  template <class T, class Write>
  void through(context<B>& ctx, matrix_view<T, B> dx, grad_mode add, Write write) const {
    if (!mask.active || add == grad_mode::ignore) {
      write(dx, add);
      return;
    }
    const typename workspace<B>::scope scope(ctx.scratch);
    const auto share = ctx.scratch.template take<T>(dx.rows, dx.cols);  // [N, D]
    write(share, grad_mode::overwrite);
    through(ctx, matrix_view<const T, B>(share), dx, add);
  }

 private:
  /// y (+)= x through the mask.
  template <class T>
  void through(context<B>& ctx, matrix_view<const T, B> x, matrix_view<T, B> y,
               grad_mode y_mode) const {
    if constexpr (has_dropout_bits<B>) {
      ops::apply_dropout(ctx, bits, x, y, y_mode);
    } else {
      ops::dropout_backward(ctx, mask.stream, mask.keep, x, y, y_mode);
    }
  }
};

}  // namespace talpa
