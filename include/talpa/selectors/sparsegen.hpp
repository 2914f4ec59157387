// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/check.hpp>
#include <talpa/routing/sparse_projection.hpp>
#include <talpa/selectors/explain.hpp>

#include <cmath>

namespace talpa {

/// Selector whose gates are the sparse projection of the logits (sparsegen), with a sharpness
/// lambda that is learned for each token.
///
/// Forward: 1 - lambda = softplus(-c) + epsilon, c the control of the token, that is lambda =
/// logsigmoid(c) + 1 - epsilon; g_e = max(u_e - tau, 0) / (1 - lambda), with tau such that they sum
/// to one; on are the experts with g_e > 0, at least one, the more the smaller lambda is.
/// Backward (A, the n experts with g_e > 0, constant; m = sum_{j in A} dg_j / n): du_e = (dg_e - m)
/// / (1 - lambda) on A, 0 elsewhere; dlambda = (sum_{j in A} g_j dg_j - m) / (1 - lambda); dc =
/// sigmoid(-c) dlambda.
/// Shapes: logits [N, E], control [N, 1] -> gates [N, E], mask [N, ceil(E / 32)].
/// Edges: a logit at tau is off; equal logits give 1 / E each for every lambda, and dc = 0 up to
/// rounding; E = 1 gives gate 1 and gradient 0; replay projects among the experts of the mask, of
/// which some may get 0; a row with NaN, +inf, or -inf everywhere, and a control that is NaN or
/// -inf, get NaN gates on all experts.
/// Cost: 5 passes over the row, and 4 more each time that experts are dropped, at most E - 1 times.
/// Determinism: same bits for every lane group and backend.
/// Throws: value_error from validate.
/// Source: Zhuang et al. 2025, LD-MoLE (arXiv 2509.25684): sparsegen<mlp_scorer<>>; projection by
/// Laha et al. 2018 (arXiv 1810.11975). The code sorts, forms 1 - lambda by subtracting and clamps
/// it at epsilon; written as here it cannot be less.
template <class ControlScorer>
struct sparsegen {
  static constexpr const char* name = "sparsegen";
  static constexpr bool unit_mass = true;
  using control_scorer = ControlScorer;

  double epsilon = 0.01;    ///< least 1 - lambda, in (0, 1]
  ControlScorer control{};  ///< makes the number a token that lambda is made of

  void validate(index) const {
    check_value(epsilon > 0.0 && epsilon <= 1.0, name, "epsilon", epsilon,
                "in (0, 1] = least 1 - lambda");
  }
  TALPA_HD index max_selected(index experts) const { return experts; }

  template <class G, class T>
  TALPA_HD void select(const G& g, const select_row<T>& row) const {
    select_projection(g, row, size<T>(g, row.control));
  }
  template <class G, class T>
  TALPA_HD void replay(const G& g, const select_row<T>& row) const {
    replay_projection(g, row, size<T>(g, row.control));
  }
  template <class G, class T>
  TALPA_HD void select_backward(const G& g, const select_gradient_row<T>& row) const {
    const auto dsize = projection_backward(g, row, size<T>(g, row.control));
    g.store(row.dcontrol, -math::mul(dsize, math::sigmoid(-g.load(row.control))));
  }

 private:
  template <class T, class G>
  TALPA_HD typename G::template value<T> size(const G& g, row_scalar<const T> c) const {
    return math::softplus(-g.load(c)) + g.uniform(static_cast<T>(epsilon));
  }
};

/// Selector whose gates are the sparse projection of the logits with a given sharpness: sparsemax
/// for lambda = 0.
///
/// Forward and backward: as sparsegen, with lambda constant and no control.
/// Shapes: logits [N, E] -> gates [N, E], mask [N, ceil(E / 32)].
/// Edges: as sparsegen; lambda near 1 gives the best expert alone, very negative ones all.
/// Cost, determinism: as sparsegen.
/// Throws: value_error from validate.
/// Source: Martins, Astudillo 2016 (arXiv 1602.02068); Laha et al. 2018 (arXiv 1810.11975).
struct fixed_sparsegen {
  static constexpr const char* name = "fixed_sparsegen";
  static constexpr bool unit_mass = true;

  double lambda = 0.0;  ///< sharpness, finite and < 1

  void validate(index) const {
    check_value(std::isfinite(lambda) && lambda < 1.0, name, "lambda", lambda,
                "a finite number < 1");
  }
  TALPA_HD index max_selected(index experts) const { return experts; }

  template <class G, class T>
  TALPA_HD void select(const G& g, const select_row<T>& row) const {
    select_projection(g, row, g.uniform(static_cast<T>(1.0 - lambda)));
  }
  template <class G, class T>
  TALPA_HD void replay(const G& g, const select_row<T>& row) const {
    replay_projection(g, row, g.uniform(static_cast<T>(1.0 - lambda)));
  }
  template <class G, class T>
  TALPA_HD void select_backward(const G& g, const select_gradient_row<T>& row) const {
    projection_backward(g, row, g.uniform(static_cast<T>(1.0 - lambda)));
  }
};

static_assert(selector_policy<fixed_sparsegen>);

}  // namespace talpa
