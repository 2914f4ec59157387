// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/math.hpp>
#include <talpa/cpu/routable_rows.hpp>
#include <talpa/ops/sinkhorn.hpp>

#include <algorithm>
#include <cmath>
#include <limits>

namespace talpa::ops {

/// Logits count from the largest of their row. Columns are summed over fixed blocks of tokens, then
/// over the blocks in order.
template <>
struct sinkhorn_impl<cpu> {
  static constexpr index block_rows = 256;

  template <class T>
  static void run(context<cpu>& ctx, matrix_view<const T, cpu> logits,
                  vector_view<const std::uint8_t, cpu> padding_mask, double tolerance,
                  index iterations, vector_view<T, cpu> row, matrix_view<T, cpu> column) {
    const index tokens = logits.rows, experts = logits.cols;
    const index blocks = ceil_div(tokens, block_rows);
    const workspace<cpu>::scope scope(ctx.scratch);
    const auto part = detail::routable_rows(ctx, logits, padding_mask);
    const auto top = ctx.scratch.take<T>(tokens);
    const auto peak = ctx.scratch.take<T>(blocks, experts);  // largest exponent of a block
    const auto sum = ctx.scratch.take<T>(blocks, experts);   // of exponentials relative to it
    index count = 0;
    for (index n = 0; n < tokens; ++n) {
      row[n] = T{0};
      top[n] = T{0};
      if (part[n] == 0) continue;
      ++count;
      top[n] = *std::max_element(logits.row(n), logits.row(n) + experts);
    }
    std::fill_n(column.row(0), experts, T{0});
    if (count == 0) return;
    const T row_share = -math::log(static_cast<T>(count));
    const T column_share = -math::log(static_cast<T>(experts));

    for (index i = 0; i < iterations; ++i) {
      detail::parallel_for_blocks(ctx, tokens, block_rows, [&](index first, index rows, int) {
        T* const most = peak.row(first / block_rows);
        T* const total = sum.row(first / block_rows);
        std::fill_n(most, experts, -std::numeric_limits<T>::infinity());
        std::fill_n(total, experts, T{0});
        for (index n = first; n < first + rows; ++n) {
          if (part[n] == 0) continue;
          row[n] = row_share - log_sum(logits.row(n), top[n], column.row(0), experts);
          for (index e = 0; e < experts; ++e) {
            most[e] = std::max(most[e], (logits(n, e) - top[n]) + row[n]);
          }
        }
        for (index n = first; n < first + rows; ++n) {
          if (part[n] == 0) continue;
          for (index e = 0; e < experts; ++e) {
            if (std::isinf(most[e])) continue;
            total[e] += math::exp(((logits(n, e) - top[n]) + row[n]) - most[e]);
          }
        }
      });
      double change = 0.0;
      for (index e = 0; e < experts; ++e) {
        T most = -std::numeric_limits<T>::infinity(), total = 0;
        for (index b = 0; b < blocks; ++b) most = std::max(most, peak(b, e));
        if (std::isinf(most)) continue;  // nobody can be sent to this expert
        for (index b = 0; b < blocks; ++b) {
          total = math::fma(sum(b, e), math::exp(peak(b, e) - most), total);
        }
        const T next = column_share - (most + math::log(total));
        change += std::abs(math::exp(static_cast<double>(next)) -
                           math::exp(static_cast<double>(column(0, e))));
        column(0, e) = next;
      }
      if (change <= tolerance * static_cast<double>(experts)) break;
    }
    // Count from zero again.
    for (index n = 0; n < tokens; ++n) row[n] -= top[n];
  }

 private:
  /// log sum_e exp(u_e - top + c_e).
  template <class T>
  static T log_sum(const T* u, T top, const T* c, index experts) {
    T most = -std::numeric_limits<T>::infinity(), total = 0;
    for (index e = 0; e < experts; ++e) most = std::max(most, (u[e] - top) + c[e]);
    for (index e = 0; e < experts; ++e) total += math::exp(((u[e] - top) + c[e]) - most);
    return most + math::log(total);
  }
};

}  // namespace talpa::ops
