// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/routing/gate_weight.hpp>
#include <talpa/selectors/explain.hpp>

#include <limits>

namespace talpa {

/// Selector that turns on every expert, weighted by softmax.
///
/// Forward: g = p = softmax(u). Backward: du_e = p_e (dg_e - sum_j p_j dg_j).
/// Shapes: logits [N, E] -> gates [N, E], mask [N, ceil(E / 32)].
/// Edges: an expert with logit -inf is off; E = 1 has gate 1 and zero gradient; a row with NaN,
/// +inf, or -inf everywhere gets NaN gates on all experts. In replay g = p on the recorded mask.
/// Cost: three passes over the row; nothing is saved beside logits, gates and mask.
/// Determinism: same bits for every lane group and backend.
/// Throws: nothing.
/// Source: the soft mixture of LoRAMoE (arXiv 2312.09979) and HydraLoRA (arXiv 2404.19245).
struct dense {
  static constexpr const char* name = "dense";
  static constexpr bool unit_mass = true;
  static constexpr int thread_registers = 64;

  void validate(index) const {}
  TALPA_HD index max_selected(index experts) const { return experts; }

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

  template <class G, class T>
  TALPA_HD void replay(const G& g, const select_row<T>& row) const {
    weigh<gate::raw>(g, row, exponentials<T>(g, row_logits(g, row.logits)));
  }

  template <class G, class T>
  TALPA_HD void select_backward(const G& g, const select_gradient_row<T>& row) const {
    weigh_backward<gate::raw>(g, row);
  }
};

static_assert(selector_policy<dense>);

}  // namespace talpa
