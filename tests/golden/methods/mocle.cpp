// SPDX-License-Identifier: Apache-2.0
#include "golden/case.hpp"
#include "golden/runner.hpp"

#include <talpa/cpu/add.hpp>
#include <talpa/cpu/bias.hpp>
#include <talpa/cpu/copy.hpp>
#include <talpa/cpu/fill.hpp>
#include <talpa/cpu/gemm.hpp>
#include <talpa/cpu/noise.hpp>
#include <talpa/cpu/reduce.hpp>
#include <talpa/cpu/scale.hpp>
#include <talpa/cpu/select.hpp>
#include <talpa/cpu/sequence_rows.hpp>
#include <talpa/layers/router.hpp>
#include <talpa/scorers/cluster_scorer.hpp>
#include <talpa/selectors/top_k.hpp>

#include <cstdint>

namespace talpa::golden::mocle_method {

namespace {

void mocle(const golden_case& c, checker& check) {
  using mocle_router = router<cluster_scorer, top_k<gate::raw>>;
  if (c.flag("hparams.training")) throw malformed("'hparams.training' needs the original's noise");
  const index experts = c.integer("hparams.num_experts");
  const matrix<double, cpu> embedding = c.at("inputs.emb").rows();
  const index sequences = embedding.rows(), width = embedding.cols();
  // One token a sequence, and a cluster for each: its row of the table is what the file gives.
  const mocle_router layer{.scorer = {.clusters = sequences,
                                      .width = width,
                                      .temperature = c.number("hparams.temperature"),
                                      .noise = 0.1},
                           .selector = {.k = c.integer("hparams.top_k")}};
  mocle_router::params<double, cpu> p;
  p.scorer.embedding = parameter<double, cpu>("embedding", embedding);
  p.scorer.gate.weight =
      parameter<double, cpu>("weight", c.at("inputs.w_gate", {experts, width}).rows());
  p.scorer.gate.bias = parameter<double, cpu>("bias", c.at("inputs.b_gate", {experts}).rows());
  vector<std::int32_t, cpu> labels(sequences);
  for (index s = 0; s < sequences; ++s) labels[s] = static_cast<std::int32_t>(s);
  batch_info<double, cpu> batch;
  batch.sequence_length = 1;
  batch.labels = labels.view();
  context<cpu> ctx;
  const matrix<double, cpu> x(sequences, 1);
  const auto kept = layer.forward(ctx, p, experts, x, mode::inference, batch);
  check.equal("outputs.gates", kept.routed.routing.gates, c.forward());
  matrix<double, cpu> rest(1, sequences);
  for (index s = 0; s < sequences; ++s) {
    double sum = 0.0;
    for (index e = 0; e < experts; ++e) sum += kept.routed.routing.gates(s, e);
    rest(0, s) = 1.0 - sum;
  }
  check.equal("outputs.universal_weight", rest, c.forward());
  matrix<double, cpu> dgates = c.at("inputs.upstream", {sequences, experts}).rows();
  layer.backward(ctx, p, kept, x, dgates.view(), {}, grad_mode::ignore, nullptr);
  check.equal("grads.w_gate", p.scorer.gate.weight.grad(), c.gradient());
}

const registration entry("routers/mocle", mocle);

}  // namespace

}  // namespace talpa::golden::mocle_method
