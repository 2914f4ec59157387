// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/routing/entropy.hpp>
#include <talpa/routing/gate_weight.hpp>
#include <talpa/routing/top_mass.hpp>
#include <talpa/selectors/explain.hpp>

#include <limits>

namespace talpa {

/// Selector that gives a token all experts where the router is unsure of it, otherwise the most
/// likely ones.
///
/// Forward: as top_p with the crossing expert dropped: on are the ranks j, in the order (logit
/// descending, index ascending), with p_1 + ... + p_j <= p, and the first min_k. Then, where H(p_n)
/// > threshold, every expert whose logit is not -inf is on; H as Entropy says (entropy::tsallis,
/// renyi, shannon; routing/entropy.hpp). g as Weight says, 0 elsewhere.
/// Backward (mask and comparison constant): raw: du_e = p_e (1[e in S] dg_e - sum_{j in S} p_j
/// dg_j) for all e; renormalised and softmax_selected: du_e = g_e (dg_e - sum_{j in S} g_j dg_j).
/// Shapes: logits [N, E] -> gates [N, E], mask [N, ceil(E / 32)].
/// Edges: threshold >= 1 switches the second step off when the entropy is normalised, also for
/// equal logits, whose H may round above 1; p = 1 and p = 0, min_k above E: as top_p; E = 1 is on
/// with gate 1; a row with NaN, +inf, or -inf everywhere gets NaN gates on all experts.
/// Cost: top_p and a logarithm and, but for Shannon's entropy, E exponentials a row.
/// Determinism: same bits for every lane group and backend.
/// Throws: value_error from validate.
/// Source: Li et al. 2025, DynMoLE (arXiv 2504.00661). The defaults are those of its code, which
/// has epsilon = 1e-5 in the entropy beside: dynamic_entropy<>{.entropy = {.q = 1.1, .epsilon =
/// 1e-5}} repeats it, but for E = 1, where the code divides by zero, and for p = 1, where sums that
/// round above 1 drop experts there. Certain tokens get gates that add up to less than one.
template <class Entropy = entropy::tsallis, class Weight = gate::raw>
struct dynamic_entropy {
  static constexpr const char* name = "dynamic_entropy";
  static constexpr bool unit_mass = Weight::unit_mass;
  static constexpr int thread_registers = 168;

  double p = 0.75;         ///< cumulative probability, 0..1
  index min_k = 2;         ///< experts a token gets in any case, >= 1
  double threshold = 0.9;  ///< entropy above which a token gets all experts, >= 0
  Entropy entropy{};       ///< kind and its index

  void validate(index) const {
    check_mass_limit(name, p, min_k);
    check_value(threshold >= 0.0, name, "threshold", threshold,
                ">= 0 = entropy above which all experts are on");
    entropy.validate(name);
  }
  TALPA_HD index max_selected(index experts) const { return experts; }

  template <class G, class T>
  TALPA_HD void select(const G& g, const select_row<T>& row) const {
    const auto u = row_logits(g, row.logits);
    const auto exponential = exponentials<T>(g, u);
    auto all = exponential.invalid;
    if (!(entropy.normalised && threshold >= 1.0)) {
      const auto h = entropy.template value<T>(g, log_probabilities<T>(g, u, exponential));
      const auto unsure = h > g.uniform(static_cast<T>(threshold));
      all = all | unsure;
    }
    // Not asked where all are on, which takes the most ranks.
    const auto end = top_mass<T, crossing::dropped>(g, u, exponential, {p, min_k, false}, !all);
    // All are those whose logit is not -inf.
    const auto lowest = g.uniform(std::numeric_limits<T>::lowest());
    const auto experts = g.uniform(static_cast<std::int32_t>(g.experts()));
    store_first_n<T>(g, row.mask, talpa::select(all, experts, end.count),
                     talpa::select(all, lowest, end.last), exponential.invalid, g.experts(),
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

static_assert(selector_policy<dynamic_entropy<>> &&
              selector_policy<dynamic_entropy<entropy::shannon, gate::renormalised>> &&
              selector_policy<dynamic_entropy<entropy::renyi, gate::softmax_selected>>);

}  // namespace talpa
