// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/check.hpp>
#include <talpa/losses/explain.hpp>
#include <talpa/routing/group_loss.hpp>
#include <talpa/routing/row_softmax.hpp>

#include <span>
#include <type_traits>

namespace talpa {

/// The named forms of load_balance: what the share f_e of an expert is, and which tokens are looked
/// at together (those are in routing/group_loss.hpp). They differ in scale, so coefficients of one
/// are not coefficients of another.
namespace balance {

/// f_e = count_e / selections of all experts (MoLA, Switch). Ideal value 1.
struct per_selection {
  static constexpr bool soft = false;
  double ideal(double, double) const { return 1.0; }
  template <class G, class T>
  TALPA_HD typename G::template value<T> whole(const G& g, const totals_row<T>& in) const {
    return g.template sum<T>([&](auto e) { return g.load(in.counts, e, T{0}); });
  }
};
/// f_e = count_e / tokens. Ideal value: mean number of experts a token, k for top-k.
struct per_token {
  static constexpr bool soft = false;
  double ideal(double selected, double) const { return selected; }
  template <class G, class T>
  TALPA_HD typename G::template value<T> whole(const G& g, const totals_row<T>& in) const {
    return g.uniform(in.tokens);
  }
};
/// f_e = count_e / (k tokens) with a k of the user's: the number of experts a token that is wanted
/// (ReMoE) or that the original divides by whatever the selector does (HMoRA). Ideal value: mean
/// number of experts a token over k.
struct per_target {
  static constexpr bool soft = false;

  index k = 1;  ///< > 0

  void validate(const char* function) const {
    check_at_least(function, "fraction.k", k, 1, "experts a token");
  }
  double ideal(double selected, double) const { return selected / static_cast<double>(k); }
  template <class G, class T>
  TALPA_HD typename G::template value<T> whole(const G& g, const totals_row<T>& in) const {
    return g.uniform(math::mul(in.tokens, static_cast<T>(k)));
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
  double ideal(double, double mass) const { return mass; }
  template <class G, class T>
  TALPA_HD typename G::template value<T> whole(const G& g, const totals_row<T>& in) const {
    return g.uniform(in.tokens);
  }
};

}  // namespace balance

/// The named forms of load_balance, third part: what the affinity a_ne of a token to an expert is,
/// whose mean is P_e.
namespace affinity {

/// a = softmax(logits): Switch, Mixtral, MoLA, HMoRA and most others; Megatron. Sums to 1.
struct softmax {
  static constexpr bool probability = true, importance = false;
  no_row_term term() const { return {}; }
  double sum(double) const { return 1.0; }
};

/// a = the gates that are on: ReMoE (with per_target the L1 of arXiv 2412.14711), LD-MoLE. The
/// gradient goes to the gates. Sums to the mass of a token's gates.
struct gates {
  static constexpr bool probability = false, importance = true;
  no_row_term term() const { return {}; }
  double sum(double mass) const { return mass; }
};

namespace detail {

struct sigmoid_row {
  static constexpr row_term_uses uses{.affinity = true};

  template <class T, class G>
  TALPA_HD typename G::template value<T> forward(const G& g, const routed_row<T>& in,
                                                 row_pointer<T> out) const {
    const auto zero = g.uniform(T{0});
    const auto s = scores<T>(g, in);
    const auto sum = g.template sum<T>([&](auto e) { return s[e]; });
    g.for_each([&](auto e) { g.store(out, e, s[e] / sum); });
    return zero;
  }
  template <class T, class G>
  TALPA_HD void backward(const G& g, const routed_row<T>& in, const row_term_gradient<T>& d,
                         const routed_row_gradient<T>& out) const {
    const auto s = scores<T>(g, in);
    const auto sum = g.template sum<T>([&](auto e) { return s[e]; });
    const auto wanted = [&](auto e) { return g.load(d.affinity, e, T{0}); };
    const auto mean = g.template sum<T>([&](auto e) { return math::mul(s[e] / sum, wanted(e)); });
    const auto scale = g.uniform(d.scale);
    const auto one = g.uniform(T{1}), zero = g.uniform(T{0});
    g.for_each([&](auto e) {
      const auto slope = talpa::select(s[e] > zero, math::mul(s[e], one - s[e]), s[e]);
      const auto by_score = (wanted(e) - mean) / sum;
      g.store(out.dlogits, e, math::mul(scale, math::mul(slope, by_score)));
    });
  }

 private:
  template <class T, class G>
  TALPA_HD static auto scores(const G& g, const routed_row<T>& in) {
    auto s = row_logits<T>(g, in.logits);
    g.for_each([&](auto e) { s[e] = math::sigmoid(s[e]); });
    return s;
  }
};

struct margin_row {
  static constexpr row_term_uses uses{.affinity = true, .control = true};

  double relative;

  template <class T, class G>
  TALPA_HD typename G::template value<T> forward(const G& g, const routed_row<T>& in,
                                                 row_pointer<T> out) const {
    const auto p = probabilities<T>(g, exponentials<T>(g, row_logits<T>(g, in.logits)));
    const auto threshold = math::mul(most<T>(g), math::sigmoid(g.load(in.control)));
    g.for_each([&](auto e) { g.store(out, e, p[e] - threshold); });
    return g.uniform(T{0});
  }
  template <class T, class G>
  TALPA_HD void backward(const G& g, const routed_row<T>& in, const row_term_gradient<T>& d,
                         const routed_row_gradient<T>& out) const {
    const auto p = probabilities<T>(g, exponentials<T>(g, row_logits<T>(g, in.logits)));
    const auto wanted = [&](auto e) { return g.load(d.affinity, e, T{0}); };
    const auto mean = g.template sum<T>([&](auto e) { return math::mul(p[e], wanted(e)); });
    const auto sum = g.template sum<T>([&](auto e) { return wanted(e); });
    const auto scale = g.uniform(d.scale);
    g.for_each([&](auto e) {
      g.store(out.dlogits, e, math::mul(scale, math::mul(p[e], wanted(e) - mean)));
    });
    const auto slope = math::mul(most<T>(g), math::sigmoid_derivative(g.load(in.control)));
    g.store(out.dcontrol, -math::mul(scale, math::mul(slope, sum)));
  }

 private:
  template <class T, class G>
  TALPA_HD typename G::template value<T> most(const G& g) const {
    return g.uniform(static_cast<T>(relative / static_cast<double>(g.experts())));
  }
};

}  // namespace detail

/// a = sigmoid(logits) / their sum over experts: DeepSeek-V3 (arXiv 2412.19437), whose sequence
/// balance is load_balance<per_selection, per_sequence, sigmoid>. Sums to 1. NaN, or -inf
/// everywhere, gives NaN; +inf has the score 1.
struct sigmoid {
  static constexpr bool probability = false, importance = false;
  detail::sigmoid_row term() const { return {}; }
  double sum(double) const { return 1.0; }
};

/// a = softmax(logits) - relative / E sigmoid(control), the margin over the threshold of
/// learned_threshold, which may be negative: AdaMoLE (arXiv 2405.00361). Reads control. Sums to
/// 1 - E threshold, so that the value depends on the thresholds, and `ideal` is that of thresholds
/// of 0.
struct margin {
  static constexpr bool probability = false, importance = false;

  double relative = 1.0;  ///< as the selector's: largest threshold in units of 1 / E, in (0, E]

  void validate(const char* function, index experts) const {
    check_value(relative > 0.0 && relative <= static_cast<double>(experts), function,
                "affinity.relative", relative,
                "in (0, experts] = largest threshold in units of 1 / experts");
  }
  detail::margin_row term() const { return {relative}; }
  double sum(double) const { return 1.0; }
};

}  // namespace affinity

namespace detail {

/// E sum_e f_e P_e of one group, with d / d sum a_e = E f_e / tokens.
template <class Fraction, class Affinity = affinity::softmax>
struct balance_group {
  static constexpr bool by_term = !Affinity::probability && !Affinity::importance;
  static constexpr used_totals uses{.counts = !Fraction::soft,
                                    .probability = Affinity::probability,
                                    .importance = Fraction::soft || Affinity::importance,
                                    .affinity = by_term};

  Fraction fraction;
  decltype(Affinity{}.term()) term;

  template <class G, class T>
  TALPA_HD group_value<typename G::template value<T>> operator()(
      const G& g, const totals_row<T>& in, const totals_derivative_row<T>& out) const {
    const auto zero = g.uniform(T{0});
    const auto whole = fraction.whole(g, in);
    const auto some = (whole > zero) & (g.uniform(in.tokens) > zero);
    const auto factor =
        talpa::select(some, g.uniform(static_cast<T>(g.experts())) / g.uniform(in.tokens), zero);
    const auto share = [&](auto e) {
      const auto part = g.load(Fraction::soft ? in.importance : in.counts, e, T{0});
      return talpa::select(some, math::mul(factor, part / whole), zero);
    };
    const auto source = Affinity::probability ? in.probability
                        : by_term             ? in.affinity
                                              : in.importance;
    const auto amount = [&](auto e) { return talpa::select(some, g.load(source, e, T{0}), zero); };
    g.for_each([&](auto e) {
      if constexpr (Affinity::probability) g.store(out.probability, e, share(e));
      if constexpr (by_term) g.store(out.affinity, e, share(e));
      if constexpr (Fraction::soft) {
        // whole is the number of tokens here.
        const auto by_fraction = talpa::select(some, math::mul(factor, amount(e) / whole), zero);
        g.store(out.importance, e, Affinity::importance ? by_fraction + share(e) : by_fraction);
      } else if constexpr (Affinity::importance) {
        g.store(out.importance, e, share(e));
      }
    });
    return {g.template sum<T>([&](auto e) { return math::mul(share(e), amount(e)); }), zero};
  }
};

}  // namespace detail

/// Loss that pushes the experts towards equal shares of the tokens.
///
/// Forward: E sum_e f_e P_e for each group of tokens, f_e the share of expert e as Fraction says,
/// P_e the mean over the group's real tokens of the affinity a_ne to the expert as Affinity says,
/// softmax(logits)_e by default; groups and their sum as Pooling says.
/// Backward: da_ne = dvalue E / n f_e with n the group's real tokens, so for the softmax
/// dlogits_ne = dvalue E / n p_ne (f_e - sum_j p_nj f_j); counts have no gradient. soft_mass also:
/// dgates_ne = dvalue E / n P_e where the mask is set. affinity::gates: dgates_ne = da_ne where the
/// mask is set, dlogits is zero. affinity::margin: dcontrol_n = -dvalue relative / n
/// sigmoid'(control_n) sum_e f_e.
/// Shapes: per layer logits, gates [N, E], mask [N, ceil(E / 32)], control [N, 1] for
/// affinity::margin; value [1, 1].
/// Value: `ideal` when all f_e are equal, whatever P; E times that when one expert has everything.
/// `ideal` is no lower bound: f and P that point away from each other give less.
/// Edges: E = 1 gives `ideal` and no gradient of logits; a group without real tokens or without a
/// selection gives 0 and zero gradients; padding counts as absent; a logit of -inf has p = 0.
/// Cost: one pass over the logits forward, one backward; keeps E numbers a group, soft_mass 2 E.
/// Determinism: same bits on every backend and number of threads.
/// Throws: shape_error (pooled layers with different E among others), value_error when a sequence
/// length does not divide N, or a number of Fraction or Affinity is out of range.
/// Source: Fedus et al. 2021, Switch Transformers (arXiv 2101.03961) eq. 4; the forms as named
/// above. Fraction and Pooling are types of namespace balance, Affinity of namespace affinity.
template <class Fraction, class Pooling, class Affinity = affinity::softmax>
struct load_balance {
  static constexpr const char* name = "load_balance";

  Fraction fraction{};
  Affinity affinity{};

  template <class T, class B>
  using saved = group_loss_saved<T, B>;

  /// The value when every expert has the same count, or the same mass of gates: `selected` experts
  /// and a `mass` of gates a token, the same in all `layers`.
  double ideal(index layers, double selected, double mass = 1.0) const {
    const bool one = Pooling::groups == token_groups::all_layers;
    return (one ? 1.0 : static_cast<double>(layers)) * fraction.ideal(selected, mass) *
           affinity.sum(mass);
  }

  template <class T, class B>
  saved<T, B> forward(context<B>& ctx, std::span<const routed_view<T, B>> layers) const {
    if constexpr (requires { fraction.validate(name); }) fraction.validate(name);
    if constexpr (requires { affinity.validate(name, index{1}); }) {
      for (const routed_view<T, B>& layer : layers) affinity.validate(name, layer.logits.cols);
    }
    return group_loss_forward(ctx, name, Pooling::groups, group(), layers);
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
    group_loss_backward(ctx, name, Pooling::groups, group(), layers, kept, dvalue, out, mode);
  }
  /// The same for one layer.
  template <class T, class B>
  void backward(context<B>& ctx, const std::type_identity_t<routed_view<T, B>>& layer,
                const group_loss_saved<T, B>& kept, input<T, B> dvalue,
                const std::type_identity_t<routed_gradient<T, B>>& out, grad_mode mode) const {
    backward(ctx, std::span<const routed_view<T, B>>(&layer, 1), kept, dvalue,
             std::span<const routed_gradient<T, B>>(&out, 1), mode);
  }

 private:
  detail::balance_group<Fraction, Affinity> group() const { return {fraction, affinity.term()}; }
};

static_assert(
    loss_policy<load_balance<balance::per_selection, balance::per_layer>> &&
    loss_policy<load_balance<balance::per_rank, balance::pooled>> &&
    loss_policy<load_balance<balance::soft_mass, balance::per_sequence>> &&
    loss_policy<load_balance<balance::per_target, balance::per_layer, affinity::gates>> &&
    loss_policy<load_balance<balance::per_selection, balance::per_sequence, affinity::sigmoid>>);

}  // namespace talpa
