// SPDX-License-Identifier: Apache-2.0
#include "golden/case.hpp"
#include "golden/runner.hpp"

#include <talpa/cpu/routing_sums.hpp>
#include <talpa/cpu/select.hpp>
#include <talpa/optim/sparsity_controller.hpp>
#include <talpa/routing/statistics.hpp>
#include <talpa/selectors/rectified.hpp>

namespace talpa::golden {

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
  sparsity_controller controller{.k = c.number("hparams.target_topk"),
                                 .coefficient = c.number("hparams.l1_coeff")};
  controller.step(report);
  check.equal("outputs.next_l1_coeff", controller.coefficient, c.forward());
  for (const char* field : {"outputs.l1", "grads.logits_from_l1"}) {
    check.leave(field, "the L1 loss of rectified gates is not a loss of the library");
  }
}

const registration entry("routers/remoe_relu", remoe);

}  // namespace

}  // namespace talpa::golden
