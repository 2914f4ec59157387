// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/check.hpp>
#include <talpa/core/workspace.hpp>
#include <talpa/ops/limit_experts.hpp>
#include <talpa/routing/first_k.hpp>
#include <talpa/routing/gate_weight.hpp>
#include <talpa/selectors/explain.hpp>

#include <cmath>
#include <concepts>
#include <cstdint>

namespace talpa {

/// Which selections an expert that is full drops.
namespace overflow {

/// Those of later tokens (Switch; Megatron's drop policy `position`).
struct by_position {
  static constexpr limit_order order = limit_order::position;
};
/// Those with smaller gates before the drop, among equal gates the later (Megatron's `probs`).
struct by_probability {
  static constexpr limit_order order = limit_order::score;
};

}  // namespace overflow

/// How many tokens an expert takes, and of how many.
namespace capacity {

/// c = ceil(T k / E * factor) with T the tokens that are counted together (Megatron).
struct share {
  double factor = 1.0;  ///< > 0; 1: what an expert gets when all get the same

  void validate(const char* name) const {
    check_value(factor > 0.0 && std::isfinite(factor), name, "factor", factor,
                "> 0 and finite = capacity over a fair share");
  }
  TALPA_HD index places(index tokens, index k, index experts) const {
    const double fair = static_cast<double>(tokens * k) / static_cast<double>(experts);
    const double most = ::ceil(fair * factor);
    // No expert has more tokens than there are; that also keeps the number an index.
    return most < static_cast<double>(tokens) ? static_cast<index>(most) : tokens;
  }
};
/// c = tokens (Switch in the Hugging Face form).
struct fixed {
  index tokens = 64;  ///< tokens an expert takes, >= 1

  void validate(const char* name) const {
    check_at_least(name, "tokens", tokens, 1, "tokens an expert takes");
  }
  TALPA_HD index places(index, index, index) const { return tokens; }
};

/// The whole batch is counted together (Megatron).
struct per_batch {
  static constexpr bool by_sequence = false;
};
/// Each sequence is counted for itself (Switch in the Hugging Face form).
struct per_sequence {
  static constexpr bool by_sequence = true;
};

}  // namespace capacity

namespace detail {

/// Places of an expert among so many tokens.
template <class Capacity>
struct places_of {
  Capacity capacity;
  index k, experts;
  TALPA_HD index operator()(index tokens) const { return capacity.places(tokens, k, experts); }
};

/// The top k of each token, as they are before any limit.
template <class Weight>
struct unlimited_top_k {
  static constexpr const char* name = "capacity_top_k";
  index k;

  void validate(index) const {}
  template <class G, class T>
  TALPA_HD void select(const G& g, const select_row<T>& row) const {
    const auto u = row_logits(g, row.logits);
    const auto logit = [&](auto e) { return u[e]; };
    const auto top = g.template top<T>(k, logit);
    const auto exponential = exponentials<T>(g, u, top.first);
    store_first_k<T>(g, row.mask, k, top.last, exponential.invalid, logit);
    weigh<Weight>(g, row, exponential);
  }
};

/// The weights of the mask M of a row with the experts that were dropped: M and, where it has fewer
/// than k experts, the largest of the other logits; zero outside. NaN for an invalid row.
template <class G, class T>
TALPA_HD auto weights_before_drop(const G& g, index k, row_pointer<const T> logits,
                                  row_pointer<const std::uint32_t> mask,
                                  const row_exponentials<T, G>& exponential) {
  const auto zero = g.uniform(T{0});
  const auto masked = g.uniform(-std::numeric_limits<T>::infinity());
  const auto u = row_logits(g, logits);
  const auto bits = g.load_mask(mask);
  const auto kept = g.count([&](auto e) { return bits(e); });
  const auto wanted = g.uniform(static_cast<std::int32_t>(k)) - kept;
  const auto other = [&](auto e) { return talpa::select(bits(e), masked, u[e]); };
  const auto ranks = g.template ranks<T>(k, other);
  auto last = g.uniform(std::numeric_limits<T>::infinity());
  for (index j = 0; j < k; ++j) {
    const auto reached = g.uniform(static_cast<std::int32_t>(j)) < wanted;
    last = talpa::select(reached, ranks(j), last);
  }
  const auto end = boundary_at<T>(g, wanted, last, other);
  auto q = g.template elements<T>();
  g.for_each([&](auto e) {
    const auto dropped = end.holds(other(e), e);
    const auto inside = bits(e) | dropped;
    q[e] = talpa::select(inside, exponential.weight[e], zero);
  });
  const auto mass = g.template sum<T>([&](auto e) { return q[e]; });
  return g.quotients(q, mass);
}

}  // namespace detail

/// Selector that turns on the k experts with the largest logits as far as these have places left.
///
/// Forward: S_n = top k of token n, ties to the lower index; q_n = gates of S_n as Weight says.
/// Each expert keeps the first c of the tokens that selected it, in the order of Overflow; g = q
/// where a selection is kept, 0 elsewhere: the other gates of a token stay as they were.
/// Backward (masks constant): raw: as top_k on what is kept; renormalised and softmax_selected, M
/// what is kept: du_e = q_e (1[e in M] dg_e - sum_{j in M} q_j dg_j) for all e of S_n.
/// Shapes: logits [N, E] -> gates [N, E], mask [N, ceil(E / 32)] of what is kept. Group says
/// whether c and the order are those of the batch or of each sequence.
/// Edges: a token may end with 0 to k experts. The mask does not hold what was dropped: backward
/// and replay fill it up to k with the largest other logits, which gives S_n again; a mask that was
/// recorded for other logits is filled up in the same way. Padding and rows with NaN, +inf, or -inf
/// everywhere do not count and take no place; the latter get NaN gates on experts 0..k-1.
/// Cost: top_k, [N, E] scratch, two passes for the limit, k more passes for the filling.
/// Determinism: same bits for every lane group and any number of threads.
/// Throws: value_error from validate.
/// Source: Megatron-LM topk_softmax_with_capacity (by_position, by_probability, share, per_batch);
/// Fedus et al. 2021 (arXiv 2101.03961) as k = 1, raw, by_position, with fixed, per_sequence in the
/// Hugging Face form. Megatron's `position` takes the largest of a 0/1 map, so its sort decides
/// which tokens stay; here the earliest do, and among equal gates too. Its padding of experts that
/// are not full with tokens of weight zero (pad_to_capacity) changes no result and is not done.
template <class Weight, class Overflow = overflow::by_position, class Capacity = capacity::share,
          class Group = capacity::per_batch>
struct capacity_top_k {
  static_assert(!std::same_as<Weight, gate::softmax_probability>,
                "talpa::capacity_top_k: gate::softmax_probability does not weigh what is dropped; "
                "use raw, renormalised, softmax_selected or hard");
  static constexpr const char* name = "capacity_top_k";
  static constexpr bool unit_mass = false;
  static constexpr bool couples_rows = true;

  index k = 1;          ///< experts per token before the limit, 1..E
  Capacity capacity{};  ///< tokens an expert takes

  void validate(index experts) const {
    check_range(name, "k", k, 1, experts, "experts");
    capacity.validate(name);
  }
  TALPA_HD index max_selected(index) const { return k; }

  template <class T, class B>
  void assign(context<B>& ctx, const assign_batch<T, B>& batch,
              matrix_view<std::uint32_t, B> mask) const {
    const index experts = batch.logits.cols;
    const typename workspace<B>::scope scope(ctx.scratch);
    const auto gates = ctx.scratch.template take<T>(batch.logits.rows, experts);  // [N, E]
    ops::select(ctx, detail::unlimited_top_k<Weight>{k}, batch.logits, batch.padding_mask, gates,
                mask);
    const detail::places_of<Capacity> places{capacity, k, experts};
    ops::limit_experts(ctx, matrix_view<const T, B>(gates), batch.padding_mask,
                       Group::by_sequence ? batch.more.sequence_length : 0, places, Overflow::order,
                       mask);
  }

  template <class G, class T>
  TALPA_HD void replay(const G& g, const select_row<T>& row) const {
    const auto exponential = exponentials<T>(g, row_logits(g, row.logits));
    if constexpr (Weight::unit_mass) {
      const auto zero = g.uniform(T{0});
      const auto nan = g.uniform(std::numeric_limits<T>::quiet_NaN());
      const auto q = detail::weights_before_drop(g, k, row.logits, row.recorded(), exponential);
      const auto on = g.load_mask(row.recorded());
      g.store_row(row.gates, [&](auto e) {
        const auto value = talpa::select(exponential.invalid, nan, q[e]);
        return talpa::select(on(e), value, zero);
      });
    } else {
      weigh<Weight>(g, row, exponential);
    }
  }

  template <class G, class T>
  TALPA_HD void select_backward(const G& g, const select_gradient_row<T>& row) const {
    if constexpr (Weight::unit_mass) {
      const auto zero = g.uniform(T{0});
      const auto exponential = exponentials<T>(g, row_logits(g, row.logits));
      const auto q = detail::weights_before_drop(g, k, row.logits, row.mask, exponential);
      const auto dgate = [&](auto e) {
        return talpa::select(g.load_bit(row.mask, e), g.load(row.dgates, e, T{0}), zero);
      };
      const auto mean = g.template sum<T>([&](auto e) { return math::mul(q[e], dgate(e)); });
      g.store_row(row.dlogits, [&](auto e) { return math::mul(q[e], dgate(e) - mean); });
    } else {
      weigh_backward<Weight>(g, row);
    }
  }
};

static_assert(selector_policy<capacity_top_k<gate::raw>> &&
              selector_policy<capacity_top_k<gate::renormalised, overflow::by_probability>> &&
              selector_policy<capacity_top_k<gate::softmax_selected, overflow::by_position,
                                             capacity::fixed, capacity::per_sequence>>);

}  // namespace talpa
