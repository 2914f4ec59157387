// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/routing/row_softmax.hpp>

#include <concepts>
#include <limits>

namespace talpa {

/// How a selector weighs the experts S it selected, with p = softmax over all logits u of the
/// token.
namespace gate {

/// g_e = p_e: the mass of the others is lost (OLMoE, Switch, DynMoLE).
struct raw {
  static constexpr bool unit_mass = false;
};
/// g_e = p_e / sum_{j in S} p_j (MoLA, MixLoRA, Mixtral). Constant 1 for a single expert: the
/// router then gets no gradient from the gates.
struct renormalised {
  static constexpr bool unit_mass = true;
};
/// g_e = exp(u_e) / sum_{j in S} exp(u_j): softmax of the selected logits alone (JetMoE,
/// LLaMA-MoE). Equal to `renormalised` in exact arithmetic; one rounding fewer.
struct softmax_selected {
  static constexpr bool unit_mass = true;
};
/// g_e = exp(p_e) / sum_{j in S} exp(p_j): softmax of the selected PROBABILITIES (HMoRA, X-LoRA).
/// Flatter than the others: two experts share between 0.27 and 0.73.
struct softmax_probability {
  static constexpr bool unit_mass = true;
};
/// g_e = 1: on or off and nothing between (FactorLLM, MoEfication). The logits choose and get no
/// gradient from the gates; straight_through gives them one.
struct hard {
  static constexpr bool unit_mass = false;
};

}  // namespace gate

/// Writes the gates of a row whose mask is S: as Weight says on S, 0 elsewhere, NaN on S for an
/// invalid row.
template <class Weight, class G, class T>
TALPA_HD void weigh(const G& g, const select_row<T>& row,
                    const row_exponentials<T, G>& exponential) {
  const auto zero = g.uniform(T{0});
  const auto nan = g.uniform(std::numeric_limits<T>::quiet_NaN());
  // Numerators over S: p_e for raw and renormalised, exp(u_e - max u) for softmax_selected,
  // exp(p_e) for softmax_probability, 1 for hard.
  const auto numerator = [&](auto e) {
    if constexpr (std::same_as<Weight, gate::softmax_selected>) {
      return exponential.weight[e];
    } else if constexpr (std::same_as<Weight, gate::softmax_probability>) {
      return math::exp(exponential.weight[e] / exponential.sum);
    } else if constexpr (std::same_as<Weight, gate::hard>) {
      return g.uniform(T{1});
    } else {
      return exponential.weight[e] / exponential.sum;
    }
  };
  const auto on = g.load_mask(row.recorded());
  const auto wrong = talpa::select(exponential.invalid, nan, zero);
  if constexpr (!Weight::unit_mass) {
    g.store_row(row.gates,
                [&](auto e) { return talpa::select(on(e), numerator(e) + wrong, zero); });
  } else {
    auto part = g.template elements<T>();
    g.for_each([&](auto e) { part[e] = talpa::select(on(e), numerator(e), zero); });
    const auto mass = g.template sum<T>([&](auto e) { return part[e]; });
    g.store_row(row.gates,
                [&](auto e) { return talpa::select(on(e), part[e] / mass + wrong, zero); });
  }
}

/// Backward of weigh with S constant. raw: du_e = p_e (m_e dg_e - sum_j p_j m_j dg_j) for all e, m
/// the mask; renormalised and softmax_selected: du_e = g_e (dg_e - sum_{j in S} g_j dg_j);
/// softmax_probability: dp_e = that, du_e = p_e (dp_e - sum_j p_j dp_j) for all e; hard: 0.
template <class Weight, class G, class T>
TALPA_HD void weigh_backward(const G& g, const select_gradient_row<T>& row) {
  const auto zero = g.uniform(T{0});
  if constexpr (std::same_as<Weight, gate::hard>) {
    g.store_row(row.dlogits, [&](auto) { return zero; });
  } else {
    const auto on = g.load_mask(row.mask);
    const auto upstream = g.load_row(row.dgates, T{0});
    const auto dgate = [&](auto e) { return talpa::select(on(e), upstream[e], zero); };
    const auto pull_back = [&](auto weight) {
      const auto mean = g.template sum<T>([&](auto e) { return math::mul(weight(e), dgate(e)); });
      g.store_row(row.dlogits, [&](auto e) { return math::mul(weight(e), dgate(e) - mean); });
    };
    if constexpr (std::same_as<Weight, gate::softmax_probability>) {
      const auto exponential = exponentials<T>(g, row_logits(g, row.logits));
      const auto gate_of = g.load_row(row.gates, T{0});
      const auto mean = g.template sum<T>([&](auto e) { return math::mul(gate_of[e], dgate(e)); });
      auto dp = g.template elements<T>();
      g.for_each([&](auto e) { dp[e] = math::mul(gate_of[e], dgate(e) - mean); });
      const auto p = [&](auto e) { return exponential.weight[e] / exponential.sum; };
      const auto fall = g.template sum<T>([&](auto e) { return math::mul(p(e), dp[e]); });
      g.store_row(row.dlogits, [&](auto e) { return math::mul(p(e), dp[e] - fall); });
    } else if constexpr (Weight::unit_mass) {
      const auto gate_of = g.load_row(row.gates, T{0});
      pull_back([&](auto e) { return gate_of[e]; });
    } else {
      const auto exponential = exponentials<T>(g, row_logits(g, row.logits));
      pull_back([&](auto e) { return exponential.weight[e] / exponential.sum; });
    }
  }
}

}  // namespace talpa
