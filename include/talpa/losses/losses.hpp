// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/check.hpp>
#include <talpa/core/workspace.hpp>
#include <talpa/losses/explain.hpp>
#include <talpa/ops/add.hpp>
#include <talpa/ops/fill.hpp>
#include <talpa/ops/scale.hpp>
#include <talpa/routing/routing.hpp>

#include <array>
#include <cmath>
#include <cstddef>
#include <span>
#include <tuple>
#include <type_traits>
#include <utility>

namespace talpa {

/// A loss with its weight in a sum of losses.
template <class L>
struct term {
  static_assert(detail::explain_loss<L>());

  double weight = 1.0;  ///< a finite number
  L loss{};
};
template <class L>
term(double, L) -> term<L>;

/// What the backward of `losses` reads: the total, and what each loss saved.
template <class T, class B, class... Losses>
struct losses_saved {
  matrix_view<T, B> value;                                       // [1, 1], the weighted total
  std::tuple<typename Losses::template saved<T, B>...> parts{};  // in the order of the terms

  /// The values of the losses, [1, 1] each, without their weights.
  std::array<matrix_view<const T, B>, sizeof...(Losses)> values() const {
    return std::apply(
        [](const auto&... part) {
          return std::array<matrix_view<const T, B>, sizeof...(Losses)>{part.value...};
        },
        parts);
  }
};

template <class... Terms>
struct losses;

/// Loss that is a weighted sum of losses on the same layers.
///
///   const talpa::losses objective{
///       talpa::term{1e-2, talpa::entropy_loss<talpa::entropy::tsallis>{}},
///       talpa::term{1e-3, talpa::router_z{}}};
///   const auto total = tape.apply_loss(objective, {first.routed, second.routed});
///
/// or by hand
///
///   const auto kept = objective.forward(ctx, layers);
///   print(kept.value(0, 0), kept.values()[0](0, 0), kept.values()[1](0, 0));
///   objective.backward(ctx, layers, kept, dvalue, out, talpa::grad_mode::overwrite);
///
/// Forward: value = sum_i weight_i value_i, added in the order of the terms; each value_i stays
/// readable in values().
/// Backward: each loss adds its own gradient for dvalue weight_i.
/// Shapes: as of the losses; value [1, 1].
/// Value: the sum of the weighted values of its terms; a loss of a loss is legal.
/// Edges: a weight of 0 still evaluates its loss, and 0 times NaN or infinity is NaN.
/// Cost: that of its losses.
/// Determinism: same bits on every backend and number of threads.
/// Throws: value_error for a weight that is not finite; what its losses throw.
template <class... L>
struct losses<term<L>...> {
  static_assert(sizeof...(L) > 0,
                "talpa: losses needs at least one term, write losses{term{1e-2, router_z{}}} "
                "(docs/policies/loss.md)");
  static constexpr const char* name = "losses";

  std::tuple<term<L>...> terms;

  constexpr explicit losses(const term<L>&... t) : terms(t...) {}

  template <class T, class B>
  using saved = losses_saved<T, B, L...>;

  template <class T, class B>
  saved<T, B> forward(context<B>& ctx, std::span<const routed_view<T, B>> layers) const {
    saved<T, B> kept;
    kept.value = ctx.memory.template take<T>(1, 1);
    ops::fill(ctx, T{0}, kept.value);
    for_each_term(kept, [&](const auto& t, auto& part) {
      check_value(std::isfinite(t.weight), name, "weight", t.weight, "a finite number");
      part = t.loss.forward(ctx, layers);
      ops::axpy(ctx, static_cast<T>(t.weight), part.value, kept.value);
    });
    return kept;
  }
  /// The same for one layer.
  template <class T, class B>
  saved<T, B> forward(context<B>& ctx, const routed_view<T, B>& layer) const {
    return forward(ctx, std::span<const routed_view<T, B>>(&layer, 1));
  }

  template <class T, class B>
  void backward(context<B>& ctx, std::type_identity_t<std::span<const routed_view<T, B>>> layers,
                const losses_saved<T, B, L...>& kept, input<T, B> dvalue,
                std::type_identity_t<std::span<const routed_gradient<T, B>>> out,
                grad_mode mode) const {
    check_shape(name, "dvalue", dvalue, 1, 1, "one number");
    const typename workspace<B>::scope scope(ctx.scratch);
    const matrix_view<T, B> upstream = ctx.scratch.template take<T>(1, 1);
    for_each_term(kept, [&](const auto& t, const auto& part) {
      ops::scale(ctx, static_cast<T>(t.weight), dvalue, upstream);
      t.loss.backward(ctx, layers, part, upstream, out, mode);
      if (mode == grad_mode::overwrite) mode = grad_mode::accumulate;
    });
  }
  /// The same for one layer.
  template <class T, class B>
  void backward(context<B>& ctx, const std::type_identity_t<routed_view<T, B>>& layer,
                const losses_saved<T, B, L...>& kept, input<T, B> dvalue,
                const std::type_identity_t<routed_gradient<T, B>>& out, grad_mode mode) const {
    backward(ctx, std::span<const routed_view<T, B>>(&layer, 1), kept, dvalue,
             std::span<const routed_gradient<T, B>>(&out, 1), mode);
  }

 private:
  /// f(term, its part of `kept`) for one term after the other.
  template <class Saved, class F>
  void for_each_term(Saved& kept, F f) const {
    [&]<std::size_t... I>(std::index_sequence<I...>) {
      (f(std::get<I>(terms), std::get<I>(kept.parts)), ...);
    }
    (std::make_index_sequence<sizeof...(L)>{});
  }
};
template <class... L>
losses(term<L>...) -> losses<term<L>...>;

}  // namespace talpa
