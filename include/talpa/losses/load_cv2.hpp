// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/losses/explain.hpp>
#include <talpa/routing/group_loss.hpp>
#include <talpa/routing/squared_variation.hpp>

#include <cstdint>
#include <limits>
#include <span>
#include <type_traits>

namespace talpa {

namespace detail {

/// Chance of each expert of a row to be selected if its noise alone were drawn again.
struct selection_chance {
  static constexpr row_term_uses uses{.affinity = true, .noise = true};

  bool noise_alone;

  template <class T, class G>
  TALPA_HD typename G::template value<T> forward(const G& g, const routed_row<T>& in,
                                                 row_pointer<T> affinity) const {
    const bounds<T, G> rivals = find<T>(g, in);
    g.for_each(
        [&](auto e) { g.store(affinity, e, math::normal_cdf(distance<T>(g, in, rivals, e))); });
    return g.uniform(T{0});
  }

  template <class T, class G>
  TALPA_HD void backward(const G& g, const routed_row<T>& in, const row_term_gradient<T>& d,
                         const routed_row_gradient<T>& out) const {
    const auto zero = g.uniform(T{0});
    if (in.deviation.data == nullptr) {
      g.for_each([&](auto e) { g.store(out.dlogits, e, zero); });
      return;
    }
    const bounds<T, G> rivals = find<T>(g, in);
    // d / d clean_e, which is also what expert e takes from the logit of its rival.
    auto slope = g.template elements<T>();
    g.for_each([&](auto e) {
      const auto z = distance<T>(g, in, rivals, e);
      const auto density = math::normal_density(z);
      const auto wanted = math::mul(g.uniform(d.scale), g.load(d.affinity, e, T{0}));
      const auto deviation = g.load(in.deviation, e, T{1});
      const auto positive = deviation > zero, reached = density > zero;
      const auto moves = positive & reached;
      slope[e] = talpa::select(
          moves, math::mul(wanted, density) / talpa::select(positive, deviation, g.uniform(T{1})),
          zero);
      g.store(out.dclean, e, slope[e]);
      g.store(out.ddeviation, e,
              talpa::select(moves, -math::mul(slope[e], talpa::select(moves, z, zero)), zero));
    });
    const auto from = [&](bool on) {
      return g.template sum<T>([&](auto e) {
        const auto counted = is_on<T>(g, in, rivals, e);
        return on ? talpa::select(counted, slope[e], zero) : talpa::select(counted, zero, slope[e]);
      });
    };
    const auto by_off = from(true), by_on = from(false);
    g.for_each([&](auto e) {
      const auto is_off = e.expert() == rivals.most_off.expert;
      const auto is_least = e.expert() == rivals.least_on.expert;
      g.store(out.dlogits, e,
              talpa::select(is_off, -by_off, talpa::select(is_least, -by_on, zero)));
    });
  }

 private:
  /// The largest logit that is off, and the smallest that is on with its sign turned; -inf and
  /// expert -1 where there is none.
  template <class T, class G>
  struct bounds {
    expert_value<typename G::template value<T>, typename G::template value<std::int32_t>> most_off;
    expert_value<typename G::template value<T>, typename G::template value<std::int32_t>> least_on;
  };
  template <class T, class G>
  TALPA_HD static bounds<T, G> find(const G& g, const routed_row<T>& in) {
    return {g.template arg_max<T>([&](auto e) { return g.load(in.logits, e, T{0}); },
                                  [&](auto e) { return !g.load_bit(in.mask, e); }),
            g.template arg_max<T>([&](auto e) { return -g.load(in.logits, e, T{0}); },
                                  [&](auto e) { return g.load_bit(in.mask, e); })};
  }

  /// Whether an expert is compared with the largest logit that is off.
  template <class T, class G, class E>
  TALPA_HD typename G::template value<bool> is_on(const G& g, const routed_row<T>& in,
                                                  const bounds<T, G>& rivals, E e) const {
    if (!noise_alone) return g.load_bit(in.mask, e);
    return g.load(in.logits, e, T{0}) - g.load(in.clean, e, T{0}) > rivals.most_off.value;
  }

  /// (clean - rival) / deviation of an expert; infinite without a rival and without a deviation.
  template <class T, class G, class E>
  TALPA_HD typename G::template value<T> distance(const G& g, const routed_row<T>& in,
                                                  const bounds<T, G>& rivals, E e) const {
    const auto never = g.uniform(-std::numeric_limits<T>::infinity());
    const auto certain = talpa::select(g.load_bit(in.mask, e), -never, never);
    if (in.deviation.data == nullptr) return certain;
    const auto rival =
        talpa::select(is_on<T>(g, in, rivals, e), rivals.most_off.value, -rivals.least_on.value);
    const auto clean = g.load(in.clean, e, T{0});
    const auto deviation = g.load(in.deviation, e, T{1});
    const auto exact = deviation == g.uniform(T{0});
    const auto ahead = talpa::select(clean == never, never, clean - rival);
    return talpa::select(exact, certain, ahead / talpa::select(exact, g.uniform(T{1}), deviation));
  }
};

/// Squared variation of the load of one group.
struct load_cv2_group {
  static constexpr used_totals uses{.affinity = true};

  double epsilon;
  selection_chance term;

  template <class G, class T>
  TALPA_HD group_value<typename G::template value<T>> operator()(
      const G& g, const totals_row<T>& in, const totals_derivative_row<T>& out) const {
    const auto value = squared_variation<T>(
        g, epsilon, [&](auto e) { return g.load(in.affinity, e, T{0}); },
        [&](auto e, const auto& slope) { g.store(out.affinity, e, slope); });
    return {value, g.uniform(T{0})};
  }
};

}  // namespace detail

/// Loss that is the squared coefficient of variation of the experts' smooth load under the noise of
/// their router.
///
/// Forward: of a token with logits u, clean logits c and deviations s, expert e has the chance
/// P_e = Phi((c_e - r_e) / s_e) to be selected if its noise alone is drawn again, where r_e is the
/// largest logit that is off for an expert that is on, and the smallest that is on for one that is
/// off: for top-k the kth largest of the other logits. L_e = sum of P_e over real tokens, m = mean
/// of L, v = sum_e (L_e - m)^2 / (E - 1); value v / (m^2 + epsilon), summed over layers.
/// Backward: with w_e = dvalue (2 (L_e - m) / ((E - 1) (m^2 + epsilon)) - v 2 m / (E (m^2 +
/// epsilon)^2)), z_e = (c_e - r_e) / s_e and phi = Phi', dclean_e = w_e phi(z_e) / s_e,
/// ddeviation_e = -w_e phi(z_e) z_e / s_e; dlogits is -dclean_e summed over the experts that
/// compare with this logit; the mask is a constant and dgates is zero.
/// Shapes: per layer logits and clean logits [N, E], deviations [N, E] or empty, mask [N, ceil(E /
/// 32)]; value [1, 1].
/// Value: 0 when all experts have the same load, its minimum; E when one has everything, its
/// greatest.
/// Edges: without noise (a forward at inference) P_e is 1 where e is on and 0 elsewhere, and there
/// is no gradient: the limit of small deviations, and the load that is counted. Likewise for a
/// deviation of 0. P_e = 1 for a token that uses all experts, 0 for one that uses none, 0 for a
/// logit of -inf, all three without a gradient. Equal logits: the lower expert takes the gradient.
/// NaN in a clean logit or a deviation gives NaN. 0 and no gradient for E = 1 and for a layer
/// without real tokens; padding counts as absent.
/// Cost: one pass with N E exponentials forward, one backward; keeps E numbers a layer.
/// Determinism: same bits on every backend and number of threads.
/// Throws: value_error for epsilon <= 0; shape_error for a layer whose scorer adds no noise;
/// shape_error, value_error as the other losses.
/// Source: Shazeer et al. 2017 (arXiv 1701.06538) appendix A; unbiased variance and epsilon as
/// LLaMA-MoE (arXiv 2406.16554), whose code asks whether u_e - c_e, not u_e, exceeds the largest
/// logit that is off: `noise_alone`. Its load without noise is the count, too.
struct load_cv2 {
  static constexpr const char* name = "load_cv2";

  double epsilon = 1e-10;    ///< added to the squared mean, > 0
  bool noise_alone = false;  ///< compare with r_e of an expert that is on where the noise u_e - c_e
                             ///< alone exceeds it, with that of one that is off elsewhere

  template <class T, class B>
  using saved = group_loss_saved<T, B>;

  template <class T, class B>
  saved<T, B> forward(context<B>& ctx, std::span<const routed_view<T, B>> layers) const {
    check_value(epsilon > 0, name, "epsilon", epsilon, "a positive number");
    return group_loss_forward(ctx, name, token_groups::layer, group(), layers);
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
    group_loss_backward(ctx, name, token_groups::layer, group(), layers, kept, dvalue, out, mode);
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
  detail::load_cv2_group group() const { return {epsilon, {noise_alone}}; }
};

static_assert(loss_policy<load_cv2>);

}  // namespace talpa
