// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/routing/gate_weight.hpp>
#include <talpa/routing/top_mass.hpp>
#include <talpa/selectors/explain.hpp>

namespace talpa {

/// Selector that turns on the most likely experts until their probabilities add up to p.
///
/// Forward: ranks j = 1, 2, ... in the order (logit descending, index ascending) of the experts
/// whose logit is not -inf; c_j = min(1, p_1 + ... + p_j). The crossing rank is the first with
/// c_j > p, with `inclusive` the first with c_j >= p. On are the ranks before it, with
/// crossing::kept also the crossing rank itself, and the first min_k ranks in any case; g as Weight
/// says, 0 elsewhere.
/// Backward (the mask constant): raw: du_e = p_e (1[e in S] dg_e - sum_{j in S} p_j dg_j) for all
/// e; renormalised and softmax_selected: du_e = g_e (dg_e - sum_{j in S} g_j dg_j).
/// Shapes: logits [N, E] -> gates [N, E], mask [N, ceil(E / 32)].
/// Edges: p = 1 without `inclusive` selects every expert that is not masked, because no sum
/// exceeds 1; with it, the ranks up to where the rounded sum reaches 1. p = 0 selects min_k
/// experts; min_k above E counts as E; a row with NaN, +inf, or -inf everywhere gets NaN gates on
/// all experts.
/// Cost: 7 passes over the row, a sort of its logits ((log2 E)^2 / 4 comparisons an expert), and an
/// exponential for each rank that is looked at, at most one more than are on, or for each of eight
/// ranks where rows run side by side.
/// Determinism: same bits for every lane group and backend; sums are added in the order of ranks.
/// Throws: value_error from validate.
/// Source: Huang et al. 2024 (arXiv 2403.07652): top_p<gate::raw, crossing::kept>{.p = 0.4}.
/// DynMoLE's inner rule (arXiv 2504.00661): top_p<gate::raw, crossing::dropped>{.p = 0.75, .min_k =
/// 2}. Both codes sort probabilities, and their sums may round to above p = 1, which then drops the
/// last experts; logits are ordered here, and sums end at 1.
template <class Weight, class Crossing = crossing::kept>
struct top_p {
  static constexpr const char* name = "top_p";
  static constexpr bool unit_mass = Weight::unit_mass;

  double p = 0.4;          ///< cumulative probability, 0..1
  index min_k = 1;         ///< experts a token gets in any case, >= 1
  bool inclusive = false;  ///< whether a sum equal to p crosses it

  void validate(index) const { check_mass_limit(name, p, min_k); }
  TALPA_HD index max_selected(index experts) const { return experts; }

  template <class G, class T>
  TALPA_HD void select(const G& g, const select_row<T>& row) const {
    const auto u = row_logits(g, row.logits);
    const auto exponential = exponentials<T>(g, u);
    const auto end =
        top_mass<T, Crossing>(g, u, exponential, {p, min_k, inclusive}, exponential.valid);
    store_first_n<T>(g, row.mask, end.count, end.last, exponential.invalid, g.experts(),
                     [&](auto e) { return u[e]; });
    weigh<Weight>(g, row, exponential);
  }

  template <class G, class T>
  TALPA_HD void replay(const G& g, const select_row<T>& row) const {
    weigh<Weight>(g, row, exponentials<T>(g, row_logits(g, row.logits)));
  }

  template <class G, class T>
  TALPA_HD void select_backward(const G& g, const select_gradient_row<T>& row) const {
    weigh_backward<Weight>(g, row);
  }
};

static_assert(selector_policy<top_p<gate::raw>> &&
              selector_policy<top_p<gate::renormalised, crossing::dropped>> &&
              selector_policy<top_p<gate::softmax_selected>>);

}  // namespace talpa
