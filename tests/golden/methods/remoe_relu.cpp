// SPDX-License-Identifier: Apache-2.0
#include "golden/case.hpp"
#include "golden/methods/from_loss.hpp"
#include "golden/runner.hpp"

#include <talpa/cpu/routing_sums.hpp>
#include <talpa/cpu/select.hpp>
#include <talpa/losses/load_balance.hpp>
#include <talpa/optim/sparsity_controller.hpp>
#include <talpa/routing/statistics.hpp>
#include <talpa/selectors/rectified.hpp>

namespace talpa::golden::remoe_relu_method {

namespace {

void remoe(const golden_case& c, checker& check) {
  const matrix<double, cpu> u = c.at("inputs.logits").rows();
  const matrix<double, cpu> upstream = c.at("inputs.upstream").rows();
  context<cpu> ctx;
  routing<double, cpu> r(u.rows(), u.cols());
  matrix<double, cpu> du(u.rows(), u.cols());
  ops::select(ctx, rectified{}, u, {}, r.gates.view(), r.mask.view());
  ops::select_backward(ctx, rectified{}, u, r.gates.view(), r.mask.view(), upstream, du.view());
  check.equal("outputs.weights", r.gates, c.forward());
  check.equal("grads.logits", du, c.gradient());

  const routed_view<double, cpu> routed{u.view(),
                                        routing_view<double, cpu>(r.gates.view(), r.mask.view())};
  const statistics_report report(measure<double, cpu>(ctx, routed));
  check.equal("outputs.sparsity", sparsity_controller::sparsity(report), c.forward());
  const double coefficient = c.number("hparams.l1_coeff");
  sparsity_controller controller{.k = c.number("hparams.target_topk"), .coefficient = coefficient};
  controller.step(report);
  check.equal("outputs.next_l1_coeff", controller.coefficient, c.forward());

  const load_balance<balance::per_target, balance::per_layer, affinity::gates> l1{
      .fraction = {.k = c.integer("hparams.target_topk")}};
  const loss_result found = evaluate(l1, routed, coefficient);
  check.equal("outputs.l1", coefficient * found.value, c.forward());
  ops::select_backward(ctx, rectified{}, u, r.gates.view(), r.mask.view(), found.dgates, du.view());
  for (index i = 0; i < du.size(); ++i) du.data()[i] += found.dlogits.data()[i];
  check.equal("grads.logits_from_l1", du, c.gradient());
}

const registration entry("routers/remoe_relu", remoe);

}  // namespace

}  // namespace talpa::golden::remoe_relu_method
