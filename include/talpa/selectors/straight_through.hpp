// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/check.hpp>
#include <talpa/routing/first_k.hpp>
#include <talpa/routing/gate_weight.hpp>
#include <talpa/selectors/explain.hpp>

#include <cstdint>
#include <limits>

namespace talpa {

/// Selector that turns the k experts with the largest logits on and the others off, and trains the
/// router as if the gates were probabilities.
///
/// Forward: g_e = 1 for the first k experts in the order (logit descending, index ascending) among
/// those whose logit is not -inf, 0 for the others.
/// Backward: not the derivative, which is zero, but that of p = softmax(u) in the place of g:
/// du_e = p_e (m_e dg_e - sum_j p_j m_j dg_j) for all e, m the mask. It takes the gradients of
/// gates that are 0 too. So in training every expert that is offered has its bit in the mask; at
/// inference only those with gate 1 have, and selection and gates are those of top_k<gate::hard>.
/// Shapes: logits [N, E] -> gates [N, E], mask [N, ceil(E / 32)].
/// Edges: fewer than k finite logits select those; in training a mask that is replayed names the
/// experts to choose the k from; a loss that counts bits of the mask counts all in training; a row
/// with NaN, +inf, or -inf everywhere gets NaN gates on experts 0..k-1, in training on all.
/// Cost: k + 3 passes over the row. In training all E experts work for every token.
/// Determinism: same bits for every lane group and backend.
/// Throws: value_error from validate.
/// Source: straight-through estimator, Bengio et al. 2013 (arXiv 1308.3432); the option hard=False
/// of the gate of FactorLLM (arXiv 2408.11855), which its released forward does not take.
struct straight_through {
  static constexpr const char* name = "straight_through";
  static constexpr bool unit_mass = false;
  static constexpr int thread_registers = 80;

  index k = 2;           ///< experts per token, 1..E
  bool training = true;  ///< false: the hard choice alone, as at inference

  void validate(index experts) const { check_range(name, "k", k, 1, experts, "experts"); }
  TALPA_HD index max_selected(index experts) const { return training ? experts : k; }
  TALPA_HD straight_through at(mode m) const { return {k, training && m == mode::training}; }

  template <class G, class T>
  TALPA_HD void select(const G& g, const select_row<T>& row) const {
    const auto masked = g.uniform(-std::numeric_limits<T>::infinity());
    const auto u = row_logits(g, row.logits);
    const auto invalid = row_invalid<T>(g, u);
    if (training) {
      g.store_mask(row.mask, [&](auto e) {
        const auto offered = u[e] > masked;
        return offered | invalid;
      });
    } else {
      const auto logit = [&](auto e) { return u[e]; };
      store_first_k<T>(g, row.mask, k, g.template top<T>(k, logit).last, invalid, logit);
    }
    weigh_hard(g, row, u, invalid);
  }

  template <class G, class T>
  TALPA_HD void replay(const G& g, const select_row<T>& row) const {
    const auto u = row_logits(g, row.logits);
    weigh_hard(g, row, u, row_invalid<T>(g, u));
  }

  template <class G, class T>
  TALPA_HD void select_backward(const G& g, const select_gradient_row<T>& row) const {
    weigh_backward<gate::raw>(g, row);
  }

 private:
  /// 1 for the best k experts of the mask in training, for all of it at inference.
  template <class G, class T, class Logits, class Invalid>
  TALPA_HD void weigh_hard(const G& g, const select_row<T>& row, const Logits& u,
                           const Invalid& invalid) const {
    const auto zero = g.uniform(T{0}), one = g.uniform(T{1});
    const auto nan = g.uniform(std::numeric_limits<T>::quiet_NaN());
    const auto on = g.load_mask(row.recorded());
    const auto write = [&](auto chosen) {
      g.store_row(row.gates, [&](auto e) {
        const auto bit = on(e);
        const auto value = talpa::select(bit & chosen(e), one, zero);
        return talpa::select(bit & invalid, nan, value);
      });
    };
    if (training) {
      const auto never = g.uniform(-std::numeric_limits<T>::infinity());
      const auto end = first_k<T>(g, k, [&](auto e) {
        const auto open = on(e);
        return talpa::select(open, u[e], never);
      });
      write([&](auto e) { return end.holds(u[e], e); });
    } else {
      write([&](auto) { return !invalid; });
    }
  }
};

static_assert(selector_policy<straight_through>);

}  // namespace talpa
