// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/cpu/loops.hpp>
#include <talpa/ops/pair_gates.hpp>

#include <algorithm>

namespace talpa::ops {

template <>
struct pair_gates_impl<cpu> {
  template <class T>
  using numbers = matrix_view<const T, cpu>;
  using bits = matrix_view<const std::uint32_t, cpu>;

  template <class T>
  static void forward(context<cpu>& ctx, numbers<T> logits, bits mask, numbers<T> from,
                      bits from_mask, matrix_view<T, cpu> gates) {
    detail::for_each_row(ctx, gates.rows, gates.cols + from.cols, [&](index n) {
      std::fill_n(gates.row(n), gates.cols, T{});
      for_each_pair(n, logits, mask, from, from_mask,
                    [&](index j, index e) { gates(n, j) = from(n, e); });
    });
  }

  template <class T>
  static void backward(context<cpu>& ctx, numbers<T> logits, bits mask, numbers<T> from,
                       bits from_mask, numbers<T> dgates, matrix_view<T, cpu> dfrom) {
    detail::for_each_row(ctx, dgates.rows, dgates.cols + from.cols, [&](index n) {
      for_each_pair(n, logits, mask, from, from_mask,
                    [&](index j, index e) { dfrom(n, e) += dgates(n, j); });
    });
  }

 private:
  static bool on(const bits& mask, index n, index e) {
    return ((mask(n, e / mask_word_bits) >> (e % mask_word_bits)) & 1u) != 0;
  }
  /// The next of row n behind `last` in the order (value descending, NaN last, index ascending);
  /// -1: none.
  template <class T>
  static index next(index n, const numbers<T>& values, const bits& mask, index last) {
    const auto before = [&](index a, index b) {
      const T x = values(n, a), y = values(n, b);
      const bool alike = x == y || (x != x && y != y);
      return x > y || (x == x && y != y) || (alike && a < b);
    };
    index best = -1;
    for (index e = 0; e < values.cols; ++e) {
      if (!on(mask, n, e) || (last >= 0 && !before(last, e))) continue;
      if (best < 0 || before(e, best)) best = e;
    }
    return best;
  }
  /// f(choice, gate) for the choices of a token by rank.
  template <class T, class F>
  static void for_each_pair(index n, const numbers<T>& logits, const bits& mask,
                            const numbers<T>& from, const bits& from_mask, F f) {
    index choice = -1, gate = -1;
    for (;;) {
      choice = next(n, logits, mask, choice);
      gate = next(n, from, from_mask, gate);
      if (choice < 0 || gate < 0) return;
      f(choice, gate);
    }
  }
};

}  // namespace talpa::ops
