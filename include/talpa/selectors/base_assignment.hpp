// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/mode.hpp>
#include <talpa/core/workspace.hpp>
#include <talpa/ops/assign_balanced.hpp>
#include <talpa/routing/sigmoid_weight.hpp>
#include <talpa/selectors/explain.hpp>

#include <cstdint>
#include <limits>

namespace talpa {

namespace detail {

/// The expert with the largest logit; the gates are left alone.
struct best_expert {
  static constexpr const char* name = "base_assignment";

  void validate(index) const {}
  template <class G, class T>
  TALPA_HD void select(const G& g, const select_row<T>& row) const {
    const auto masked = g.uniform(-std::numeric_limits<T>::infinity());
    const auto u = row_logits(g, row.logits);
    const auto invalid = row_invalid<T>(g, u);
    const auto best =
        g.template arg_max<T>([&](auto e) { return u[e]; }, [&](auto e) { return u[e] > masked; });
    const auto first = g.uniform(std::int32_t{0});
    const auto chosen = talpa::select(invalid, first, best.expert);
    g.store_mask(row.mask, [&](auto e) { return e.expert() == chosen; });
  }
};

}  // namespace detail

/// Selector that gives every token one expert and every expert the same number of tokens.
///
/// Forward: the assignment with at most ceil(T / E) tokens an expert, T the tokens of the batch
/// that can be routed, whose sum of logits is largest (ops::assign_balanced); g = sigmoid(u) of the
/// assigned expert, 0 elsewhere. At inference each token gets its largest logit, ties to the lower
/// index.
/// Backward (assignment constant): du_e = dg_e sigmoid'(u_e) for the assigned expert, 0 elsewhere.
/// Shapes: logits [N, E] -> gates [N, E], mask [N, ceil(E / 32)].
/// Edges: when E divides T every expert has exactly T / E tokens. An expert with logit -inf is
/// never on, and a token gets no expert when all that it may have are needed by others. Padding and
/// rows with NaN, +inf, or -inf everywhere take no part; the latter get a NaN gate on expert 0.
/// Cost: see ops::assign_balanced; [N, E] scratch.
/// Determinism: same bits for any number of threads; gates also for every lane group.
/// Throws: nothing of its own.
/// Source: Lewis et al. 2021, BASE layers (arXiv 2103.16716). The output there is
/// g f(x) + (1 - g) x: the layer's, not the selector's. The reference solves by an auction, which
/// is exact up to its step, and needs E to divide T; this is exact and does not.
struct base_assignment {
  static constexpr const char* name = "base_assignment";
  static constexpr bool unit_mass = false;
  static constexpr bool couples_rows = true;

  bool greedy = false;  ///< the largest logit of each token, as at inference

  void validate(index) const {}
  TALPA_HD index max_selected(index) const { return 1; }
  /// At inference tokens do not look at each other.
  base_assignment at(mode m) const { return {.greedy = greedy || m == mode::inference}; }

  template <class T, class B>
  void assign(context<B>& ctx, const assign_batch<T, B>& batch,
              matrix_view<std::uint32_t, B> mask) const {
    const typename workspace<B>::scope scope(ctx.scratch);
    const auto unused =
        ctx.scratch.template take<T>(batch.logits.rows, batch.logits.cols);  // [N, E], gates
    ops::select(ctx, detail::best_expert{}, batch.logits, batch.padding_mask, unused, mask);
    if (!greedy) ops::assign_balanced(ctx, batch.logits, batch.padding_mask, mask);
  }

  template <class G, class T>
  TALPA_HD void replay(const G& g, const select_row<T>& row) const {
    weigh_sigmoid(g, row);
  }

  template <class G, class T>
  TALPA_HD void select_backward(const G& g, const select_gradient_row<T>& row) const {
    weigh_sigmoid_backward(g, row);
  }
};

static_assert(selector_policy<base_assignment> && modal_selector<base_assignment>);

}  // namespace talpa
