// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/losses/explain.hpp>
#include <talpa/routing/group_loss.hpp>
#include <talpa/routing/squared_variation.hpp>

#include <span>
#include <type_traits>

namespace talpa {

namespace detail {

/// var / (mean^2 + epsilon) of the importance of one group.
struct importance_cv2_group {
  static constexpr used_totals uses{.importance = true};

  double epsilon;

  template <class G, class T>
  TALPA_HD group_value<typename G::template value<T>> operator()(
      const G& g, const totals_row<T>& in, const totals_derivative_row<T>& out) const {
    const auto value = squared_variation<T>(
        g, epsilon, [&](auto e) { return g.load(in.importance, e, T{0}); },
        [&](auto e, const auto& slope) { g.store(out.importance, e, slope); });
    return {value, g.uniform(T{0})};
  }
};

}  // namespace detail

/// Loss that is the squared coefficient of variation of the experts' importance.
///
/// Forward: I_e = sum over real tokens of g_ne, m = mean of I, v = sum_e (I_e - m)^2 / (E - 1);
/// value v / (m^2 + epsilon), summed over layers.
/// Backward: dgates_ne = dvalue (2 (I_e - m) / ((E - 1) (m^2 + epsilon)) - v 2 m / (E (m^2 +
/// epsilon)^2)) where the mask is set; dlogits is zero: the gates carry the gradient on.
/// Shapes: per layer gates [N, E]; value [1, 1].
/// Value: 0 when all experts weigh the same, its minimum; E when one has everything, its greatest.
/// Edges: 0 and no gradient for E = 1 and for a layer without real tokens; padding counts as
/// absent.
/// Cost: one pass over the gates forward, one backward; kept: E numbers a layer.
/// Determinism: same bits on every backend and number of threads.
/// Throws: value_error for epsilon <= 0; shape_error, value_error as the other losses.
/// Source: Shazeer et al. 2017 (arXiv 1701.06538) eq. 6-7; unbiased variance and epsilon as
/// LLaMA-MoE (arXiv 2406.16554).
struct importance_cv2 {
  static constexpr const char* name = "importance_cv2";

  double epsilon = 1e-10;  ///< added to the squared mean, > 0

  template <class T, class B>
  using saved = group_loss_saved<T, B>;

  template <class T, class B>
  saved<T, B> forward(context<B>& ctx, std::span<const routed_view<T, B>> layers) const {
    check_value(epsilon > 0, name, "epsilon", epsilon, "a positive number");
    return group_loss_forward(ctx, name, token_groups::layer, detail::importance_cv2_group{epsilon},
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
    group_loss_backward<detail::importance_cv2_group>(ctx, name, token_groups::layer, layers, kept,
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

static_assert(loss_policy<importance_cv2>);

}  // namespace talpa
