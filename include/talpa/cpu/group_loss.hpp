// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/cpu/routing_sums.hpp>
#include <talpa/ops/group_loss.hpp>

namespace talpa::ops {

template <>
struct group_loss_impl<cpu> {
  static constexpr index task_groups = 32;

  template <class T, class Loss>
  static void run(context<cpu>& ctx, const Loss& loss, group_reduction reduction, index experts,
                  const routing_totals<T, cpu>& totals,
                  const routing_totals_gradient<T, cpu>& derivative, matrix_view<T, cpu> value,
                  grad_mode mode) {
    const index groups = totals.tokens.size;
    T weight{1};
    if (reduction == group_reduction::mean) {
      index live = 0;
      for (index g = 0; g < groups; ++g) live += totals.tokens[g] > 0 ? 1 : 0;
      weight = live > 0 ? T{1} / static_cast<T>(live) : T{0};
    }
    const workspace<cpu>::scope scope(ctx.scratch);
    const std::size_t lane_bytes = lane_scratch::bytes_for(experts, 1);
    std::byte* const lanes =
        ctx.scratch.take<std::byte>(static_cast<index>(lane_bytes) * ctx.threads).data;
    const matrix_view<T, cpu> counts = ctx.scratch.take<T>(ctx.threads, experts);
    const matrix_view<T, cpu> values = ctx.scratch.take<T>(groups, 1);
    detail::parallel_for_blocks(ctx, groups, task_groups, [&](index first, index rows, int thread) {
      lane_scratch scratch(lanes + static_cast<std::size_t>(thread) * lane_bytes, lane_bytes);
      for (index g = first; g < first + rows; ++g) {
        scratch.reset();
        totals_row<T> in{static_cast<T>(totals.tokens[g]), {}, {}, {}, T{0}};
        totals_derivative_row<T> out;
        if (Loss::uses.counts) {
          for (index e = 0; e < experts; ++e) {
            counts(thread, e) = static_cast<T>(totals.counts(g, e));
          }
          in.counts = {counts.row(thread), 0};
        }
        if (Loss::uses.probability) {
          in.probability = {totals.probability.row(g), 0};
          out.probability = {derivative.probability.row(g), 0};
        }
        if (Loss::uses.importance) {
          in.importance = {totals.importance.row(g), 0};
          out.importance = {derivative.importance.row(g), 0};
        }
        if (Loss::uses.affinity) {
          in.affinity = {totals.affinity.row(g), 0};
          out.affinity = {derivative.affinity.row(g), 0};
        }
        if (Loss::uses.squared_logsumexp) in.squared_logsumexp = totals.squared_logsumexp[g];
        if (Loss::uses.row_term) in.row_term = totals.row_term[g];
        const group_value<T> result = loss(serial(experts, &scratch), in, out);
        values(g, 0) = math::mul(weight, result.value);
        scale_row(Loss::uses.probability, derivative.probability, g, weight);
        scale_row(Loss::uses.importance, derivative.importance, g, weight);
        scale_row(Loss::uses.affinity, derivative.affinity, g, weight);
        if (Loss::uses.row_term) {
          derivative.row_term[g] = math::mul(weight, result.row_term);
        }
        if (Loss::uses.squared_logsumexp) {
          derivative.squared_logsumexp[g] = math::mul(weight, result.squared_logsumexp);
        }
      }
    });
    detail::sum_rows_in_place(values);
    const T sum = groups > 0 ? values(0, 0) : T{0};
    value(0, 0) = mode == grad_mode::overwrite ? sum : value(0, 0) + sum;
  }

 private:
  template <class T>
  static void scale_row(bool used, matrix_view<T, cpu> rows, index g, T weight) {
    if (!used) return;
    for (index e = 0; e < rows.cols; ++e) rows(g, e) = math::mul(weight, rows(g, e));
  }
};

}  // namespace talpa::ops
