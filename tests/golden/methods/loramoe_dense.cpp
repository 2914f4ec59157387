// SPDX-License-Identifier: Apache-2.0
#include "golden/methods/mole.hpp"
#include "golden/runner.hpp"

#include <talpa/cpu/group_loss.hpp>
#include <talpa/losses/localized_balance.hpp>
#include <talpa/selectors/dense.hpp>

#include <algorithm>
#include <cstdint>
#include <string>

namespace talpa::golden::loramoe_dense_method {

namespace {

/// `copies` times [R, D], one below the other.
matrix<double, cpu> repeated(const matrix<double, cpu>& block, index copies) {
  matrix<double, cpu> all(copies * block.rows(), block.cols());
  for (index e = 0; e < copies; ++e) {
    std::copy_n(block.data(), block.size(), all.data() + e * block.size());
  }
  return all;
}
/// The sum of its `copies` blocks.
matrix<double, cpu> summed(matrix_view<const double, cpu> bank, index copies) {
  matrix<double, cpu> sum(bank.rows / copies, bank.cols);
  for (index r = 0; r < bank.rows; ++r) {
    for (index d = 0; d < bank.cols; ++d) sum(r % sum.rows(), d) += bank(r, d);
  }
  return sum;
}

/// The localized balance loss of the file and its gradient by the weight of the router.
void localized(const golden_case& c, checker& check, index experts, index rank, index copies) {
  const matrix<double, cpu> x = c.at("inputs.x").rows();
  const tensor types = c.at("inputs.task_types");
  vector<std::int32_t, cpu> labels(static_cast<index>(types.data.size()));
  for (index s = 0; s < labels.size(); ++s) {
    labels[s] = static_cast<std::int32_t>(types.data[static_cast<std::size_t>(s)]);
  }
  const mole<dense> layer =
      make_mole(dense{}, experts, rank, c.number("hparams.scaling"), strategy::dense_masked);
  auto p = mole_params<dense>(c.at("inputs.W").rows(), c.at("inputs.w_route").rows(),
                              repeated(c.at("inputs.A").rows(), copies),
                              c.at("inputs.B").transposed_blocks());
  batch_info<double, cpu> batch;
  batch.sequence_length = x.rows() / labels.size();
  batch.labels = labels.view();
  context<cpu> ctx;
  matrix<double, cpu> y(x.rows(), p.base.weight.value().rows), dx(x.rows(), x.cols()), dy = y;
  const auto kept = layer.forward(ctx, p, x, y.view(), mode::training, batch);

  const localized_balance loss{.delta = c.number("hparams.blc_alpha")};
  const auto balanced = loss.forward(ctx, kept.routed);
  matrix<double, cpu> weight(1, 1), dlogits(x.rows(), experts), dgates(x.rows(), experts);
  weight(0, 0) = c.number("hparams.blc_weight");
  loss.backward(ctx, kept.routed, balanced, weight, {dlogits.view(), dgates.view(), {}},
                grad_mode::overwrite);
  const routed_gradient<double, cpu> from_losses{dlogits.view(), dgates.view(), {}};
  layer.backward(ctx, p, kept, x, dy, dx.view(), grad_mode::overwrite, &from_losses);
  check.equal("outputs.blc", weight(0, 0) * balanced.value(0, 0), float32_inside);
  check.equal("grads.w_route_from_blc", p.router.scorer.weight.grad(), float32_inside);
}

void loramoe_dense(const golden_case& c, checker& check) {
  const index experts = c.integer("hparams.num_experts"), rank = c.integer("hparams.lora_r");
  const matrix<double, cpu> x = c.at("inputs.x").rows(), dy = c.at("inputs.upstream").rows();
  // HydraLoRA shares one A: experts with equal A compute the same, and the gradient of the shared
  // one is the sum of theirs.
  const std::string arch = c.text("hparams.arch");
  if (arch != "loramoe" && arch != "hydralora") {
    throw malformed("'hparams.arch' is '" + arch + "'");
  }
  const bool shared = arch == "hydralora";
  const index copies = shared ? experts : 1;
  c.at("inputs.A", {shared ? 1 : experts, rank, x.cols()});
  c.at("inputs.B", {experts, dy.cols(), rank});
  for (const strategy execution : {strategy::dense_masked, strategy::grouped}) {
    const mole<dense> layer =
        make_mole(dense{}, experts, rank, c.number("hparams.scaling"), execution);
    auto p = mole_params<dense>(c.at("inputs.W", {dy.cols(), x.cols()}).rows(),
                                c.at("inputs.w_route", {experts, x.cols()}).rows(),
                                repeated(c.at("inputs.A").rows(), copies),
                                c.at("inputs.B").transposed_blocks());
    context<cpu> ctx;
    matrix<double, cpu> y(x.rows(), dy.cols()), dx(x.rows(), x.cols());
    const auto kept = layer.forward(ctx, p, x, y.view(), mode::training);
    layer.backward(ctx, p, kept, x, dy, dx.view(), grad_mode::overwrite);
    // The original computes the softmax in float32.
    check.equal("outputs.output", y, float32_inside);
    check.equal("outputs.weights", kept.routed.routing.gates, float32_inside);
    check.equal("grads.x", dx, float32_inside);
    check.equal("grads.w_route", p.router.scorer.weight.grad(), float32_inside);
    check.equal("grads.A", summed(p.expert.a.grad(), copies), float32_inside);
    check.equal("grads.B", in_blocks(p.expert.b.grad(), experts), float32_inside);
  }
  if (c.number("hparams.blc_weight") == 0.0) {
    check.equal("outputs.blc", 0.0, {});  // nothing is added
    return;
  }
  localized(c, check, experts, rank, copies);
}

const registration entry("routers/loramoe_dense", loramoe_dense);

}  // namespace

}  // namespace talpa::golden::loramoe_dense_method
