// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/check.hpp>
#include <talpa/core/workspace.hpp>
#include <talpa/ops/overlay_rows.hpp>
#include <talpa/routing/entropy.hpp>
#include <talpa/routing/row_softmax.hpp>
#include <talpa/selectors/explain.hpp>

#include <cstdint>
#include <limits>

namespace talpa {

/// How many tokens of a sequence may be broadcast.
namespace slots {

/// All that are unsure.
struct unlimited {
  static constexpr bool limited = false;

  void validate(const char*) const {}
};
/// The first `most` of a sequence, in the order of positions; padding takes none.
struct per_sequence {
  static constexpr bool limited = true;
  index most = 8;  ///< tokens of a sequence, >= 0

  void validate(const char* name) const {
    check_at_least(name, "slots.most", most, 0, "tokens of a sequence that may be broadcast");
  }
};

}  // namespace slots

namespace detail {

/// Which rows of a batch a mask of every expert is for.
enum class row_kind { unsure, invalid };

/// Turns on every expert of the rows of one kind, and none of the others.
template <class Entropy>
struct every_expert {
  static constexpr const char* name = "broadcast";
  Entropy entropy;
  double threshold;
  row_kind kind;

  void validate(index) const {}
  template <class G, class T>
  TALPA_HD void select(const G& g, const select_row<T>& row) const {
    const auto masked = g.uniform(-std::numeric_limits<T>::infinity());
    const auto u = row_logits(g, row.logits);
    if (kind == row_kind::invalid) {
      const auto bad = row_invalid<T>(g, u);
      g.store_mask(row.mask, [&](auto) { return bad; });
    } else {
      const auto exponential = exponentials<T>(g, u);
      const auto h = entropy.template value<T>(g, log_probabilities<T>(g, u, exponential));
      const auto unsure = h >= g.uniform(static_cast<T>(threshold));
      g.store_mask(row.mask, [&](auto e) {
        const auto offered = u[e] > masked;
        return offered & (unsure & exponential.valid);
      });
    }
  }
};

}  // namespace detail

/// Selector that sends tokens of which the router is unsure to all experts while training, and
/// leaves the others, and inference, to the selector Inner.
///
/// Forward: a token with H(softmax(u_n)) >= threshold gets every expert whose logit is not -inf and
/// the gates g = softmax(u_n); any other token what Inner gives it. With slots::per_sequence no
/// more than `slots.most` tokens of a sequence are broadcast, the first ones. H as Entropy says
/// (entropy::shannon, tsallis, renyi; routing/entropy.hpp). At inference Inner alone.
/// Backward (masks constant): of a token that was broadcast du_e = g_e (dg_e - sum_j g_j dg_j) and
/// nothing to a control; of the others Inner's.
/// Shapes: logits [N, E] -> gates [N, E], mask [N, ceil(E / 32)].
/// Edges: threshold 0 broadcasts all that the slots allow; E = 1 has H = 0; a row with NaN, +inf,
/// or -inf everywhere gets NaN gates on all experts while broadcasting and takes no slot. The mask
/// says who was broadcast: in replay and backward a token is one of them exactly when its mask has
/// every expert that is offered and H >= threshold, so where Inner itself gives an unsure token all
/// experts, that token has the gates softmax(u_n) in any case.
/// Cost: Inner, and a softmax and the entropy a row; with a limit, or round an Inner that couples
/// rows, two [N, ceil(E / 32)] masks and one [N, E] scratch more.
/// Determinism: same bits for every lane group and backend.
/// Throws: value_error from validate, of Inner too.
/// Source: GW-MoE (arXiv 2406.12375). The paper compares the entropy as a part of ln E, the default
/// here; the code compares nats with 1e-5 inside the logarithm: .entropy = {.log_epsilon = 1e-5,
/// .normalised = false}. The released code sums over experts wrongly (the token reaches none of
/// them); the method as published is implemented. Its negative number of slots, which broadcasts
/// nothing, is out of range here.
template <class Inner, class Entropy = entropy::shannon, class Slots = slots::unlimited>
struct broadcast {
  static_assert(detail::explain_selector<Inner>());

  static constexpr const char* name = "broadcast";
  static constexpr bool unit_mass = Inner::unit_mass;
  static constexpr int thread_registers = 168;
  static constexpr bool has_bias = biased_selector<Inner>;
  static constexpr bool couples_rows = coupled_selector<Inner> || Slots::limited;
  using control_scorer = typename detail::control_scorer_type<Inner>::type;

  Inner inner{};             ///< selector of the tokens that are not broadcast
  double threshold = 0.8;    ///< entropy from which on a token is broadcast, >= 0
  Entropy entropy{};         ///< kind and its index
  Slots slots{};             ///< how many tokens may be broadcast
  bool broadcasting = true;  ///< false: Inner alone, as at inference

  void validate(index experts) const {
    check_value(threshold >= 0.0, name, "threshold", threshold,
                ">= 0 = entropy from which on a token is broadcast");
    entropy.validate(name);
    slots.validate(name);
    inner.validate(experts);
  }
  TALPA_HD index max_selected(index experts) const {
    return broadcasting ? experts : inner.max_selected(experts);
  }
  TALPA_HD broadcast at(mode m) const {
    broadcast s = *this;
    s.inner = selector_at(inner, m);
    s.broadcasting = broadcasting && m == mode::training;
    return s;
  }

  template <class G, class T>
  TALPA_HD void select(const G& g, const select_row<T>& row) const requires(!couples_rows) {
    inner.select(g, row);
    if (!broadcasting) return;
    const auto masked = g.uniform(-std::numeric_limits<T>::infinity());
    const auto u = row_logits(g, row.logits);
    const auto exponential = exponentials<T>(g, u);
    const auto p = log_probabilities<T>(g, u, exponential);
    const auto broadcasts = unsure<T>(g, p) & exponential.valid;
    auto chosen = g.template elements<bool>();
    const auto on = g.load_mask(row.recorded());
    g.for_each([&](auto e) { chosen[e] = on(e); });
    g.store_mask(row.mask, [&](auto e) {
      const auto offered = u[e] > masked;
      return ((broadcasts & offered) | (chosen[e] & !broadcasts)) | exponential.invalid;
    });
    store_gates(g, row, probabilities<T>(g, exponential), broadcasts | exponential.invalid);
  }

  template <class T, class B>
  void assign(context<B>& ctx, const assign_batch<T, B>& batch,
              matrix_view<std::uint32_t, B> mask) const requires(couples_rows) {
    const index tokens = batch.logits.rows, experts = batch.logits.cols;
    const typename workspace<B>::scope scope(ctx.scratch);
    matrix_view<T, B> gates;
    if (broadcasting || !coupled_selector<Inner>) {
      gates = ctx.scratch.template take<T>(tokens, experts);  // [N, E]
    }
    if constexpr (coupled_selector<Inner>) {
      inner.assign(ctx, batch, mask);
    } else {
      ops::select(ctx, inner, batch.logits, batch.padding_mask, gates, mask, batch.more);
    }
    if (!broadcasting) return;
    const auto every = ctx.scratch.template take<std::uint32_t>(tokens, mask.cols);  // [N, words]
    const auto overlay = [&](detail::row_kind kind, index most) {
      ops::select(ctx, detail::every_expert<Entropy>{entropy, threshold, kind}, batch.logits,
                  batch.padding_mask, gates, every);
      ops::overlay_rows(ctx, every, batch.more.sequence_length, most, mask);
    };
    overlay(detail::row_kind::invalid, tokens);
    if constexpr (Slots::limited) {
      overlay(detail::row_kind::unsure, slots.most);
    } else {
      overlay(detail::row_kind::unsure, tokens);
    }
  }

  template <class G, class T>
  TALPA_HD void replay(const G& g, const select_row<T>& row) const {
    inner.replay(g, row);
    if (!broadcasting) return;
    const auto u = row_logits(g, row.logits);
    const auto exponential = exponentials<T>(g, u);
    const auto all =
        was_broadcast<T>(g, u, log_probabilities<T>(g, u, exponential), row.recorded());
    store_gates(g, row, probabilities<T>(g, exponential), all & exponential.valid);
  }

  template <class G, class T>
  TALPA_HD void select_backward(const G& g, const select_gradient_row<T>& row) const {
    inner.select_backward(g, row);
    if (!broadcasting) return;
    const auto zero = g.uniform(T{0});
    const auto u = row_logits(g, row.logits);
    const auto exponential = exponentials<T>(g, u);
    const auto all = was_broadcast<T>(g, u, log_probabilities<T>(g, u, exponential), row.mask) &
                     exponential.valid;
    const auto p = probabilities<T>(g, exponential);
    const auto dgate = [&](auto e) {
      return talpa::select(g.load_bit(row.mask, e), g.load(row.dgates, e, T{0}), zero);
    };
    const row_pointer<const T> stored{row.dlogits.data, row.dlogits.stride};
    const auto mean = g.template sum<T>([&](auto e) { return math::mul(p[e], dgate(e)); });
    g.for_each([&](auto e) {
      const auto own = math::mul(p[e], dgate(e) - mean);
      g.store(row.dlogits, e, talpa::select(all, own, g.load(stored, e, T{0})));
    });
    if constexpr (controlled_selector<Inner>) {
      const row_scalar<const T> inner_control{row.dcontrol.data, row.dcontrol.stride};
      g.store(row.dcontrol, talpa::select(all, zero, g.load(inner_control)));
    }
  }

 private:
  template <class T, class G, class P>
  TALPA_HD typename G::template value<bool> unsure(const G& g, const P& p) const {
    return entropy.template value<T>(g, p) >= g.uniform(static_cast<T>(threshold));
  }
  /// Whether the row is unsure and its mask has every expert that is offered, and no other.
  template <class T, class G, class U, class P>
  TALPA_HD typename G::template value<bool> was_broadcast(
      const G& g, const U& u, const P& p, row_pointer<const std::uint32_t> mask) const {
    const auto masked = g.uniform(-std::numeric_limits<T>::infinity());
    const auto others = g.count([&](auto e) {
      const auto offered = u[e] > masked, on = g.load_bit(mask, e);
      return (offered & !on) | (on & !offered);
    });
    const auto whole = others == g.uniform(std::int32_t{0});
    return unsure<T>(g, p) & whole;
  }
  /// Replaces the gates that Inner stored by p where `all`.
  template <class G, class T, class P, class Condition>
  TALPA_HD static void store_gates(const G& g, const select_row<T>& row, const P& p,
                                   const Condition& all) {
    const auto own = g.load_row(row_pointer<const T>{row.gates.data, row.gates.stride}, T{0});
    g.store_row(row.gates, [&](auto e) { return talpa::select(all, p[e], own[e]); });
  }
};

}  // namespace talpa
