// SPDX-License-Identifier: Apache-2.0
#include "golden/methods/moe.hpp"
#include "golden/runner.hpp"

#include <talpa/cpu/sequence_rows.hpp>
#include <talpa/layers/parrot_block.hpp>

#include <string>

namespace talpa::golden::parrot_moe_method {

namespace {

/// y = scale mixture + residual x, for one pair of text and image.
void compare(const golden_case& c, checker& check, double scale, double residual) {
  const index experts = c.integer("hyper.E"), width = c.integer("hyper.C");
  const matrix<double, cpu> x = c.at("inputs.visual").rows(), dy = c.at("inputs.cotangent").rows();
  const matrix<double, cpu> text(matrix_view<const double, cpu>(c.at("inputs.text").data.data(),
                                                                c.integer("hyper.Lt"), width));
  const parrot_block layer{.expert = {.hidden = c.integer("hyper.F")},
                           .experts = experts,
                           .scale = scale,
                           .residual = residual};
  parrot_block::params<double, cpu> p;
  p.router.scorer.weight = parameter<double, cpu>("weight", c.at("params.gate").rows());
  p.expert = swiglu_bank(c, "params.experts");
  p.expert.train();
  matrix<double, cpu> y(x.rows(), width), dx(x.rows(), width), dtext(text.rows(), width);
  batch_info<double, cpu> batch;
  batch.conditioning = {text.view(), {}, dtext.view()};
  context<cpu> ctx;
  const auto kept = layer.forward(ctx, p, x, y.view(), mode::training, batch);
  check.equal("outputs.y", y, c.forward());
  if (c.has("outputs.attention")) {
    check.equal("outputs.attention", kept.router.scorer.attention, c.forward());
    check.equal("outputs.fused", kept.router.scorer.summary, c.forward());
    check.equal("outputs.routing_weights", kept.routed.routing.gates.row_range(0, 1), c.forward());
  }
  check.equal("loss.total", inner_product(y, dy), c.forward());
  layer.backward(ctx, p, kept, x, dy, dx.view(), grad_mode::overwrite);
  check.equal("grads.visual", dx, c.gradient());
  check.equal("grads.text", dtext, c.gradient());
  check.equal("grads.gate", p.router.scorer.weight.grad(), c.gradient());
  check.equal("grads.experts.gate_proj", p.expert.gate.grad(), c.gradient());
  check.equal("grads.experts.up_proj", p.expert.up.grad(), c.gradient());
  check.equal("grads.experts.down_proj", in_blocks(p.expert.down.grad(), experts), c.gradient());
}

void parrot_moe(const golden_case& c, checker& check) {
  // Without the module, as in stage 1, y = x.
  if (!c.flag("hyper.use_moe")) return compare(c, check, 0.0, 1.0);
  compare(c, check, 1.0, c.flag("hyper.residual") ? c.number("hyper.moe_weight") : 0.0);
}
void parrot_moe_paper(const golden_case& c, checker& check) {
  compare(c, check, c.number("hyper.moe_weight"), 1.0);
}

const registration entries[] = {{"perft/parrot_moe", parrot_moe},
                                {"perft/parrot_moe_paper", parrot_moe_paper}};

}  // namespace

}  // namespace talpa::golden::parrot_moe_method
