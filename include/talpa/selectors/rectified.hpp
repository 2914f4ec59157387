// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/routing/row_softmax.hpp>
#include <talpa/selectors/explain.hpp>

#include <limits>

namespace talpa {

/// Selector that turns on the experts with a positive logit, which is their gate.
///
/// Forward: S = the experts with u_e > 0; g_e = u_e on S, 0 elsewhere.
/// Backward (S constant): du_e = dg_e on S where u_e > 0, 0 elsewhere.
/// Shapes: logits [N, E] -> gates [N, E], mask [N, ceil(E / 32)].
/// Edges: a token may have no expert, and then gets no gradient; a logit of 0 is off; -inf is
/// legal; a row with NaN, +inf, or -inf everywhere gets NaN gates on all experts.
/// Cost: 4 passes over the row.
/// Determinism: same bits for every lane group and backend.
/// Throws: nothing.
/// Source: Wang et al. 2024, ReMoE (arXiv 2412.14711). How many experts are on is steered by an L1
/// loss whose coefficient follows a target: sparsity_controller (optim/sparsity_controller.hpp).
struct rectified {
  static constexpr const char* name = "rectified";
  static constexpr bool unit_mass = false;

  void validate(index) const {}
  TALPA_HD index max_selected(index experts) const { return experts; }

  template <class G, class T>
  TALPA_HD void select(const G& g, const select_row<T>& row) const {
    const auto zero = g.uniform(T{0});
    const auto u = row_logits(g, row.logits);
    const auto invalid = row_invalid<T>(g, u);
    g.store_mask(row.mask, [&](auto e) {
      const auto positive = u[e] > zero;
      return invalid | positive;
    });
    weigh_rectified(g, row, u, invalid);
  }

  template <class G, class T>
  TALPA_HD void replay(const G& g, const select_row<T>& row) const {
    const auto u = row_logits(g, row.logits);
    weigh_rectified(g, row, u, row_invalid<T>(g, u));
  }

  template <class G, class T>
  TALPA_HD void select_backward(const G& g, const select_gradient_row<T>& row) const {
    const auto zero = g.uniform(T{0});
    const auto u = g.load_row(row.logits, T{0}), dgate = g.load_row(row.dgates, T{0});
    const auto on = g.load_mask(row.mask);
    g.store_row(row.dlogits, [&](auto e) {
      const auto positive = u[e] > zero;
      return talpa::select(on(e) & positive, dgate[e], zero);
    });
  }

 private:
  template <class G, class T, class Logits, class Invalid>
  TALPA_HD static void weigh_rectified(const G& g, const select_row<T>& row, const Logits& u,
                                       const Invalid& invalid) {
    const auto zero = g.uniform(T{0});
    const auto nan = g.uniform(std::numeric_limits<T>::quiet_NaN());
    const auto on = g.load_mask(row.recorded());
    g.store_row(row.gates, [&](auto e) {
      const auto positive = u[e] > zero;
      const auto value = talpa::select(invalid, nan, talpa::select(positive, u[e], zero));
      return talpa::select(on(e), value, zero);
    });
  }
};

static_assert(selector_policy<rectified>);

}  // namespace talpa
