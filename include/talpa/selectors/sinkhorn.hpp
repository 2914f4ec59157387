// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/check.hpp>
#include <talpa/core/mode.hpp>
#include <talpa/core/workspace.hpp>
#include <talpa/ops/sinkhorn.hpp>
#include <talpa/routing/first_k.hpp>
#include <talpa/routing/gate_weight.hpp>
#include <talpa/routing/sigmoid_weight.hpp>
#include <talpa/selectors/explain.hpp>

#include <cmath>
#include <cstdint>
#include <limits>

namespace talpa {

namespace detail {

/// The experts of the k largest u_e - max u + c_e; the gates are left alone.
struct scaled_top_k {
  static constexpr const char* name = "sinkhorn";
  static constexpr bool has_bias = true;
  index k;

  void validate(index) const {}
  template <class G, class T>
  TALPA_HD void select(const G& g, const select_row<T>& row) const {
    const auto masked = g.uniform(-std::numeric_limits<T>::infinity());
    const auto u = row_logits(g, row.logits);
    const auto invalid = row_invalid<T>(g, u);
    const auto lowest = g.uniform(std::numeric_limits<T>::lowest());
    const auto top = g.template max<T>([&](auto e) { return u[e]; });
    auto score = g.template elements<T>();  // -inf for those not offered
    g.for_each([&](auto e) {
      const auto own = (u[e] - top) + g.load(row.bias, e, T{0});
      const auto finite = talpa::select(own > lowest, own, lowest);
      score[e] = talpa::select(u[e] > masked, finite, masked);
    });
    const auto of = [&](auto e) { return score[e]; };
    store_first_k<T>(g, row.mask, k, g.template top<T>(k, of).last, invalid, of);
  }
};

}  // namespace detail

/// Selector that chooses from a transport plan in which every expert gets the same mass.
///
/// Forward: plan P = exp(u) with rows and columns scaled to equal sums (ops::sinkhorn); S = the k
/// experts with the largest P_ne, ties to the lower index; g_e = sigmoid(u_e) for k = 1 and p_e,
/// p = softmax of all logits, otherwise, on S, 0 elsewhere. At inference S = the k largest logits.
/// Backward (S constant, nothing through the plan): k = 1: du_e = dg_e sigmoid'(u_e) on S;
/// otherwise du_e = p_e (1[e in S] dg_e - sum_{j in S} p_j dg_j) for all e.
/// Shapes: logits [N, E] -> gates [N, E], mask [N, ceil(E / 32)].
/// Edges: E = 1 and k = E choose all; the choice need not be balanced, only the plan is. Padding
/// and rows with NaN, +inf, or -inf everywhere take no part in the plan; the latter get NaN gates
/// on experts 0..k-1. An expert with logit -inf is never on.
/// Cost: 2 N E exponentials an iteration and k + 2 passes; [N, E] scratch.
/// Determinism: same bits for any number of threads; gates also for every lane group.
/// Throws: value_error from validate.
/// Source: Megatron-LM sinkhorn and its router (k > 1 weighs with softmax, k = 1 with sigmoid,
/// neither is renormalised). P is compared as u_e - max u + log of the column's scale: the row's
/// scale changes no order. The reference has no maximum subtracted, adds 1e-8 to every sum and has
/// no bound on its iterations: logits above 88 make its plan NaN in float. Here they work, and the
/// sums are what they are.
struct sinkhorn {
  static constexpr const char* name = "sinkhorn";
  static constexpr bool unit_mass = false;
  static constexpr bool couples_rows = true;

  index k = 1;              ///< experts per token, 1..E
  double tolerance = 1e-4;  ///< mean change of a column's scale to stop at, >= 0
  index iterations = 1000;  ///< times to scale at most, >= 0; 0: the k largest logits

  void validate(index experts) const {
    check_range(name, "k", k, 1, experts, "experts");
    check_value(tolerance >= 0.0 && std::isfinite(tolerance), name, "tolerance", tolerance,
                ">= 0 and finite = change of a scale to stop at");
    check_at_least(name, "iterations", iterations, 0, "times to scale at most");
  }
  TALPA_HD index max_selected(index) const { return k; }
  /// At inference tokens do not look at each other.
  sinkhorn at(mode m) const {
    sinkhorn now = *this;
    if (m == mode::inference) now.iterations = 0;
    return now;
  }

  template <class T, class B>
  void assign(context<B>& ctx, const assign_batch<T, B>& batch,
              matrix_view<std::uint32_t, B> mask) const {
    const index tokens = batch.logits.rows, experts = batch.logits.cols;
    const typename workspace<B>::scope scope(ctx.scratch);
    const auto unused = ctx.scratch.template take<T>(tokens, experts);  // [N, E], gates
    const auto row = ctx.scratch.template take<T>(tokens);              // [N]
    const auto column = ctx.scratch.template take<T>(1, experts);       // [1, E]
    ops::sinkhorn(ctx, batch.logits, batch.padding_mask, tolerance, iterations, row, column);
    ops::select(ctx, detail::scaled_top_k{k}, batch.logits, batch.padding_mask, unused, mask,
                select_inputs<T, B>{.bias = column});
  }

  template <class G, class T>
  TALPA_HD void replay(const G& g, const select_row<T>& row) const {
    if (k == 1) {
      weigh_sigmoid(g, row);
    } else {
      weigh<gate::raw>(g, row, exponentials<T>(g, row_logits(g, row.logits)));
    }
  }

  template <class G, class T>
  TALPA_HD void select_backward(const G& g, const select_gradient_row<T>& row) const {
    if (k == 1) {
      weigh_sigmoid_backward(g, row);
    } else {
      weigh_backward<gate::raw>(g, row);
    }
  }
};

static_assert(selector_policy<sinkhorn> && modal_selector<sinkhorn>);

}  // namespace talpa
