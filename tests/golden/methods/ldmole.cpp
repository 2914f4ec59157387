// SPDX-License-Identifier: Apache-2.0
#include "golden/case.hpp"
#include "golden/methods/from_loss.hpp"
#include "golden/runner.hpp"

#include <talpa/cpu/activation.hpp>
#include <talpa/cpu/add.hpp>
#include <talpa/cpu/bias.hpp>
#include <talpa/cpu/copy.hpp>
#include <talpa/cpu/fill.hpp>
#include <talpa/cpu/gemm.hpp>
#include <talpa/cpu/group_loss.hpp>
#include <talpa/cpu/reduce.hpp>
#include <talpa/cpu/routing_sums.hpp>
#include <talpa/cpu/scale.hpp>
#include <talpa/cpu/select.hpp>
#include <talpa/cpu/unit_rows.hpp>
#include <talpa/layers/router.hpp>
#include <talpa/losses/lambda.hpp>
#include <talpa/losses/load_balance.hpp>
#include <talpa/losses/router_z.hpp>
#include <talpa/scorers/linear_scorer.hpp>
#include <talpa/scorers/mlp_scorer.hpp>
#include <talpa/selectors/sparsegen.hpp>

#include <cstdint>

namespace talpa::golden::ldmole_method {

namespace {

using matrix_d = matrix<double, cpu>;

void ldmole(const golden_case& c, checker& check) {
  using ld_router = router<linear_scorer, sparsegen<mlp_scorer<>>>;
  const index experts = c.integer("hparams.num_experts");
  const double epsilon = c.number("hparams.eps");
  const matrix_d x = c.at("inputs.x").rows();
  const matrix_d w1 = c.at("inputs.w1").rows();
  const ld_router layer{
      .scorer = {},
      .selector = {.epsilon = epsilon,
                   .control = {.hidden = w1.rows(), .hidden_bias = true, .bias = true}}};
  ld_router::params<double, cpu> p;
  p.scorer.weight =
      parameter<double, cpu>("weight", c.at("inputs.w_gate", {experts, x.cols()}).rows());
  p.control.down.weight = parameter<double, cpu>("w1", w1);
  p.control.down.bias = parameter<double, cpu>("b1", c.at("inputs.b1", {w1.rows()}).rows());
  p.control.up.weight = parameter<double, cpu>("w2", c.at("inputs.w2", {1, w1.rows()}).rows());
  p.control.up.bias = parameter<double, cpu>("b2", c.at("inputs.b2", {1}).rows());
  context<cpu> ctx;
  const auto kept = layer.forward(ctx, p, experts, x, mode::training, batch_info<double, cpu>{});
  check.equal("outputs.weights", kept.routed.routing.gates, c.forward());

  const tensor lam = c.at("outputs.lam"), active = c.at("outputs.num_active");
  matrix_d lambda(lam.dim(0), lam.dim(1)), number(lam.dim(0), lam.dim(1));
  for (index n = 0; n < x.rows(); ++n) {
    const double size = math::softplus(-kept.routed.control(n, 0)) + epsilon;
    lambda.data()[n] = 1.0 - size;
    for (index e = 0; e < experts; ++e) {
      number.data()[n] += kept.routed.routing.on(n, e) ? 1.0 : 0.0;
    }
  }
  check.equal("outputs.lam", lambda, c.forward());
  check.equal("outputs.num_active", number, c.forward());

  matrix_d dgates = c.at("inputs.upstream").rows(), dx(x.rows(), x.cols());
  layer.backward(ctx, p, kept, x, dgates.view(), dx.view(), grad_mode::overwrite, nullptr);
  check.equal("grads.x", dx, c.gradient());
  check.equal("grads.w_gate", p.scorer.weight.grad(), c.gradient());
  check.equal("grads.w1", p.control.down.weight.grad(), c.gradient());
  check.equal("grads.w2", p.control.up.weight.grad(), c.gradient());

  // The original takes these means over all tokens, also those behind the attention mask (what it
  // does for the sparsity the file does not tell: nothing is lacking in its masked case).
  check.equal("outputs.z_loss", router_z{}.forward(ctx, kept.routed).value(0, 0), c.forward());
  loss_result mean = evaluate(lambda_mean{.epsilon = epsilon}, kept.routed);
  check.equal("outputs.lam_sparse", mean.value, c.forward());
  backward_from(ctx, layer, p, kept, x, mean);
  check.equal("grads.w2_from_lam_sparse", p.control.up.weight.grad(), c.gradient());
  if (c.has("outputs.sparsity")) {
    const lambda_sparsity sparsity{.k = c.integer("hparams.sparsity_k"), .epsilon = epsilon};
    loss_result lacking = evaluate(sparsity, kept.routed);
    check.equal("outputs.sparsity", lacking.value, c.forward());
    backward_from(ctx, layer, p, kept, x, lacking);
    check.equal("grads.w2_from_sparsity", p.control.up.weight.grad(), c.gradient());
  } else {
    // The original fails with k experts or fewer.
    check.account("outputs.sparsity",
                  experts > c.integer("hparams.sparsity_k") ? "is missing in the file" : "");
  }

  // The balance alone honours the attention mask.
  const tensor attention = c.at("inputs.attention_mask", {lambda.rows(), lambda.cols()});
  vector<std::uint8_t, cpu> real(x.rows());
  for (index n = 0; n < x.rows(); ++n) {
    real[n] = attention.data[static_cast<std::size_t>(n)] != 0.0;
  }
  routed_view<double, cpu> masked = kept.routed;
  masked.padding_mask = real.view();
  loss_result even =
      evaluate(load_balance<balance::per_selection, balance::per_layer, affinity::gates>{}, masked);
  check.equal("outputs.balance", even.value, c.forward());
  backward_from(ctx, layer, p, kept, x, even);
  check.equal("grads.w_gate_from_balance", p.scorer.weight.grad(), c.gradient());
}

const registration entry("routers/ldmole", ldmole);

}  // namespace

}  // namespace talpa::golden::ldmole_method
