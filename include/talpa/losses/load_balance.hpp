// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/losses/explain.hpp>
#include <talpa/routing/group_loss.hpp>

#include <span>
#include <type_traits>

namespace talpa {

/// The named forms of load_balance: what the share f_e of an expert is, and which tokens are looked
/// at together. They differ in scale, so coefficients of one are not coefficients of another.
namespace balance {

/// f_e = count_e / selections of all experts (MoLA, Switch). Ideal value 1.
struct per_selection {
  static constexpr bool soft = false;
  static double ideal(double, double) { return 1.0; }
  template <class G, class T>
  TALPA_HD static typename G::template value<T> whole(const G& g, const totals_row<T>& in) {
    return g.template sum<T>([&](auto e) { return g.load(in.counts, e, T{0}); });
  }
};
/// f_e = count_e / tokens. Ideal value: mean number of experts a token, k for top-k.
struct per_token {
  static constexpr bool soft = false;
  static double ideal(double selected, double) { return selected; }
  template <class G, class T>
  TALPA_HD static typename G::template value<T> whole(const G& g, const totals_row<T>& in) {
    return g.uniform(in.tokens);
  }
};
/// f_e = sum over ranks r of (tokens whose r-th choice is e) / tokens (Mixtral in transformers,
/// MixLoRA, PERFT). Every selection has exactly one rank, so the sum over ranks is count_e /
/// tokens: the value is that of per_token, under the name users of these models look for. Ideal
/// value k.
struct per_rank : per_token {};
/// f_e = mean over tokens of the gates that are on (DynMoLE). Both factors have a gradient. Ideal
/// value: mean mass of gates a token, 1 for gates that sum to one; it also rewards less mass.
struct soft_mass {
  static constexpr bool soft = true;
  static double ideal(double, double mass) { return mass; }
  template <class G, class T>
  TALPA_HD static typename G::template value<T> whole(const G& g, const totals_row<T>& in) {
    return g.uniform(in.tokens);
  }
};

/// One loss a layer, summed over layers (MoLA).
struct per_layer {
  static constexpr token_groups groups = token_groups::layer;
};
/// The tokens of all layers together, one loss (Mixtral in transformers, PERFT, MixLoRA, DynMoLE).
/// Layers must have equally many experts; imbalances of different layers can cancel.
struct pooled {
  static constexpr token_groups groups = token_groups::all_layers;
};
/// One loss a sequence (sequence_length of the batch), mean over sequences with a real token,
/// summed over layers (DeepSeek).
struct per_sequence {
  static constexpr token_groups groups = token_groups::sequence;
};

}  // namespace balance

namespace detail {

/// E sum_e f_e P_e of one group, with d / d sum p_e = E f_e / tokens.
template <class Fraction>
struct balance_group {
  static constexpr used_totals uses{
      .counts = !Fraction::soft, .probability = true, .importance = Fraction::soft};

  template <class G, class T>
  TALPA_HD group_value<typename G::template value<T>> operator()(
      const G& g, const totals_row<T>& in, const totals_derivative_row<T>& out) const {
    const auto zero = g.uniform(T{0});
    const auto whole = Fraction::whole(g, in);
    const auto some = (whole > zero) & (g.uniform(in.tokens) > zero);
    const auto factor =
        talpa::select(some, g.uniform(static_cast<T>(g.experts())) / g.uniform(in.tokens), zero);
    const auto share = [&](auto e) {
      const auto amount = g.load(Fraction::soft ? in.importance : in.counts, e, T{0});
      return talpa::select(some, math::mul(factor, amount / whole), zero);
    };
    const auto probability = [&](auto e) {
      return talpa::select(some, g.load(in.probability, e, T{0}), zero);
    };
    g.for_each([&](auto e) {
      g.store(out.probability, e, share(e));
      // whole is the number of tokens here.
      if constexpr (Fraction::soft) {
        g.store(out.importance, e,
                talpa::select(some, math::mul(factor, probability(e) / whole), zero));
      }
    });
    return {g.template sum<T>([&](auto e) { return math::mul(share(e), probability(e)); }), zero};
  }
};

}  // namespace detail

/// Loss that pushes the experts towards equal shares of the tokens.
///
/// Forward: E sum_e f_e P_e for each group of tokens, f_e the share of expert e as Fraction says,
/// P_e the mean of softmax(logits)_e over the group's real tokens; groups and their sum as Pooling
/// says.
/// Backward: dlogits_ne = dvalue E / n p_ne (f_e - sum_j p_nj f_j) with n the group's real tokens;
/// counts have no gradient. soft_mass also: dgates_ne = dvalue E / n P_e where the mask is set.
/// Shapes: per layer logits, gates [N, E], mask [N, ceil(E / 32)]; value [1, 1].
/// Value: `ideal` when all f_e are equal, whatever P; E times that when one expert has everything.
/// `ideal` is no lower bound: f and P that point away from each other give less.
/// Edges: E = 1 gives `ideal` and no gradient of logits; a group without real tokens or without a
/// selection gives 0 and zero gradients; padding counts as absent; a logit of -inf has p = 0.
/// Cost: one pass over the logits forward, one backward; keeps E numbers a group, soft_mass 2 E.
/// Determinism: same bits on every backend and number of threads.
/// Throws: shape_error (pooled layers with different E among others), value_error when a sequence
/// length does not divide N.
/// Source: Fedus et al. 2021, Switch Transformers (arXiv 2101.03961) eq. 4; the forms as named
/// above. Fraction and Pooling are types of namespace balance.
template <class Fraction, class Pooling>
struct load_balance {
  static constexpr const char* name = "load_balance";

  template <class T, class B>
  using saved = group_loss_saved<T, B>;

  /// The value when every expert has the same count, or the same mass of gates: `selected` experts
  /// and a `mass` of gates a token, the same in all `layers`.
  static double ideal(index layers, double selected, double mass = 1.0) {
    const bool one = Pooling::groups == token_groups::all_layers;
    return (one ? 1.0 : static_cast<double>(layers)) * Fraction::ideal(selected, mass);
  }

  template <class T, class B>
  saved<T, B> forward(context<B>& ctx, std::span<const routed_view<T, B>> layers) const {
    return group_loss_forward(ctx, name, Pooling::groups, detail::balance_group<Fraction>{},
                              layers);
  }
  /// The same for one layer.
  template <class T, class B>
  saved<T, B> forward(context<B>& ctx, const routed_view<T, B>& layer) const {
    return forward(ctx, std::span<const routed_view<T, B>>(&layer, 1));
  }

  template <class T, class B>
  void backward(context<B>& ctx, std::type_identity_t<std::span<const routed_view<T, B>>> layers,
                const group_loss_saved<T, B>& kept, input<T, B> dvalue,
                std::type_identity_t<std::span<const routed_gradient<T, B>>> out,
                grad_mode mode) const {
    group_loss_backward<detail::balance_group<Fraction>>(ctx, name, Pooling::groups, layers, kept,
                                                         dvalue, out, mode);
  }
  /// The same for one layer.
  template <class T, class B>
  void backward(context<B>& ctx, const std::type_identity_t<routed_view<T, B>>& layer,
                const group_loss_saved<T, B>& kept, input<T, B> dvalue,
                const std::type_identity_t<routed_gradient<T, B>>& out, grad_mode mode) const {
    backward(ctx, std::span<const routed_view<T, B>>(&layer, 1), kept, dvalue,
             std::span<const routed_gradient<T, B>>(&out, 1), mode);
  }
};

static_assert(loss_policy<load_balance<balance::per_selection, balance::per_layer>> &&
              loss_policy<load_balance<balance::per_rank, balance::pooled>> &&
              loss_policy<load_balance<balance::soft_mass, balance::per_sequence>>);

}  // namespace talpa
