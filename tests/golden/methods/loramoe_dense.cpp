// SPDX-License-Identifier: Apache-2.0
#include "golden/methods/mole.hpp"
#include "golden/runner.hpp"

#include <talpa/selectors/dense.hpp>

#include <algorithm>
#include <string>

namespace talpa::golden {

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
  constexpr const char* reason = "talpa has no localized balance loss";
  check.leave("outputs.blc", reason);
  check.leave("grads.w_route_from_blc", reason);
}

const registration entry("routers/loramoe_dense", loramoe_dense);

}  // namespace

}  // namespace talpa::golden
