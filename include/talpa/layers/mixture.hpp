// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/autograd/affine.hpp>
#include <talpa/experts/explain.hpp>
#include <talpa/layers/input_dropout.hpp>
#include <talpa/layers/slots.hpp>
#include <talpa/layers/strategy.hpp>
#include <talpa/ops/bias.hpp>
#include <talpa/ops/fill.hpp>
#include <talpa/ops/gather.hpp>
#include <talpa/ops/indexed_gemm.hpp>
#include <talpa/ops/packed_gemm.hpp>
#include <talpa/ops/routed_linear.hpp>
#include <talpa/ops/segments.hpp>
#include <talpa/routing/routing.hpp>

#include <type_traits>
#include <utility>

namespace talpa {

/// Experts behind given gates: y (+)= `base` + sum_e g_e f_e(dropout(x)), where base is a product
/// with a packed matrix, if there is one. The part that routed layers share;
/// who makes the gates is their business.
///
/// Backward: dg_e = <dy, f_e>, dx (+)= sum_e g_e (df_e/dx)^T dy, and the parameters of the experts
/// get theirs where they train. The mask is a constant.
/// Shapes: x [N, D], y [N, O], gates [N, E], mask [N, ceil(E / 32)]; saved: what the expert keeps
/// of [N, .] for dense_masked, of [S, .] and the slots for grouped and indexed with S set bits of
/// the mask; with dropout on the CPU its bits, [N, ceil(D / 32)] words.
/// Edges: N = 0; experts without tokens; a token without experts gets nothing.
/// Cost: strategy.hpp.
/// Determinism: same bits for any number of threads; strategies differ by rounding.
/// Throws: value_error.
template <class Expert>
struct mixture {
  static_assert(detail::explain_expert<Expert>());

  Expert expert{};
  index experts = 1;       ///< E, >= 1
  index max_selected = 1;  ///< most experts of a token, 1..E
  strategy execution = strategy::automatic;

  template <class T, class B>
  using params = typename Expert::template params<T, B>;

  template <class T, class B>
  struct saved {
    strategy used = strategy::dense_masked;
    typename Expert::template saved<T, B> expert;
    bool joined = false;        // by forward_joined
    sorted_slots<T, B> sorted;  // grouped and indexed
    input_dropout<B> dropout;
  };

  /// The dropout of one call: of the input of the experts and of what lies inside of them.
  template <class B>
  struct drawn_dropout {
    input_dropout<B> input;
    dropout_mask hidden;
  };

  /// Whether the experts can run under strategy::indexed.
  static constexpr bool can_index = indexed_expert<Expert>;

  /// The strategy a forward on D -> O takes on backend B.
  template <class B = cpu>
  strategy choose(index inputs, index outputs) const {
    if constexpr (!rank_space_expert<Expert>) return strategy::grouped;
    if (execution != strategy::automatic) return execution;
    return choose_strategy({.inputs = inputs,
                            .outputs = outputs,
                            .experts = experts,
                            .width = expert.width(),
                            .max_selected = max_selected,
                            .can_index = can_index,
                            .on_device = !std::same_as<B, cpu>});
  }

  /// What the numbers must be on backend B; `function` is the layer that asks.
  template <class B = cpu>
  void validate(const char* function) const {
    check_at_least(function, "experts", experts, 1, "at least one expert");
    expert.validate();
    const bool cannot = (!rank_space_expert<Expert> && execution == strategy::dense_masked) ||
                        (!can_index && execution == strategy::indexed);
    if (!cannot) return;
    const char* const possible = !rank_space_expert<Expert> ? "grouped" : "dense_masked, grouped";
    detail::throw_value(
        function, "execution", strategy_name(execution),
        detail::concat(possible, " or automatic = what experts of kind ", Expert::name, " can do"));
  }

  /// Draws the masks of one call from batch.random, one after the other, where there is something
  /// to drop; `function` is the layer that asks.
  template <class T, backend B>
  drawn_dropout<B> draw(const char* function, mode m, const batch_info<T, B>& batch) const {
    drawn_dropout<B> drawn{input_dropout<B>::draw(function, expert.input_dropout(), m, batch), {}};
    if constexpr (drops_hidden<Expert>) {
      drawn.hidden = input_dropout<B>::draw(function, expert.hidden_dropout(), m, batch).mask;
    }
    return drawn;
  }

  /// Bytes that one forward of N tokens on D -> O saves in ctx.memory, an upper bound.
  template <class T, class B>
  std::size_t saved_bytes(index tokens, index inputs, index outputs) const {
    const auto bytes = [](index count, std::size_t size) {
      return workspace<B>::rounded(static_cast<std::size_t>(count) * size);
    };
    const auto more = [&](index rows) -> std::size_t {
      if constexpr (requires { expert.template more_saved_bytes<T, B>(rows, outputs, experts); }) {
        return expert.template more_saved_bytes<T, B>(rows, outputs, experts);
      } else {
        return 0;
      }
    };
    const std::size_t mask = input_dropout<B>::saved_bytes(expert.input_dropout(), tokens, inputs);
    if (choose<B>(inputs, outputs) == strategy::dense_masked) {
      return mask + bytes(tokens * experts * expert.width(), sizeof(T)) + more(tokens);
    }
    const index capacity = tokens * max_selected;
    return mask + segments_bytes<B>(tokens, experts, capacity) + bytes(capacity, sizeof(T)) +
           bytes(capacity * expert.width(), sizeof(T)) + more(capacity);
  }

  /// Writes or adds to y as y_mode says; keeps what backward reads in ctx.memory. Under indexed the
  /// experts' share joins the base block by block, to the same bits as after it.
  template <floating T, backend B>
  saved<T, B> forward(context<B>& ctx, const params<T, B>& p,
                      const std::type_identity_t<routing_view<const T, B>>& routing,
                      std::type_identity_t<matrix_view<const T, B>> x,
                      std::type_identity_t<matrix_view<T, B>> y, grad_mode y_mode,
                      const drawn_dropout<B>& dropout = {},
                      const packed_product<T, B>& base = {}) const {
    saved<T, B> kept;
    kept.used = choose<B>(x.cols, y.cols);
    if (base.b != nullptr && kept.used != strategy::indexed) {
      y_mode = form(ctx, base, y, y_mode);
    }
    kept.dropout = dropout.input;
    const typename workspace<B>::scope scope(ctx.scratch);
    const matrix_view<const T, B> dropped = kept.dropout.begin(ctx, x);  // [N, D]
    if constexpr (rank_space_expert<Expert>) {
      if (kept.used == strategy::dense_masked) {
        if (y_mode == grad_mode::overwrite) ops::fill(ctx, T{0}, y);
        if constexpr (drops_hidden<Expert>) {
          kept.expert = expert.forward_masked(ctx, p, routing.gates, dropped, y, dropout.hidden);
        } else {
          kept.expert = expert.forward_masked(ctx, p, routing.gates, dropped, y);
        }
        return kept;
      }
    }
    kept.sorted = sort_slots(ctx, routing, max_selected, !slots_only_expert<Expert>);
    if constexpr (can_index) {
      if (kept.used == strategy::indexed) {
        kept.expert = expert.forward_indexed(ctx, p, kept.sorted.slots, kept.sorted.gates, dropped,
                                             y, y_mode, base);
        return kept;
      }
    }
    const index slots = kept.sorted.slots.capacity();
    const auto x_slots = ctx.scratch.template take<T>(slots, x.cols);  // [S, D]
    const auto y_slots = ctx.scratch.template take<T>(slots, y.cols);  // [S, O]
    ops::gather(ctx, kept.sorted.slots, dropped, x_slots);
    if constexpr (drops_hidden<Expert>) {
      kept.expert = expert.forward_grouped(ctx, p, kept.sorted.slots, kept.sorted.gates, x_slots,
                                           y_slots, dropout.hidden);
    } else {
      kept.expert =
          expert.forward_grouped(ctx, p, kept.sorted.slots, kept.sorted.gates, x_slots, y_slots);
    }
    ops::combine(ctx, kept.sorted.slots, y_slots, y, y_mode);
    return kept;
  }

  /// Whether ops::routed_linear can form the experts' share with the router's and the base's.
  template <class B>
  static constexpr bool can_join = can_index&& has_routed_linear<B>&& routed_linear_expert<Expert>;

  /// forward by ops::routed_linear: route(adapter, u, dropped) calls it for all of y and fills
  /// u [N max_selected, R], the mask of `dropped` and what `routing` shows.
  template <floating T, backend B, class Route>
  requires can_join<B> saved<T, B> forward_joined(context<B>& ctx, const params<T, B>& p,
                                                  const affine_params<T, B>& router, index tokens,
                                                  const input_dropout<B>& dropout,
                                                  const Route& route)
  const {
    input_dropout<B> drawn = dropout;
    drawn.keep(ctx, tokens, router.weight.cols(), tokens);
    const typename workspace<B>::scope scope(ctx.scratch);
    const auto u = ctx.scratch.template take<T>(tokens * max_selected, expert.width());
    const routing_view<const T, B> routing = route(adapter(p, router), matrix_view<T, B>(u),
                                                   routed_dropout<B>{drawn.mask, drawn.bits.words});
    saved<T, B> kept;
    kept.dropout = drawn;
    kept.used = strategy::indexed;
    kept.joined = true;
    kept.sorted = sort_slots(ctx, routing, max_selected, !slots_only_expert<Expert>);
    const auto of_slots =
        ctx.memory.template take<T>(kept.sorted.slots.capacity(), expert.width());  // [S, R]
    ops::rows_of_slots(ctx, kept.sorted.slots, max_selected, u, of_slots);
    kept.expert = {of_slots};
    return kept;
  }
  /// backward of forward_joined: route(adapter, slots, du) calls ops::routed_linear_backward,
  /// which makes dx and fills du [S, R].
  template <floating T, backend B, class Route>
  requires can_join<B>
  void backward_joined(context<B>& ctx, params<T, B>& p, const saved<T, B>& kept,
                       const affine_params<T, B>& router,
                       std::type_identity_t<matrix_view<const T, B>> x,
                       std::type_identity_t<matrix_view<const T, B>> dy, const Route& route) const {
    const typename workspace<B>::scope scope(ctx.scratch);
    const auto& sorted = kept.sorted;
    const auto du =
        ctx.scratch.template take<T>(sorted.slots.capacity(), expert.width());  // [S, R]
    route(adapter(std::as_const(p), router),
          ops::routed_slots<T, B>{sorted.slots, sorted.gates, kept.expert.u, kept.dropout.bits},
          matrix_view<T, B>(du));
    expert.bank_gradients(ctx, p, kept.expert, sorted.slots, sorted.gates,
                          kept.dropout.apply(ctx, x), dy, du);
  }

  /// Overwrites dgates [N, E]; adds to the gradients of what trains; writes or adds to dx as
  /// dx_mode says, `base` included. more() is called once, when dgates is complete, and what it
  /// returns is added to dx as well.
  template <floating T, backend B, class More = no_more<T, B>>
  void backward(context<B>& ctx, params<T, B>& p, const saved<T, B>& kept,
                const std::type_identity_t<routing_view<const T, B>>& routing,
                std::type_identity_t<matrix_view<const T, B>> x,
                std::type_identity_t<matrix_view<const T, B>> dy,
                std::type_identity_t<matrix_view<T, B>> dgates,
                std::type_identity_t<matrix_view<T, B>> dx, grad_mode dx_mode,
                const packed_product<T, B>& base = {}, const More& more = {}) const {
    const typename workspace<B>::scope scope(ctx.scratch);
    // What the dropout takes from the experts' share it must not take from the rest.
    if constexpr (can_index) {
      if (kept.used == strategy::indexed && (has_dropout_bits<B> || !kept.dropout.active())) {
        const auto dgate_of_slot = ctx.scratch.template take<T>(kept.sorted.slots.capacity());
        const auto complete = [&] {
          ops::build_segments_backward(ctx, routing.mask, kept.sorted.slots, dgate_of_slot, dgates,
                                       grad_mode::overwrite);
          return low_rank_product<T, B>(more());
        };
        expert.backward_indexed(ctx, p, kept.expert, kept.sorted.slots, kept.sorted.gates,
                                kept.dropout.apply(ctx, x), dy, dgate_of_slot, dx, dx_mode, base,
                                complete, kept.dropout.bits);
        return;
      }
    }
    if (base.b != nullptr && dx_mode != grad_mode::ignore) dx_mode = form(ctx, base, dx, dx_mode);
    backward_alone(ctx, p, kept, routing, x, dy, dgates, dx, dx_mode);
    const low_rank_product<T, B> rest = more();
    if (rest.w.rows != 0 && dx_mode != grad_mode::ignore) {
      ops::gemm(ctx, rest.d, transpose::no, rest.w, transpose::no, T{1}, dx);
    }
  }

 private:
  /// The experts behind a linear router.
  template <class T, class B>
  routed_adapter<T, B> adapter(const params<T, B>& p, const affine_params<T, B>& router) const {
    routed_adapter<T, B> made = expert.adapter(p, router.weight.value(), max_selected);
    if (router.bias.exists()) made.router_bias = router.bias.value();
    return made;
  }

  template <class T, class B>
  void backward_alone(context<B>& ctx, params<T, B>& p, const saved<T, B>& kept,
                      const routing_view<const T, B>& routing, matrix_view<const T, B> x,
                      matrix_view<const T, B> dy, matrix_view<T, B> dgates, matrix_view<T, B> dx,
                      grad_mode dx_mode) const {
    const typename workspace<B>::scope scope(ctx.scratch);
    const matrix_view<const T, B> dropped = kept.dropout.apply(ctx, x);  // [N, D]
    kept.dropout.through(ctx, dx, dx_mode, [&](matrix_view<T, B> share, grad_mode share_mode) {
      if constexpr (rank_space_expert<Expert>) {
        if (kept.used == strategy::dense_masked) {
          expert.backward_masked(ctx, p, kept.expert, routing.gates, dropped, dy, dgates, share,
                                 share_mode);
          return;
        }
      }
      const index slots = kept.sorted.slots.capacity();
      const auto dgate_of_slot = ctx.scratch.template take<T>(slots);
      if constexpr (can_index) {
        if (kept.used == strategy::indexed) {
          expert.backward_indexed(ctx, p, kept.expert, kept.sorted.slots, kept.sorted.gates,
                                  dropped, dy, dgate_of_slot, share, share_mode);
          ops::build_segments_backward(ctx, routing.mask, kept.sorted.slots, dgate_of_slot, dgates,
                                       grad_mode::overwrite);
          return;
        }
      }
      const auto x_slots = ctx.scratch.template take<T>(slots, x.cols);    // [S, D]
      const auto dy_slots = ctx.scratch.template take<T>(slots, dy.cols);  // [S, O]
      ops::gather(ctx, kept.sorted.slots, dropped, x_slots);
      ops::gather(ctx, kept.sorted.slots, dy, dy_slots);
      if constexpr (slot_summing_expert<Expert>) {
        ops::clear_unused(ctx, kept.sorted.slots, x_slots);
        ops::clear_unused(ctx, kept.sorted.slots, dy_slots);
      }
      // dx of the slots takes the place of x, which has served the parameters by then.
      expert.backward_grouped(ctx, p, kept.expert, kept.sorted.slots, kept.sorted.gates, x_slots,
                              dy_slots, dgate_of_slot, x_slots, share_mode);
      ops::build_segments_backward(ctx, routing.mask, kept.sorted.slots, dgate_of_slot, dgates,
                                   grad_mode::overwrite);
      if (share_mode == grad_mode::ignore) return;
      ops::combine(ctx, kept.sorted.slots, x_slots, share, share_mode);
    });
  }

  /// Forms the base alone; the experts' share is then to be added.
  template <class T, class B>
  static grad_mode form(context<B>& ctx, const packed_product<T, B>& base, matrix_view<T, B> y,
                        grad_mode y_mode) {
    if constexpr (has_packed_matrix<B>) {
      const T kept = y_mode == grad_mode::accumulate ? T{1} : T{0};
      ops::gemm(ctx, base.a, transpose::no, *base.b, kept, y);
      if (!base.bias.empty()) ops::add_bias(ctx, y, base.bias, y);
    }
    return grad_mode::accumulate;
  }
};

}  // namespace talpa
