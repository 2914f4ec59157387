// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "golden/case.hpp"

#include <talpa/cpu/add.hpp>
#include <talpa/cpu/fill.hpp>
#include <talpa/cpu/group_loss.hpp>
#include <talpa/cpu/routing_sums.hpp>
#include <talpa/layers/router.hpp>

// A loss of one routing, its gradients, and what they do to the parameters of a router.

namespace talpa::golden {

struct loss_result {
  double value = 0.0;
  matrix<double, cpu> dlogits, dgates, dcontrol;  // dcontrol empty without a control
  matrix<double, cpu> dclean, ddeviation;         // empty without noise

  routed_gradient<double, cpu> gradient() {
    return {dlogits.view(), dgates.view(), dcontrol.view(), {dclean.view(), ddeviation.view()}};
  }
};

/// The value of a loss, and `coefficient` times its gradients.
template <class Loss>
loss_result evaluate(const Loss& loss, const routed_view<double, cpu>& routed,
                     double coefficient = 1.0) {
  context<cpu> ctx(1);
  const auto kept = loss.forward(ctx, routed);
  loss_result found;
  found.value = kept.value(0, 0);
  found.dlogits = matrix<double, cpu>(routed.logits.rows, routed.logits.cols);
  found.dgates = found.dlogits;
  found.dcontrol = matrix<double, cpu>(routed.control.rows, routed.control.cols);
  found.dclean = matrix<double, cpu>(routed.noise.deviation.rows, routed.noise.deviation.cols);
  found.ddeviation = found.dclean;
  matrix<double, cpu> upstream(1, 1);
  upstream(0, 0) = coefficient;
  loss.backward(ctx, routed, kept, upstream, found.gradient(), grad_mode::overwrite);
  return found;
}

/// The gradients of a router's parameters p by a loss alone.
template <class Router>
void backward_from(context<cpu>& ctx, const Router& layer,
                   typename Router::template params<double, cpu>& p,
                   const typename Router::template saved<double, cpu>& kept,
                   matrix_view<const double, cpu> x, loss_result& loss) {
  p.visit([&](parameter<double, cpu>& each) { each.zero_grad(ctx); });
  matrix<double, cpu> nothing(kept.routed.logits.rows, kept.routed.logits.cols);
  const routed_gradient<double, cpu> gradient = loss.gradient();
  layer.backward(ctx, p, kept, x, nothing.view(), {}, grad_mode::ignore, &gradient);
}

}  // namespace talpa::golden
