// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/check.hpp>
#include <talpa/core/workspace.hpp>
#include <talpa/ops/limit_experts.hpp>
#include <talpa/routing/gate_weight.hpp>
#include <talpa/selectors/explain.hpp>

#include <cmath>
#include <cstdint>
#include <limits>

namespace talpa {

namespace detail {

/// Every expert that is not masked, with its probability.
struct every_candidate {
  static constexpr const char* name = "expert_choice";

  void validate(index) const {}
  template <class G, class T>
  TALPA_HD void select(const G& g, const select_row<T>& row) const {
    const auto masked = g.uniform(-std::numeric_limits<T>::infinity());
    const auto u = row_logits(g, row.logits);
    const auto exponential = exponentials<T>(g, u);
    g.store_mask(row.mask, [&](auto e) {
      const auto offered = u[e] > masked;
      return exponential.invalid | offered;
    });
    weigh<gate::raw>(g, row, exponential);
  }
};

/// max(1, floor(tokens factor / experts)), no more than there are tokens.
struct fair_places {
  double factor;
  index experts;
  TALPA_HD index operator()(index tokens) const {
    const double most =
        ::floor(static_cast<double>(tokens) * factor / static_cast<double>(experts));
    if (most < 1.0) return 1;
    return most < static_cast<double>(tokens) ? static_cast<index>(most) : tokens;
  }
};

}  // namespace detail

/// Selector in which experts choose tokens: each takes the c that like it most.
///
/// Forward: p = softmax of each token's logits over the experts; expert e takes the c tokens with
/// the largest p_ne, among equal ones the earlier; g_ne = p_ne where it is taken, 0 elsewhere.
/// c = max(1, floor(T factor / E)), T the tokens of the batch that can be routed.
/// Backward (masks constant): du_e = p_e (m_e dg_e - sum_j p_j m_j dg_j) for all e, m the mask.
/// Shapes: logits [N, E] -> gates [N, E], mask [N, ceil(E / 32)].
/// Edges: a token may have 0 to E experts; c >= T takes all. Padding and rows with NaN, +inf, or
/// -inf everywhere take no part; the latter get NaN gates on all experts. A token with logit -inf
/// is never taken, even if places stay free. The choice looks at later tokens of a sequence: it is
/// not causal.
/// Cost: softmax of the rows, [N, E] scratch, a selection in O(N) an expert.
/// Determinism: same bits for every lane group and any number of threads.
/// Throws: value_error from validate.
/// Source: Zhou et al. 2022 (arXiv 2202.09368), equations 1 to 3. The paper leaves open how c is
/// rounded, and ties; c >= 1 keeps small batches from having no expert at all. Its regularised
/// form, which bounds the experts of a token, is not part of this.
struct expert_choice {
  static constexpr const char* name = "expert_choice";
  static constexpr bool unit_mass = false;
  static constexpr bool couples_rows = true;

  double factor = 2.0;  ///< mean number of experts per token, > 0

  void validate(index) const {
    check_value(factor > 0.0 && std::isfinite(factor), name, "factor", factor,
                "> 0 and finite = mean number of experts per token");
  }
  TALPA_HD index max_selected(index experts) const { return experts; }

  template <class T, class B>
  void assign(context<B>& ctx, const assign_batch<T, B>& batch,
              matrix_view<std::uint32_t, B> mask) const {
    const index experts = batch.logits.cols;
    const typename workspace<B>::scope scope(ctx.scratch);
    const auto p = ctx.scratch.template take<T>(batch.logits.rows, experts);  // [N, E]
    ops::select(ctx, detail::every_candidate{}, batch.logits, batch.padding_mask, p, mask);
    const detail::fair_places places{factor, experts};
    ops::limit_experts(ctx, matrix_view<const T, B>(p), batch.padding_mask, 0, places,
                       limit_order::score, mask);
  }

  template <class G, class T>
  TALPA_HD void replay(const G& g, const select_row<T>& row) const {
    weigh<gate::raw>(g, row, exponentials<T>(g, row_logits(g, row.logits)));
  }

  template <class G, class T>
  TALPA_HD void select_backward(const G& g, const select_gradient_row<T>& row) const {
    weigh_backward<gate::raw>(g, row);
  }
};

static_assert(selector_policy<expert_choice>);

}  // namespace talpa
