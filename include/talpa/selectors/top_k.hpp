// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/check.hpp>
#include <talpa/routing/first_k.hpp>
#include <talpa/routing/gate_weight.hpp>
#include <talpa/selectors/explain.hpp>

#include <concepts>
#include <cstdint>

namespace talpa {

/// Selector that turns on the k experts with the largest logits, ties to the lower index.
///
/// Forward: S = the first k experts in the order (logit descending, index ascending) among those
/// whose logit is not -inf; g as Weight says, 0 outside S.
/// Backward (S constant): raw: du_e = p_e (1[e in S] dg_e - sum_{j in S} p_j dg_j) for all e;
/// renormalised and softmax_selected: du_e = g_e (dg_e - sum_{j in S} g_j dg_j); hard: 0.
/// Shapes: logits [N, E] -> gates [N, E], mask [N, ceil(E / 32)].
/// Edges: k = E with raw equals dense; fewer than k finite logits select those; a row with NaN,
/// +inf, or -inf everywhere gets NaN gates on experts 0..k-1.
/// Cost: 6 passes over the row, one of them with k comparisons an expert, from k = 9 on with a sort
/// of (log2 E)^2 / 4; nothing is saved beside logits, gates and mask.
/// Determinism: same bits for every lane group and backend.
/// Throws: value_error from validate.
/// Source: Shazeer et al. 2017 (arXiv 1701.06538), gates as the users of each form named above. The
/// references sort probabilities; logits are compared here, because rounding in softmax merges
/// distinct ones.
template <class Weight>
struct top_k {
  static constexpr const char* name = "top_k";
  static constexpr bool unit_mass = Weight::unit_mass;
  static constexpr int thread_registers = std::same_as<Weight, gate::softmax_probability> ? 72 : 64;

  index k = 2;  ///< experts per token, 1..E

  void validate(index experts) const { check_range(name, "k", k, 1, experts, "experts"); }
  TALPA_HD index max_selected(index) const { return k; }

  template <class G, class T>
  TALPA_HD void select(const G& g, const select_row<T>& row) const {
    const auto u = row_logits(g, row.logits);
    const auto logit = [&](auto e) { return u[e]; };
    const auto top = g.template top<T>(k, logit);
    if constexpr (detail::shares_exponentials<Weight>) {
      const auto invalid = row_invalid<T>(g, u, top.first);
      store_first_k<T>(g, row.mask, k, top.last, invalid, logit);
      detail::weigh_logits(g, row, u, top, invalid);
    } else {
      const auto exponential = exponentials<T>(g, u, top.first);
      store_first_k<T>(g, row.mask, k, top.last, exponential.invalid, logit);
      weigh<Weight>(g, row, exponential);
    }
  }

  template <class G, class T>
  TALPA_HD void replay(const G& g, const select_row<T>& row) const {
    const auto u = row_logits(g, row.logits);
    if constexpr (detail::shares_exponentials<Weight>) {
      const auto top = g.template max<T>([&](auto e) { return u[e]; });
      detail::weigh_logits(g, row, u, top, row_invalid<T>(g, u, top));
    } else {
      weigh<Weight>(g, row, exponentials<T>(g, u));
    }
  }

  template <class G, class T>
  TALPA_HD void select_backward(const G& g, const select_gradient_row<T>& row) const {
    weigh_backward<Weight>(g, row);
  }
};

static_assert(selector_policy<top_k<gate::raw>> && selector_policy<top_k<gate::renormalised>> &&
              selector_policy<top_k<gate::softmax_selected>> && selector_policy<top_k<gate::hard>>);

}  // namespace talpa
