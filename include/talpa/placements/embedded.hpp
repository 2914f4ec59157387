// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/check.hpp>
#include <talpa/ops/add.hpp>
#include <talpa/placements/explain.hpp>

#include <string>

namespace talpa::placement {

/// One adapter inside each expert of the base, behind the base's gates:
/// y = sum_e g_e (E_e(x) + f_e(x)) (PERFT-E).
///
/// Backward: the gradients of the gates go to the base's router.
/// Shapes: the routing of the base, [N, E]; M = E.
/// Edges: as the base's routing: padding gets no adapter.
/// Cost: no routing of its own; backward adds N E numbers. Determinism: that of the base's routing.
/// Throws: value_error unless there are as many adapters as experts.
/// Source: PERFT (arXiv 2411.08212).
struct embedded {
  static constexpr const char* name = "placement::embedded";

  template <class T, class B>
  using params = no_params;
  template <class T, class B>
  struct saved {
    routing_view<const T, B> routing;  // [N, E]
  };

  void validate(index adapters, index base_experts) const {
    check_range(name, "adapters", adapters, base_experts, base_experts, "experts of the base");
  }
  index max_selected(index, index base_selected) const { return base_selected; }

  template <class T, class B>
  params<T, B> init(index, index, generator&, const std::string&) const {
    return {};
  }
  template <class T, class B>
  saved<T, B> forward(context<B>&, const params<T, B>&, const routing_view<const T, B>& base, index,
                      input<T, B>, mode, const batch_info<T, B>&) const {
    return {base};
  }
  /// Adds dgates to the gradient of the base's gates.
  template <class T, class B>
  void backward(context<B>& ctx, params<T, B>&, const saved<T, B>&, input<T, B>,
                output<T, B> dgates, output<T, B> dbase, output<T, B>, grad_mode,
                const std::type_identity_t<routed_gradient<T, B>>*) const {
    ops::axpy(ctx, T{1}, matrix_view<const T, B>(dgates), matrix_view<T, B>(dbase));
  }
};

static_assert(placement_policy<embedded>);

}  // namespace talpa::placement
