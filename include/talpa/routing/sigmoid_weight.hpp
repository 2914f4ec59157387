// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/routing/row_softmax.hpp>

#include <limits>

namespace talpa {

/// Writes the gates of a row whose mask is S, each from its own logit: g_e = sigmoid(u_e) on S, 0
/// elsewhere, NaN on S for a row that cannot be routed.
template <class G, class T>
TALPA_HD void weigh_sigmoid(const G& g, const select_row<T>& row) {
  const auto zero = g.uniform(T{0});
  const auto nan = g.uniform(std::numeric_limits<T>::quiet_NaN());
  const auto u = row_logits(g, row.logits);
  const auto invalid = row_invalid<T>(g, u);
  const auto on = g.load_mask(row.recorded());
  g.store_row(row.gates, [&](auto e) {
    const auto value = talpa::select(invalid, nan, math::sigmoid(u[e]));
    return talpa::select(on(e), value, zero);
  });
}

/// Backward of weigh_sigmoid with S constant: du_e = dg_e sigmoid'(u_e) on S, 0 elsewhere.
template <class G, class T>
TALPA_HD void weigh_sigmoid_backward(const G& g, const select_gradient_row<T>& row) {
  const auto zero = g.uniform(T{0});
  g.for_each([&](auto e) {
    const auto slope = math::sigmoid_derivative(g.load(row.logits, e, T{0}));
    const auto value = math::mul(g.load(row.dgates, e, T{0}), slope);
    g.store(row.dlogits, e, talpa::select(g.load_bit(row.mask, e), value, zero));
  });
}

}  // namespace talpa
