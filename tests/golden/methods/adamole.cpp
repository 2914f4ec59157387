// SPDX-License-Identifier: Apache-2.0
#include "golden/case.hpp"
#include "golden/methods/from_loss.hpp"
#include "golden/runner.hpp"

#include <talpa/cpu/add.hpp>
#include <talpa/cpu/bias.hpp>
#include <talpa/cpu/copy.hpp>
#include <talpa/cpu/fill.hpp>
#include <talpa/cpu/gemm.hpp>
#include <talpa/cpu/reduce.hpp>
#include <talpa/cpu/scale.hpp>
#include <talpa/cpu/select.hpp>
#include <talpa/layers/router.hpp>
#include <talpa/losses/load_balance.hpp>
#include <talpa/scorers/linear_scorer.hpp>
#include <talpa/selectors/learned_threshold.hpp>
#include <talpa/selectors/threshold.hpp>

#include <string>

namespace talpa::golden::adamole_method {

namespace {

using matrix_d = matrix<double, cpu>;

template <class Selector, class Loss>
void run(const golden_case& c, checker& check, const Selector& selector, const Loss& balance_loss) {
  const index experts = c.integer("hparams.num_experts");
  const matrix_d x = c.at("inputs.x").rows();
  const router<linear_scorer, Selector> layer{.scorer = {}, .selector = selector};
  typename router<linear_scorer, Selector>::template params<double, cpu> p;
  p.scorer.weight =
      parameter<double, cpu>("weight", c.at("inputs.w_gate", {experts, x.cols()}).rows());
  if constexpr (controlled_selector<Selector>) {
    p.control.weight = parameter<double, cpu>("w_th", c.at("inputs.w_th", {1, x.cols()}).rows());
    p.control.bias = parameter<double, cpu>("b_th", c.at("inputs.b_th", {1}).rows());
  }
  context<cpu> ctx;
  const auto kept = layer.forward(ctx, p, experts, x, mode::training, batch_info<double, cpu>{});
  check.equal("outputs.weights", kept.routed.routing.gates, c.forward());
  matrix_d dgates = c.at("inputs.upstream", {x.rows(), experts}).rows(), dx(x.rows(), x.cols());
  layer.backward(ctx, p, kept, x, dgates.view(), dx.view(), grad_mode::overwrite, nullptr);
  check.equal("grads.x", dx, c.gradient());
  check.equal("grads.w_gate", p.scorer.weight.grad(), c.gradient());
  if constexpr (controlled_selector<Selector>) {
    check.equal("grads.w_th", p.control.weight.grad(), c.gradient());
    check.equal("grads.b_th", p.control.bias.grad(), c.gradient());
  }
  // The original forms the shares of experts in float32.
  loss_result even = evaluate(balance_loss, kept.routed);
  check.equal("outputs.balance", even.value, float32_inside);
  backward_from(ctx, layer, p, kept, x, even);
  check.equal("grads.w_gate_from_balance", p.scorer.weight.grad(), float32_inside);
  if constexpr (controlled_selector<Selector>) {
    check.equal("grads.w_th_from_balance", p.control.weight.grad(), float32_inside);
  }
}

void adamole(const golden_case& c, checker& check) {
  const std::string kind = c.text("hparams.mode");
  const double most = c.number("hparams.threshold");
  if (kind == "adaptive") {
    const double relative = most * static_cast<double>(c.integer("hparams.num_experts"));
    run(c, check, learned_threshold<linear_scorer>{.relative = relative, .control = {.bias = true}},
        load_balance<balance::per_token, balance::per_layer, affinity::margin>{
            .affinity = {.relative = relative}});
  } else if (kind == "fixed") {
    run(c, check, threshold<gate::renormalised>{.least = most},
        load_balance<balance::per_token, balance::per_layer>{});
  } else {
    throw malformed("'hparams.mode' is " + kind);
  }
}

const registration entry("routers/adamole", adamole);

}  // namespace

}  // namespace talpa::golden::adamole_method
