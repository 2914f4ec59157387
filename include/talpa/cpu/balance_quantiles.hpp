// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/cpu/context.hpp>
#include <talpa/ops/balance_quantiles.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace talpa::ops {

template <>
struct balance_quantiles_impl<cpu> {
  static constexpr index block_rows = 256;

  template <class T>
  static void run(context<cpu>& ctx, matrix_view<const T, cpu> scores, index k,
                  vector_view<const std::uint8_t, cpu> padding_mask, matrix_view<T, cpu> bias) {
    const index tokens = scores.rows, experts = scores.cols;
    const workspace<cpu>::scope scope(ctx.scratch);
    const auto alpha = ctx.scratch.take<T>(tokens);
    const auto part = ctx.scratch.take<std::uint8_t>(tokens);
    const auto rows_of = ctx.scratch.take<T>(ctx.threads, experts);
    detail::parallel_for_blocks(ctx, tokens, block_rows, [&](index first, index rows, int thread) {
      T* const row = rows_of.row(thread);
      for (index n = first; n < first + rows; ++n) {
        bool number = padding_mask.empty() || padding_mask[n] != 0;
        for (index e = 0; e < experts; ++e) {
          row[e] = scores(n, e) + bias(0, e);
          number = number && !std::isnan(row[e]);
        }
        alpha[n] = number ? largest(row, experts, k) : T{0};
        part[n] = number && std::isfinite(alpha[n]) ? 1 : 0;
      }
    });
    index count = 0;
    for (index n = 0; n < tokens; ++n) count += part[n];
    if (count == 0) return;

    const detail::quantile_place place{k, experts};
    const auto columns = ctx.scratch.take<T>(ctx.threads, count);
    detail::parallel_for(ctx, experts, [&](index e, int thread) {
      T* const column = columns.row(thread);
      index i = 0;
      for (index n = 0; n < tokens; ++n) {
        if (part[n] != 0) column[i++] = scores(n, e) - alpha[n];
      }
      const T quantile = largest(column, count, place(count) - 1);
      if (std::isfinite(quantile)) bias(0, e) = T{0} - quantile;
    });
  }

 private:
  /// The i-th largest of n, i from 0; changes their order.
  template <class T>
  static T largest(T* values, index n, index i) {
    std::nth_element(values, values + i, values + n, [](T a, T b) { return a > b; });
    return values[i];
  }
};

}  // namespace talpa::ops
