// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/check.hpp>
#include <talpa/routing/row_softmax.hpp>
#include <talpa/selectors/explain.hpp>

#include <limits>

namespace talpa {

/// Selector that turns on the experts whose probability reaches a threshold learned for each token,
/// and weighs them by how far they are above it.
///
/// Forward: th = relative / E sigmoid(c), c the control of the token; a_e = p_e - th, p = softmax
/// of the logits; on are the experts with a_e >= 0 whose logit is not -inf; g_e = a_e / sum of a
/// over them, 0 elsewhere.
/// Backward (S, the experts that are on, constant): da_e = (dg_e - sum_{j in S} g_j dg_j) / sum of
/// a on S, 0 elsewhere; du_e = p_e (da_e - sum_j p_j da_j); dc = -relative / E sigmoid'(c) sum_e
/// da_e.
/// Shapes: logits [N, E], control [N, 1] -> gates [N, E], mask [N, ceil(E / 32)].
/// Edges: with relative <= 1 the largest p is at least 1 / E, and at least one expert is on up to
/// rounding; a sum of 0 gives gates 0 and no gradient; replay gives experts below the threshold
/// gate 0; a row with NaN, +inf, or -inf everywhere, and a control that is NaN, get NaN gates on
/// all experts.
/// Cost: 6 passes over the row and a sigmoid.
/// Determinism: same bits for every lane group and backend.
/// Throws: value_error from validate.
/// Source: Liu, Luo 2024, AdaMoLE (arXiv 2405.00361): learned_threshold<linear_scorer>{.control =
/// {.bias = true}}. Its code divides by 1 where the sum is 0, and then has a gradient there.
template <class ControlScorer>
struct learned_threshold {
  static constexpr const char* name = "learned_threshold";
  static constexpr bool unit_mass = false;  // a token may have no expert
  static constexpr int thread_registers = 64;
  using control_scorer = ControlScorer;

  double relative = 1.0;    ///< largest threshold in units of 1 / E, in (0, E]
  ControlScorer control{};  ///< makes the number a token that the threshold is made of

  void validate(index experts) const {
    check_value(relative > 0.0 && relative <= static_cast<double>(experts), name, "relative",
                relative, "in (0, experts] = largest threshold in units of 1 / experts");
  }
  TALPA_HD index max_selected(index experts) const { return experts; }

  template <class G, class T>
  TALPA_HD void select(const G& g, const select_row<T>& row) const {
    const auto masked = g.uniform(-std::numeric_limits<T>::infinity());
    const auto zero = g.uniform(T{0});
    const auto u = row_logits(g, row.logits);
    const auto exponential = exponentials<T>(g, u);
    const auto bar = bar_of<T>(g, row.control);
    const auto known = bar == bar;
    const auto invalid = exponential.invalid | !known;
    const auto p = g.quotients(exponential.weight, exponential.sum);
    g.store_mask(row.mask, [&](auto e) {
      const auto offered = u[e] > masked;
      const auto reaches = p[e] - bar >= zero;
      return invalid | (offered & reaches);
    });
    weigh_margins(g, row, exponential.invalid, p, bar);
  }

  template <class G, class T>
  TALPA_HD void replay(const G& g, const select_row<T>& row) const {
    const auto exponential = exponentials<T>(g, row_logits(g, row.logits));
    weigh_margins(g, row, exponential.invalid, g.quotients(exponential.weight, exponential.sum),
                  bar_of<T>(g, row.control));
  }

  template <class G, class T>
  TALPA_HD void select_backward(const G& g, const select_gradient_row<T>& row) const {
    const auto zero = g.uniform(T{0});
    const auto p = probabilities<T>(g, exponentials<T>(g, row_logits(g, row.logits)));
    const auto bar = bar_of<T>(g, row.control);
    const auto counts = [&](auto e) {
      const auto below = p[e] - bar < zero;
      return g.load_bit(row.mask, e) & !below;
    };
    const auto sum =
        g.template sum<T>([&](auto e) { return talpa::select(counts(e), p[e] - bar, zero); });
    const auto nothing = sum == zero;
    const auto dgate = [&](auto e) {
      return talpa::select(counts(e), g.load(row.dgates, e, T{0}), zero);
    };
    const auto mean = g.template sum<T>([&](auto e) {
      return talpa::select(counts(e), math::mul(g.load(row.gates, e, T{0}), dgate(e)), zero);
    });
    auto dmargin = g.template elements<T>();
    g.for_each([&](auto e) {
      const auto leaves = counts(e) & !nothing;
      dmargin[e] = talpa::select(leaves, (dgate(e) - mean) / sum, zero);
    });
    const auto fall = g.template sum<T>([&](auto e) { return math::mul(p[e], dmargin[e]); });
    g.store_row(row.dlogits, [&](auto e) { return math::mul(p[e], dmargin[e] - fall); });
    const auto all = g.template sum<T>([&](auto e) { return dmargin[e]; });
    const auto slope = math::mul(largest<T>(g), math::sigmoid_derivative(g.load(row.control)));
    g.store(row.dcontrol, -math::mul(slope, all));
  }

 private:
  template <class T, class G>
  TALPA_HD auto largest(const G& g) const {
    return g.uniform(static_cast<T>(relative / static_cast<double>(g.experts())));
  }
  template <class T, class G>
  TALPA_HD auto bar_of(const G& g, row_scalar<const T> c) const {
    return math::mul(largest<T>(g), math::sigmoid(g.load(c)));
  }
  /// p: the probabilities, anything for an invalid row.
  template <class G, class T, class Invalid, class Probabilities, class Bar>
  TALPA_HD static void weigh_margins(const G& g, const select_row<T>& row, const Invalid& unknown,
                                     const Probabilities& p, const Bar& bar) {
    const auto zero = g.uniform(T{0});
    const auto nan = g.uniform(std::numeric_limits<T>::quiet_NaN());
    const auto on = g.load_mask(row.recorded());
    auto margin = g.template elements<T>();
    g.for_each([&](auto e) {
      const auto a = p[e] - bar;
      const auto above = a > zero;
      margin[e] = talpa::select(above & on(e), a, zero);
    });
    const auto sum = g.template sum<T>([&](auto e) { return margin[e]; });
    const auto known = bar == bar, nothing = sum == zero;
    const auto invalid = unknown | !known;
    const auto share = g.quotients(margin, sum);
    g.store_row(row.gates, [&](auto e) {
      return talpa::select(on(e) & invalid, nan, talpa::select(nothing, zero, share[e]));
    });
  }
};

}  // namespace talpa
