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
/// router then gets no gradient from the gates. The sum over all experts, which p_e and p_j are
/// both divided by, is left out: one rounding fewer.
struct renormalised {
  static constexpr bool unit_mass = true;
};
/// g_e = exp(u_e) / sum_{j in S} exp(u_j): softmax of the selected logits alone (JetMoE,
/// LLaMA-MoE). The same number as `renormalised`, bit for bit.
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

namespace detail {

/// Whether a gate is the share of exp(u_e - max u) in the sum of those over S.
template <class Weight>
inline constexpr bool shares_exponentials =
    std::same_as<Weight, gate::renormalised> || std::same_as<Weight, gate::softmax_selected>;

/// Writes the gates part[e] / mass of a row whose mask `on` is S, for parts that are 0 beyond S and
/// add up to mass; NaN on S for an invalid row.
template <class G, class T, class On, class Parts>
TALPA_HD void weigh_shares(const G& g, const select_row<T>& row, const On& on, const Parts& part,
                           const typename G::template value<T>& mass,
                           const typename G::template value<bool>& invalid) {
  const auto zero = g.uniform(T{0});
  const auto nan = g.uniform(std::numeric_limits<T>::quiet_NaN());
  const auto share = g.quotients(part, mass);
  // 0 / mass = 0 beyond S.
  const auto plain = mass > zero;
  if (!g.any(invalid | !plain)) {
    g.store_row(row.gates, [&](auto e) { return share[e]; });
    return;
  }
  const auto wrong = talpa::select(invalid, nan, zero);
  g.store_row(row.gates, [&](auto e) { return talpa::select(on(e), share[e] + wrong, zero); });
}

/// Writes the gates that shares_exponentials names from the logits u of a row, whose largest is
/// `top`: weigh without the sum over all experts, which does not enter them.
template <class G, class T, class Logits>
TALPA_HD void weigh_logits(const G& g, const select_row<T>& row, const Logits& u,
                           const typename G::template value<T>& top,
                           const typename G::template value<bool>& invalid) {
  const auto zero = g.uniform(T{0});
  const auto on = g.load_mask(row.recorded());
  auto part = g.template elements<T>();
  const auto mass = g.template sum_of<T>(
      exp_nonpositive_of{}, [&](auto e) { return u[e] - top; },
      [&](auto e, const auto& x) { return part[e] = talpa::select(on(e), x, zero); });
  weigh_shares(g, row, on, part, mass, invalid);
}

/// The same bits where the largest and the least logit of S are known, by which a lane group whose
/// quotients look at their operands can be spared that. e^-45 is above 2^-65: with logits no
/// further apart each part is 0 or in 2^-65 .. 1, and they add up to 1 .. E.
template <class G, class T, class Logits>
TALPA_HD void weigh_logits(const G& g, const select_row<T>& row, const Logits& u,
                           const top_values<typename G::template value<T>>& top,
                           const typename G::template value<bool>& invalid) {
  if constexpr (requires { requires G::has_covered_quotients; }) {
    if (!g.any(invalid | !(top.last - top.first >= T{-45}))) {
      const auto on = g.load_mask(row.recorded());
      auto part = g.template elements<T>();
      const auto mass = g.template sum<T>([&](auto e) {
        return part[e] = talpa::select(on(e), math::exp_normal(u[e] - top.first), T{0});
      });
      const auto share = g.covered_quotients(part, mass);
      g.store_row(row.gates, [&](auto e) { return share[e]; });
      return;
    }
  }
  weigh_logits(g, row, u, top.first, invalid);
}

}  // namespace detail

/// Writes the gates of a row whose mask is S: as Weight says on S, 0 elsewhere, NaN on S for an
/// invalid row.
template <class Weight, class G, class T>
TALPA_HD void weigh(const G& g, const select_row<T>& row,
                    const row_exponentials<T, G>& exponential) {
  if constexpr (Weight::unit_mass) {
    const auto zero = g.uniform(T{0});
    const auto on = g.load_mask(row.recorded());
    auto part = g.template elements<T>();
    const auto weigh_by = [&](auto numerator) {
      const auto mass = g.template sum<T>(
          [&](auto e) { return part[e] = talpa::select(on(e), numerator(e), zero); });
      detail::weigh_shares(g, row, on, part, mass, exponential.invalid);
    };
    if constexpr (std::same_as<Weight, gate::softmax_probability>) {
      const auto p = g.quotients(exponential.weight, exponential.sum);
      weigh_by([&](auto e) { return math::exp(p[e]); });
    } else {
      weigh_by([&](auto e) { return exponential.weight[e]; });
    }
  } else {
    const auto zero = g.uniform(T{0});
    const auto nan = g.uniform(std::numeric_limits<T>::quiet_NaN());
    const auto on = g.load_mask(row.recorded());
    const auto wrong = talpa::select(exponential.invalid, nan, zero);
    if constexpr (std::same_as<Weight, gate::hard>) {
      const auto one = g.uniform(T{1});
      g.store_row(row.gates, [&](auto e) { return talpa::select(on(e), one + wrong, zero); });
    } else {
      const auto p = g.quotients(exponential.weight, exponential.sum);
      g.store_row(row.gates, [&](auto e) { return talpa::select(on(e), p[e] + wrong, zero); });
    }
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
      const auto p = g.quotients(exponential.weight, exponential.sum);
      const auto fall = g.template sum<T>([&](auto e) { return math::mul(p[e], dp[e]); });
      g.store_row(row.dlogits, [&](auto e) { return math::mul(p[e], dp[e] - fall); });
    } else if constexpr (Weight::unit_mass) {
      const auto gate_of = g.load_row(row.gates, T{0});
      pull_back([&](auto e) { return gate_of[e]; });
    } else {
      const auto exponential = exponentials<T>(g, row_logits(g, row.logits));
      const auto p = g.quotients(exponential.weight, exponential.sum);
      pull_back([&](auto e) { return p[e]; });
    }
  }
}

}  // namespace talpa
