// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/cuda/column_search.hpp>
#include <talpa/ops/balance_quantiles.hpp>

#include <cstdint>
#include <limits>

namespace talpa::kernels {

/// alpha[n] = the (k + 1)-th largest score of token n with the bias, part[n] = whether it takes
/// part.
template <class T, class B>
struct quantile_rows {
  matrix_view<const T, B> scores;
  matrix_view<const T, B> bias;
  vector_view<const std::uint8_t, B> padding_mask;
  index k;
  T* alpha;
  std::uint8_t* part;

  template <class Warp>
  TALPA_HD void operator()(const Warp& warp, index n) const {
    const index experts = scores.cols;
    const auto score = [&](index e) { return scores(n, e) + bias(0, e); };
    bool in = padding_mask.empty() || padding_mask[n] != 0;
    in = in && warp.template sum<int>(experts,
                                      [&](index e) { return score(e) != score(e) ? 1 : 0; }) == 0;
    T last{0};
    if (in) {
      // Each round takes the next smaller number, and all that equal it: fewer than E are found by
      // then, so that there is one.
      index found = 0;
      while (found <= k) {
        const T before = last;
        last = warp.template max<T>(experts, [&](index e) {
          const T s = score(e);
          return found == 0 || s < before ? s : -std::numeric_limits<T>::infinity();
        });
        found += warp.template sum<index>(experts,
                                          [&](index e) { return index{score(e) == last ? 1 : 0}; });
      }
    }
    if (warp.lane() == 0) {
      alpha[n] = last;
      part[n] = in && last - last == T{0} ? 1 : 0;
    }
  }
};

/// Tokens in the order of s - alpha, the largest first.
template <class T, class B>
struct quantile_asking {
  matrix_view<const T, B> scores;
  const T* alpha;
  column_tokens of;

  using word = decltype(descending_bits(T{}));

  TALPA_HD index experts() const { return scores.cols; }
  int passes() const { return static_cast<int>(8 * sizeof(word)) / column_digit_bits; }
  TALPA_HD bool asks(index n, index) const { return of.part[n] != 0; }
  TALPA_HD word key(index n, index e) const { return descending_bits(scores(n, e) - alpha[n]); }
};

}  // namespace talpa::kernels

namespace talpa::ops {

template <kernel_backend B>
struct balance_quantiles_impl<B> {
  template <class T>
  static void run(context<B>& ctx, matrix_view<const T, B> scores, index k,
                  vector_view<const std::uint8_t, B> padding_mask, matrix_view<T, B> bias) {
    using namespace kernels;
    const index tokens = scores.rows, experts = scores.cols;
    const typename workspace<B>::scope scope(ctx.scratch);
    const auto alpha = ctx.scratch.template take<T>(tokens);
    const auto part = ctx.scratch.template take<std::uint8_t>(tokens);
    const auto found = take_column_search<T>(ctx, 1, experts);
    for_each_row(ctx, tokens,
                 quantile_rows<T, B>{scores, bias, padding_mask, k, alpha.data, part.data});
    search_columns<T>(ctx,
                      quantile_asking<T, B>{
                          scores, alpha.data, {part.data, tokens, ceil_div(tokens, column_chunk)}},
                      1, detail::quantile_place{k, experts}, found);
    for_each_element(ctx, 1, experts, [=] TALPA_DEVICE(index, index e) {
      const T quantile = from_descending_bits(found.key[e]);
      if (found.left[e] > 0 && quantile - quantile == T{0}) bias(0, e) = T{0} - quantile;
    });
  }
};

}  // namespace talpa::ops
