// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/check.hpp>
#include <talpa/routing/first_k.hpp>
#include <talpa/routing/gate_weight.hpp>
#include <talpa/selectors/explain.hpp>

#include <cmath>
#include <concepts>
#include <cstdint>
#include <limits>

namespace talpa {

/// How a selector turns a logit into the score of an expert.
namespace score {

/// s_e = sigmoid(u_e): each expert by itself (DeepSeek-V3).
struct sigmoid {};
/// s = softmax(u) (DeepSeek-V2, SMoRA).
struct softmax {};

}  // namespace score

/// Selector that turns on the k experts with the largest score + bias, where the bias balances the
/// load without a loss; the gates know nothing of the bias.
///
/// Forward: s as Score says; c_e = s_e + b_e, b the bias [1, E]. Experts come in n_groups groups of
/// neighbours, ranked by the sum of their group_best = 2 largest c (by the largest one where it is
/// 1, or where a group offers one expert); the first topk_groups groups stay. S = the first k of
/// their experts in the order (c descending, index ascending) among those whose logit is not -inf.
/// On S, g_e = scale s_e / sum_{j in S} s_j for Weight = gate::renormalised, g_e = scale s_e for
/// gate::raw; 0 outside S.
/// Backward (S constant, the bias has no gradient): with m = sum_{j in S} g_j dg_j / scale,
/// sigmoid: renormalised du_e = g_e (1 - s_e) (dg_e - m), raw du_e = g_e (1 - s_e) dg_e, on S;
/// softmax: renormalised du_e = g_e (dg_e - m) on S, raw du_e = scale s_e (1[e in S] dg_e - m) for
/// all e.
/// Shapes: logits [N, E], bias [1, E] -> gates [N, E], mask [N, ceil(E / 32)].
/// Edges: fewer than k experts offered selects those; scores that all underflow to 0 give gates 0,
/// not NaN; a row with NaN, +inf, or -inf everywhere, or a bias that is NaN or infinite, gets NaN
/// gates on experts 0..k-1.
/// Cost: the choice of top_k and 8 passes over the row, 2 n_groups + topk_groups more with groups.
/// Determinism: same bits for every lane group and backend.
/// Throws: value_error from validate.
/// Source: DeepSeek-AI 2024, DeepSeek-V3 (arXiv 2412.19437): biased_top_k<score::sigmoid>{.k = 8,
/// .n_groups = 8, .topk_groups = 4, .scale = 2.5}; DeepSeek-V2's gate (arXiv 2405.04434) is
/// <score::softmax, gate::raw> with group_best = 1 and a bias of 0. SMoRA (arXiv 2501.15103) does
/// the same with ranks for experts. The bias follows the load by ops::update_bias, update_bias of a
/// report (optim/expert_bias.hpp) or ops::balance_quantiles.
template <class Score = score::sigmoid, class Weight = gate::renormalised>
struct biased_top_k {
  static_assert(std::same_as<Weight, gate::renormalised> || std::same_as<Weight, gate::raw>,
                "talpa: biased_top_k weighs by gate::renormalised or gate::raw");

  static constexpr const char* name = "biased_top_k";
  static constexpr bool unit_mass = false;  // the gates sum to scale
  static constexpr int thread_registers = 168;
  static constexpr bool has_bias = true;

  index k = 8;            ///< experts per token, 1..E / n_groups * topk_groups
  index n_groups = 1;     ///< groups of experts, a divisor of E
  index topk_groups = 1;  ///< groups that a token may use, 1..n_groups
  double scale = 1.0;     ///< what the gates are multiplied by, finite and > 0
  index group_best = 2;   ///< experts whose sum ranks a group, 1 (DeepSeek-V2) or 2

  void validate(index experts) const {
    check_range(name, "n_groups", n_groups, 1, experts, "experts");
    check_value(experts % n_groups == 0, name, "n_groups", static_cast<double>(n_groups),
                "a divisor of experts");
    check_range(name, "topk_groups", topk_groups, 1, n_groups, "n_groups");
    check_range(name, "k", k, 1, experts / n_groups * topk_groups, "experts in topk_groups groups");
    check_range(name, "group_best", group_best, 1, 2, "experts that rank a group");
    check_value(std::isfinite(scale) && scale > 0.0, name, "scale", scale, "a finite number > 0");
  }
  TALPA_HD index max_selected(index) const { return k; }

  template <class G, class T>
  TALPA_HD void select(const G& g, const select_row<T>& row) const {
    const auto masked = g.uniform(-std::numeric_limits<T>::infinity());
    const auto zero = g.uniform(T{0});
    const auto u = row_logits(g, row.logits);
    const auto s = scores<T>(g, u);
    // A bias - bias is 0 unless it is NaN or infinite.
    const auto odd = g.count([&](auto e) {
      const auto b = g.load(row.bias, e, T{0});
      return !(b - b == zero);
    });
    const auto biased_badly = odd > g.uniform(std::int32_t{0});
    const auto invalid = row_invalid<T>(g, u) | biased_badly;

    auto choice = g.template elements<T>();  // score + bias, -inf for those not offered
    g.for_each([&](auto e) {
      const auto offered = u[e] > masked;
      choice[e] = talpa::select(offered & !invalid, s[e] + g.load(row.bias, e, T{0}), masked);
    });
    if (topk_groups < n_groups) keep_groups<T>(g, choice);
    const auto of = [&](auto e) { return choice[e]; };
    store_first_k<T>(g, row.mask, k, g.template top<T>(k, of).last, invalid, of);
    weigh_scores(g, row, s, invalid);
  }

  template <class G, class T>
  TALPA_HD void replay(const G& g, const select_row<T>& row) const {
    const auto u = row_logits(g, row.logits);
    weigh_scores(g, row, scores<T>(g, u), row_invalid<T>(g, u));
  }

  template <class G, class T>
  TALPA_HD void select_backward(const G& g, const select_gradient_row<T>& row) const {
    const auto zero = g.uniform(T{0});
    const auto on = [&](auto e) { return g.load_bit(row.mask, e); };
    const auto dgate = [&](auto e) {
      return talpa::select(on(e), g.load(row.dgates, e, T{0}), zero);
    };
    const auto gate_of = [&](auto e) {
      return talpa::select(on(e), g.load(row.gates, e, T{0}), zero);
    };
    const auto factor = g.uniform(static_cast<T>(scale));
    const auto mean =
        g.template sum<T>([&](auto e) { return math::mul(gate_of(e), dgate(e)); }) / factor;
    if constexpr (std::same_as<Score, score::sigmoid>) {
      constexpr bool renormalised = std::same_as<Weight, gate::renormalised>;
      g.for_each([&](auto e) {
        const auto rest = math::sigmoid(-g.load(row.logits, e, T{0}));  // 1 - s
        const auto pull = renormalised ? dgate(e) - mean : dgate(e);
        g.store(row.dlogits, e,
                talpa::select(on(e), math::mul(math::mul(gate_of(e), rest), pull), zero));
      });
    } else if constexpr (std::same_as<Weight, gate::renormalised>) {
      g.for_each([&](auto e) { g.store(row.dlogits, e, math::mul(gate_of(e), dgate(e) - mean)); });
    } else {
      const auto s = scores<T>(g, row_logits(g, row.logits));
      g.for_each([&](auto e) {
        g.store(row.dlogits, e, math::mul(math::mul(factor, s[e]), dgate(e) - mean));
      });
    }
  }

 private:
  template <class T, class G, class Logits>
  TALPA_HD static auto scores(const G& g, const Logits& u) {
    if constexpr (std::same_as<Score, score::sigmoid>) {
      auto s = g.template elements<T>();
      g.for_each([&](auto e) { s[e] = math::sigmoid(u[e]); });
      return s;
    } else {
      return probabilities<T>(g, exponentials<T>(g, u));
    }
  }

  /// Sets `choice` to -inf outside the best topk_groups groups.
  template <class T, class G, class Choice>
  TALPA_HD void keep_groups(const G& g, Choice& choice) const {
    const auto masked = g.uniform(-std::numeric_limits<T>::infinity());
    const auto size = g.uniform(static_cast<std::int32_t>(g.experts() / n_groups));
    const auto none = g.uniform(std::int32_t{-1});
    const auto value = [&](auto e) { return choice[e]; };
    auto rank = g.template elements<T>();  // of the expert's group; -inf where it offers nobody
    g.for_each([&](auto e) { rank[e] = masked; });
    for (index q = 0; q < n_groups; ++q) {
      const auto group = g.uniform(static_cast<std::int32_t>(q));
      const auto open = [&](auto e) {
        const auto member = e.expert() / size == group, offered = choice[e] > masked;
        return member & offered;
      };
      const auto best = g.template arg_max<T>(value, open);
      auto sum = best.value;
      if (group_best == 2) {
        const auto second = g.template arg_max<T>(value, [&](auto e) {
          const auto taken = e.expert() == best.expert;
          return open(e) & !taken;
        });
        const auto pair = second.expert > none;
        sum = talpa::select(pair, best.value + second.value, best.value);
      }
      g.for_each([&](auto e) { rank[e] = talpa::select(open(e), sum, rank[e]); });
    }
    auto kept = g.template elements<T>();  // the choice in groups that stay
    g.for_each([&](auto e) { kept[e] = masked; });
    for (index pick = 0; pick < topk_groups; ++pick) {
      const auto best = g.template arg_max<T>([&](auto e) { return rank[e]; },
                                              [&](auto e) { return rank[e] > masked; });
      const auto some = best.expert > none;
      const auto group = best.expert / size;
      g.for_each([&](auto e) {
        const auto member = e.expert() / size == group;
        const auto stays = some & member;
        kept[e] = talpa::select(stays, choice[e], kept[e]);
        rank[e] = talpa::select(stays, masked, rank[e]);
      });
    }
    g.for_each([&](auto e) { choice[e] = kept[e]; });
  }

  template <class G, class T, class Scores, class Invalid>
  TALPA_HD void weigh_scores(const G& g, const select_row<T>& row, const Scores& s,
                             const Invalid& invalid) const {
    const auto zero = g.uniform(T{0});
    const auto nan = g.uniform(std::numeric_limits<T>::quiet_NaN());
    const auto factor = g.uniform(static_cast<T>(scale));
    const auto on = g.load_mask(row.recorded());
    auto mass = g.uniform(T{1});
    if constexpr (std::same_as<Weight, gate::renormalised>) {
      mass = g.template sum<T>([&](auto e) { return talpa::select(on(e), s[e], zero); });
    }
    const auto nothing = mass == zero;
    g.store_row(row.gates, [&](auto e) {
      const auto share = talpa::select(nothing, zero, math::mul(factor, s[e] / mass));
      const auto value = talpa::select(invalid, nan, share);
      return talpa::select(on(e), value, zero);
    });
  }
};

static_assert(selector_policy<biased_top_k<>> &&
              selector_policy<biased_top_k<score::softmax, gate::raw>>);

}  // namespace talpa
