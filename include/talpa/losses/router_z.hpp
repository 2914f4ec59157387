// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/losses/explain.hpp>
#include <talpa/routing/group_loss.hpp>

#include <span>
#include <type_traits>

namespace talpa {

namespace detail {

/// Mean over the tokens of one group.
struct router_z_group {
  static constexpr used_totals uses{.squared_logsumexp = true};

  template <class G, class T>
  TALPA_HD group_value<typename G::template value<T>> operator()(
      const G& g, const totals_row<T>& in, const totals_derivative_row<T>&) const {
    const T count = in.tokens > T{0} ? in.tokens : T{1};
    return {g.uniform(in.squared_logsumexp / count), g.uniform(in.tokens / count / count)};
  }
};

}  // namespace detail

/// Loss that keeps the logits of a router small.
///
/// Forward: mean over real tokens of z_n^2, z_n = ln sum_e exp(u_ne), summed over layers.
/// Backward: dlogits_ne = dvalue 2 z_n p_ne / n, p = softmax(u), n the layer's real tokens; dgates
/// is zero.
/// Shapes: per layer logits [N, E]; value [1, 1].
/// Value: 0 where every row has sum exp(u) = 1, its minimum; (ln E)^2 a layer for logits of zero.
/// Edges: a logit of -inf is a masked expert and gets no gradient; a layer without real tokens
/// gives 0; padding counts as absent; +inf, NaN, or -inf everywhere gives NaN.
/// Cost: one pass over the logits forward, one backward; kept: one number a layer.
/// Determinism: same bits on every backend and number of threads.
/// Throws: shape_error, value_error.
/// Source: Zoph et al. 2022, ST-MoE (arXiv 2202.08906) eq. 5.
struct router_z {
  static constexpr const char* name = "router_z";

  template <class T, class B>
  using saved = group_loss_saved<T, B>;

  template <class T, class B>
  saved<T, B> forward(context<B>& ctx, std::span<const routed_view<T, B>> layers) const {
    return group_loss_forward(ctx, name, token_groups::layer, detail::router_z_group{}, layers);
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
    group_loss_backward<detail::router_z_group>(ctx, name, token_groups::layer, layers, kept,
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

static_assert(loss_policy<router_z>);

}  // namespace talpa
