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
#include <talpa/cpu/routing_sums.hpp>
#include <talpa/cpu/scale.hpp>
#include <talpa/cpu/select.hpp>
#include <talpa/layers/router.hpp>
#include <talpa/losses/load_balance.hpp>
#include <talpa/optim/expert_bias.hpp>
#include <talpa/routing/statistics.hpp>
#include <talpa/scorers/linear_scorer.hpp>
#include <talpa/selectors/biased_top_k.hpp>
#include <talpa/selectors/top_k.hpp>

#include <algorithm>
#include <string>
#include <vector>

namespace talpa::golden::deepseek_v3_gate_method {

namespace {

using matrix_d = matrix<double, cpu>;

template <class Selector>
void run(const golden_case& c, checker& check, tolerance forward, tolerance gradient) {
  const index experts = c.integer("hparams.num_experts"), k = c.integer("hparams.top_k");
  const matrix_d x = c.at("inputs.x").rows();
  const router<linear_scorer, Selector> layer{
      .scorer = {},
      .selector = {.k = k,
                   .n_groups = c.integer("hparams.n_groups"),
                   .topk_groups = c.integer("hparams.topk_groups"),
                   .scale = c.number("hparams.route_scale")}};
  typename router<linear_scorer, Selector>::template params<double, cpu> p;
  p.scorer.weight =
      parameter<double, cpu>("weight", c.at("inputs.w_gate", {experts, x.cols()}).rows());
  const bool biased = c.has("inputs.bias");
  p.expert_bias = parameter<double, cpu>(
      "bias", biased ? c.at("inputs.bias", {experts}).rows() : matrix_d(1, experts));
  p.expert_bias.freeze();
  context<cpu> ctx;
  const auto kept = layer.forward(ctx, p, experts, x, mode::training, batch_info<double, cpu>{});

  const tensor chosen = c.at("outputs.experts", {x.rows(), k});
  const matrix_d upstream = c.at("inputs.upstream", {x.rows(), k}).rows();
  matrix_d weights(x.rows(), k), dgates(x.rows(), experts), dx(x.rows(), x.cols());
  std::string problem;
  for (index n = 0; n < x.rows(); ++n) {
    index count = 0;
    for (index e = 0; e < experts; ++e) count += kept.routed.routing.on(n, e) ? 1 : 0;
    for (index j = 0; j < k; ++j) {
      const auto e = static_cast<index>(chosen.data[static_cast<std::size_t>(n * k + j)]);
      if (count != k || !kept.routed.routing.on(n, e)) {
        problem = "token " + std::to_string(n) + " has other experts";
      }
      weights(n, j) = kept.routed.routing.gates(n, e);
      dgates(n, e) = upstream(n, j);
    }
  }
  check.account("outputs.experts", problem);
  check.equal("outputs.topk_weights", weights, forward);
  layer.backward(ctx, p, kept, x, dgates.view(), dx.view(), grad_mode::overwrite, nullptr);
  check.equal("grads.x", dx, gradient);
  check.equal("grads.w_gate", p.scorer.weight.grad(), gradient);
  if (c.has("grads.bias")) {
    check.equal("grads.bias", matrix_d(1, experts), gradient);  // constant for the library
  }

  const statistics_report report(measure<double, cpu>(ctx, kept.routed));
  matrix_d counts(1, experts);
  for (index e = 0; e < experts; ++e) {
    counts(0, e) = static_cast<double>(report.counts[static_cast<std::size_t>(e)]);
  }
  check.equal("outputs.counts", counts, c.forward());
  if (c.has("outputs.next_bias")) {
    update_bias(p.expert_bias.value(), report.counts, c.number("hparams.bias_rate"));
    check.equal("outputs.next_bias", p.expert_bias.value(), c.forward());
  }
}

/// The balance of the one sequence of a case. It looks at the k largest scores, not at the choice
/// with bias and groups, and takes sigmoid scores whatever the gates are made of.
void sequence_balance(const golden_case& c, checker& check) {
  const index experts = c.integer("hparams.num_experts");
  const double alpha = c.number("hparams.seq_balance_alpha");
  const matrix_d x = c.at("inputs.x").rows();
  using plain = router<linear_scorer, top_k<gate::raw>>;
  const plain layer{.scorer = {}, .selector = {.k = c.integer("hparams.top_k")}};
  plain::params<double, cpu> p;
  p.scorer.weight =
      parameter<double, cpu>("weight", c.at("inputs.w_gate", {experts, x.cols()}).rows());
  context<cpu> ctx;
  const auto kept = layer.forward(ctx, p, experts, x, mode::training, batch_info<double, cpu>{});
  loss_result even =
      evaluate(load_balance<balance::per_selection, balance::per_sequence, affinity::sigmoid>{},
               kept.routed, alpha);
  check.equal("outputs.seq_balance", alpha * even.value, c.forward());
  backward_from(ctx, layer, p, kept, x, even);
  check.equal("grads.w_gate_from_seq_balance", p.scorer.weight.grad(), c.gradient());
}

void deepseek(const golden_case& c, checker& check) {
  const std::string kind = c.text("hparams.score");
  if (kind == "sigmoid") {
    run<biased_top_k<score::sigmoid>>(c, check, c.forward(), c.gradient());
  } else if (kind == "softmax") {
    // The original takes this softmax in float32.
    run<biased_top_k<score::softmax, gate::raw>>(c, check, float32_inside, float32_inside);
  } else {
    throw malformed("'hparams.score' is " + kind);
  }
  sequence_balance(c, check);
}

const registration entry("routers/deepseek_v3_gate", deepseek);

}  // namespace

}  // namespace talpa::golden::deepseek_v3_gate_method
