// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/check.hpp>
#include <talpa/placements/explain.hpp>
#include <talpa/routing/always_on.hpp>

#include <string>

namespace talpa::placement {

/// Adapters that are on for every token with gate 1: y = base(x) + sum_j f_j(x), a sum and no mean
/// (PERFT-D).
///
/// Shapes: gates [N, M] of ones in ctx.memory.
/// Edges: padding gets the adapters too, as it gets the rest of the block.
/// Cost: writes N M ones. Determinism: exact.
/// Throws: nothing.
/// Source: PERFT (arXiv 2411.08212).
struct dense {
  static constexpr const char* name = "placement::dense";
  /// The gates are all one, whatever the token.
  static constexpr bool constant_gates = true;

  template <class T, class B>
  using params = no_params;
  template <class T, class B>
  struct saved {
    routing_view<const T, B> routing;  // [N, M]
  };

  void validate(index, index) const {}
  index max_selected(index adapters, index) const { return adapters; }

  template <class T, class B>
  params<T, B> init(index, index, generator&, const std::string&) const {
    return {};
  }
  template <class T, class B>
  saved<T, B> forward(context<B>& ctx, const params<T, B>&, const routing_view<const T, B>&,
                      index adapters, input<T, B> x, mode, const batch_info<T, B>&) const {
    return {always_on<T>(ctx, ctx.memory, x.rows, adapters)};
  }
  /// Nothing is learned and nothing depends on x.
  template <class T, class B>
  void backward(context<B>&, params<T, B>&, const saved<T, B>&, input<T, B>, output<T, B>,
                output<T, B>, output<T, B>, grad_mode,
                const std::type_identity_t<routed_gradient<T, B>>*) const {}
};

/// The same with exactly one adapter (PERFT-S).
struct single : dense {
  static constexpr const char* name = "placement::single";

  void validate(index adapters, index) const {
    check_range(name, "adapters", adapters, 1, 1, "the one adapter of this placement");
  }
};

static_assert(placement_policy<dense> && placement_policy<single>);

}  // namespace talpa::placement
