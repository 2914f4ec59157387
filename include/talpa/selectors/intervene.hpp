// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/check.hpp>
#include <talpa/core/workspace.hpp>
#include <talpa/routing/expert_set.hpp>
#include <talpa/routing/row_softmax.hpp>
#include <talpa/selectors/explain.hpp>

#include <concepts>
#include <cstdint>
#include <limits>
#include <string>

namespace talpa {

namespace detail {

/// What intervene does to one row of logits.
template <class G, class T>
struct intervention {
  row_pointer<const T> logits;
  row_pointer<const std::uint32_t> blocked, stimulated;
  /// The best expert that is not blocked, and its logit; -1 and -inf without one.
  expert_value<typename G::template value<T>, typename G::template value<std::int32_t>> best;

  TALPA_HD intervention(const G& g, row_pointer<const T> u, const expert_set& block,
                        const expert_set& stimulate)
      : logits(u),
        blocked(block.row()),
        stimulated(stimulate.row()),
        best(g.template arg_max<T>([&](auto e) { return open(g, e); },
                                   [&](auto e) { return open(g, e) > g.uniform(-infinity); })) {}

  /// The logit of expert e as the inner selector sees it. NaN and +inf stay what they are.
  template <class E>
  TALPA_HD typename G::template value<T> operator()(const G& g, E e) const {
    const auto u = open(g, e);
    const auto offered = u > g.uniform(-infinity), finite = u < g.uniform(infinity);
    const auto raised = g.load_bit(stimulated, e) & offered;
    return talpa::select(raised & finite, best.value, u);
  }

 private:
  static constexpr T infinity = std::numeric_limits<T>::infinity();

  /// The logit of expert e, -inf where it is blocked.
  template <class E>
  TALPA_HD typename G::template value<T> open(const G& g, E e) const {
    const auto u = g.load(logits, e, -infinity);
    const auto finite = u < g.uniform(infinity);
    return talpa::select(g.load_bit(blocked, e) & finite, g.uniform(-infinity), u);
  }
};

/// A lane group that reads other logits than lie in memory.
template <class G, class T>
class intervened_group : public G {
 public:
  TALPA_HD intervened_group(const G& g, const intervention<G, T>& change)
      : G(g), change_(&change) {}

  template <class U, class E>
  TALPA_HD typename G::template value<U> load(row_pointer<const U> row, E e, U fill) const {
    if constexpr (std::same_as<T, U>) {
      if (row.data == change_->logits.data) return (*change_)(*this, e);  // reads by G itself
    }
    return G::load(row, e, fill);
  }
  template <class U>
  TALPA_HD typename G::template value<U> load(row_scalar<const U> scalar) const {
    return G::load(scalar);
  }
  template <class U>
  TALPA_HD auto load_row(row_pointer<const U> row, U fill) const {
    auto all = G::load_row(row, fill);
    if constexpr (std::same_as<T, U>) {
      if (row.data == change_->logits.data) {
        G::for_each([&](auto e) { all[e] = (*change_)(*this, e); });
      }
    }
    return all;
  }

 private:
  const intervention<G, T>* change_;
};

/// Writes the changed logits where gates would be.
struct intervened_logits {
  static constexpr const char* name = "intervene";
  expert_set blocked, stimulated;  // themselves: a device does not read the host's memory

  void validate(index) const {}
  template <class G, class T>
  TALPA_HD void select(const G& g, const select_row<T>& row) const {
    const intervention<G, T> change(g, row.logits, blocked, stimulated);
    g.for_each([&](auto e) { g.store(row.gates, e, change(g, e)); });
    const auto none = g.uniform(T{0}) > g.uniform(T{0});
    g.store_mask(row.mask, [&](auto) { return none; });
  }
};

}  // namespace detail

/// Selector that blocks or stimulates experts before the selector Inner looks at the logits: what
/// does a model lose without them, what does it gain with them.
///
/// Forward: v_e = -inf for blocked experts; v_e = max over experts that are not blocked of u for
/// stimulated ones; v_e = u_e for the others; gates and mask are Inner's for v. In probabilities:
/// those of blocked experts are 0 and the others share the rest; those of stimulated experts are
/// set to the largest one of the row, and the row is divided by its sum.
/// Backward (masks constant): dv from Inner; du_e = 0 for blocked and stimulated experts; the
/// maximum is the logit of the best expert m (lowest index among ties), which gets du_m = dv_m +
/// sum of dv over the stimulated experts (dv_m counts once if m is one of them). A control gets
/// Inner's.
/// Shapes: logits [N, E] -> gates [N, E], mask [N, ceil(E / 32)]; E <= 1024.
/// Edges: a stimulated expert ties with the best one, and ties go to the lower index; one whose
/// logit is -inf stays off. Where all that is left of a row is blocked or -inf, the row is one of
/// -inf everywhere, with Inner's NaN gates; NaN or +inf stays even where it is blocked. Losses and
/// statistics see the logits u as the scorer made them. A bias still enters the choice after that.
/// Cost: Inner, one pass more, and two bits an expert and read of a logit; round an Inner that
/// couples rows one [N, E] scratch and mask.
/// Determinism: same bits for every lane group and backend.
/// Throws: value_error from validate, of Inner too.
/// Source: the causal tests of Router Lens (its modelling code of OLMoE): block before softmax,
/// then stimulate, then top-k. There it can revive experts that are blocked; here they are refused.
template <class Inner>
struct intervene {
  static_assert(detail::explain_selector<Inner>());

  static constexpr const char* name = "intervene";
  static constexpr bool unit_mass = Inner::unit_mass;
  static constexpr bool has_bias = biased_selector<Inner>;
  static constexpr bool couples_rows = coupled_selector<Inner>;
  using control_scorer = typename detail::control_scorer_type<Inner>::type;

  Inner inner{};            ///< selector that sees the changed logits
  expert_set blocked{};     ///< experts that no token gets; not all of them
  expert_set stimulated{};  ///< experts raised to the best of a row; none that is blocked

  void validate(index experts) const {
    check_range(name, "experts", experts, 1, expert_set::capacity, "experts that a set can hold");
    for (index e = 0; e < expert_set::capacity; ++e) {
      if (blocked.has(e)) check_range(name, "blocked", e, 0, experts - 1, "experts");
      if (!stimulated.has(e)) continue;
      check_range(name, "stimulated", e, 0, experts - 1, "experts");
      if (blocked.has(e)) {
        detail::throw_value(name, "stimulated", std::to_string(e), "an expert that is not blocked");
      }
    }
    check_range(name, "blocked.size()", blocked.size(), 0, experts - 1, "experts but one");
    inner.validate(experts);
  }
  TALPA_HD index max_selected(index experts) const { return inner.max_selected(experts); }
  TALPA_HD intervene at(mode m) const {
    intervene s = *this;
    s.inner = selector_at(inner, m);
    return s;
  }

  template <class G, class T>
  TALPA_HD void select(const G& g, const select_row<T>& row) const requires(!couples_rows) {
    const detail::intervention<G, T> change(g, row.logits, blocked, stimulated);
    inner.select(detail::intervened_group<G, T>(g, change), row);
  }

  template <class T, class B>
  void assign(context<B>& ctx, const assign_batch<T, B>& batch,
              matrix_view<std::uint32_t, B> mask) const requires(couples_rows) {
    const typename workspace<B>::scope scope(ctx.scratch);
    const auto changed =
        ctx.scratch.template take<T>(batch.logits.rows, batch.logits.cols);  // [N, E]
    ops::select(ctx, detail::intervened_logits{blocked, stimulated}, batch.logits,
                batch.padding_mask, changed, mask);
    inner.assign(ctx, assign_batch<T, B>{changed, batch.padding_mask, batch.more}, mask);
  }

  template <class G, class T>
  TALPA_HD void replay(const G& g, const select_row<T>& row) const {
    const detail::intervention<G, T> change(g, row.logits, blocked, stimulated);
    inner.replay(detail::intervened_group<G, T>(g, change), row);
  }

  template <class G, class T>
  TALPA_HD void select_backward(const G& g, const select_gradient_row<T>& row) const {
    const detail::intervention<G, T> change(g, row.logits, blocked, stimulated);
    inner.select_backward(detail::intervened_group<G, T>(g, change), row);
    const auto zero = g.uniform(T{0});
    const row_pointer<const T> stored{row.dlogits.data, row.dlogits.stride};
    const auto raised = [&](auto e) { return g.load_bit(change.stimulated, e); };
    const auto from_raised = g.template sum<T>(
        [&](auto e) { return talpa::select(raised(e), g.load(stored, e, T{0}), zero); });
    g.for_each([&](auto e) {
      const auto best = e.expert() == change.best.expert;
      const auto up = raised(e), shut = g.load_bit(change.blocked, e);
      const auto own = talpa::select(up | shut, zero, g.load(stored, e, T{0}));
      g.store(row.dlogits, e, own + talpa::select(best, from_raised, zero));
    });
  }
};

}  // namespace talpa
