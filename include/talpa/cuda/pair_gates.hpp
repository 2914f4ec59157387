// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/cuda/loops.hpp>
#include <talpa/ops/pair_gates.hpp>

#include <bit>
#include <cstdint>

namespace talpa::kernels {

/// The values of each row where its mask is set, in the order (value descending, NaN last, index
/// ascending).
template <class T, class B>
struct masked_ranks {
  matrix_view<const T, B> values;
  matrix_view<const std::uint32_t, B> mask;

  TALPA_HD bool on(index n, index e) const {
    return ((mask(n, e / mask_word_bits) >> (e % mask_word_bits)) & 1u) != 0;
  }
  /// How many come before e, in time of the bits that are set.
  TALPA_HD index operator()(index n, index e) const {
    const T mine = values(n, e);
    index before = 0;
    for (index w = 0; w < mask.cols; ++w) {
      for (std::uint32_t bits = mask(n, w); bits != 0; bits &= bits - 1u) {
        const index i = w * mask_word_bits + detail::lowest_bit(bits);
        if (i >= values.cols) break;
        const T other = values(n, i);
        const bool equal = other == mine || (other != other && mine != mine);
        const bool larger = other > mine || (other == other && mine != mine);
        before += larger || (equal && i < e) ? 1 : 0;
      }
    }
    return before;
  }
};

}  // namespace talpa::kernels

namespace talpa::ops {

template <kernel_backend B>
struct pair_gates_impl<B> {
  template <class T>
  using numbers = matrix_view<const T, B>;
  using bits = matrix_view<const std::uint32_t, B>;

  template <class T>
  static void forward(context<B>& ctx, numbers<T> logits, bits mask, numbers<T> from,
                      bits from_mask, matrix_view<T, B> gates) {
    const typename workspace<B>::scope scope(ctx.scratch);
    const matrix_view<std::int32_t, B> order = ordered(ctx, from, from_mask);
    const kernels::masked_ranks<T, B> rank{logits, mask};
    kernels::for_each_element(ctx, gates.rows, gates.cols, [=] TALPA_DEVICE(index n, index j) {
      const index r = rank.on(n, j) ? rank(n, j) : order.cols;
      const std::int32_t e = r < order.cols ? order(n, r) : -1;
      gates(n, j) = e < 0 ? T{0} : from(n, e);
    });
  }

  template <class T>
  static void backward(context<B>& ctx, numbers<T> logits, bits mask, numbers<T> from,
                       bits from_mask, numbers<T> dgates, matrix_view<T, B> dfrom) {
    const typename workspace<B>::scope scope(ctx.scratch);
    const matrix_view<std::int32_t, B> order = ordered(ctx, from, from_mask);
    const kernels::masked_ranks<T, B> rank{logits, mask};
    kernels::for_each_element(ctx, dgates.rows, dgates.cols, [=] TALPA_DEVICE(index n, index j) {
      const index r = rank.on(n, j) ? rank(n, j) : order.cols;
      const std::int32_t e = r < order.cols ? order(n, r) : -1;
      if (e >= 0) dfrom(n, e) += dgates(n, j);
    });
  }

  /// [N, E]: the gate of rank r of each token, -1 behind the last; in scratch.
  template <class T>
  static matrix_view<std::int32_t, B> ordered(context<B>& ctx, numbers<T> from, bits from_mask) {
    const auto order = ctx.scratch.template take<std::int32_t>(from.rows, from.cols);
    const kernels::masked_ranks<T, B> rank{from, from_mask};
    kernels::for_each_element(ctx, from.rows, from.cols,
                              [=] TALPA_DEVICE(index n, index r) { order(n, r) = -1; });
    kernels::for_each_element(ctx, from.rows, from.cols, [=] TALPA_DEVICE(index n, index e) {
      if (rank.on(n, e)) order(n, rank(n, e)) = static_cast<std::int32_t>(e);
    });
    return order;
  }
};

}  // namespace talpa::ops
