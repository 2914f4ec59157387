// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/check.hpp>
#include <talpa/routing/gate_weight.hpp>
#include <talpa/selectors/explain.hpp>

#include <concepts>
#include <limits>

namespace talpa {

/// Selector that turns on the experts whose probability reaches a fixed threshold.
///
/// Forward: S = the experts with p_e >= threshold whose logit is not -inf, p = softmax of the
/// logits; g as Weight says, 0 outside S.
/// Backward (S constant): raw: du_e = p_e (1[e in S] dg_e - sum_{j in S} p_j dg_j) for all e;
/// renormalised and softmax_selected: du_e = g_e (dg_e - sum_{j in S} g_j dg_j).
/// Shapes: logits [N, E] -> gates [N, E], mask [N, ceil(E / 32)].
/// Edges: a threshold above the largest probability selects nothing: the token gets no gate and no
/// gradient; threshold = 0 selects every expert that is not masked; a row with NaN, +inf, or -inf
/// everywhere gets NaN gates on all experts.
/// Cost: 4 passes over the row.
/// Determinism: same bits for every lane group and backend.
/// Throws: value_error from validate.
/// Source: the MoLE that AdaMoLE compares with (arXiv 2405.00361): threshold<gate::renormalised>
/// {.least = 1 / E}. Its code divides a token without experts by 1 in place of the sum 0, with
/// the same gates of 0.
template <class Weight>
struct threshold {
  static constexpr const char* name = "threshold";
  static constexpr bool unit_mass = false;  // a token may have no expert
  static constexpr int thread_registers = std::same_as<Weight, gate::renormalised> ? 72 : 64;

  double least = 0.25;  ///< probability from which an expert is on, 0..1

  void validate(index) const {
    check_value(least >= 0.0 && least <= 1.0, name, "least", least,
                "0..1 = probability from which an expert is on");
  }
  TALPA_HD index max_selected(index experts) const { return experts; }

  template <class G, class T>
  TALPA_HD void select(const G& g, const select_row<T>& row) const {
    const auto masked = g.uniform(-std::numeric_limits<T>::infinity());
    const auto bar = g.uniform(static_cast<T>(least));
    const auto u = row_logits(g, row.logits);
    const auto exponential = exponentials<T>(g, u);
    const auto p = g.quotients(exponential.weight, exponential.sum);
    g.store_mask(row.mask, [&](auto e) {
      const auto offered = u[e] > masked, reaches = p[e] >= bar;
      return exponential.invalid | (offered & reaches);
    });
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

static_assert(selector_policy<threshold<gate::raw>> &&
              selector_policy<threshold<gate::renormalised>>);

}  // namespace talpa
