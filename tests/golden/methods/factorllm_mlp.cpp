// SPDX-License-Identifier: Apache-2.0
#include "golden/methods/moe.hpp"
#include "golden/runner.hpp"

#include <talpa/cpu/expert_errors.hpp>
#include <talpa/cpu/unit_rows.hpp>
#include <talpa/layers/dense_ffn.hpp>
#include <talpa/layers/factored_ffn.hpp>
#include <talpa/losses/prior_approximate.hpp>
#include <talpa/losses/top_k_mass.hpp>

#include <string>
#include <vector>

namespace talpa::golden::factorllm_mlp_method {

namespace {

using hard = router<linear_scorer, top_k<gate::hard>>;
using student = factored_ffn<hard, rescale::floored>;

template <class T>
matrix<double, cpu> bits_of(const routing_view<T, cpu>& routing) {
  matrix<double, cpu> bits(routing.tokens(), routing.experts());
  for (index n = 0; n < bits.rows(); ++n) {
    for (index e = 0; e < bits.cols(); ++e) bits(n, e) = routing.on(n, e) ? 1.0 : 0.0;
  }
  return bits;
}

/// The dense network of a case, frozen; its down projection is one block [D, F].
swiglu::params<double, cpu> dense_network(const golden_case& c) {
  swiglu::params<double, cpu> p;
  p.gate = parameter<double, cpu>("gate", c.at("params.dense.gate_proj").rows());
  p.up = parameter<double, cpu>("up", c.at("params.dense.up_proj").rows());
  tensor down = c.at("params.dense.down_proj");
  down.shape.insert(down.shape.begin(), 1);
  p.down = parameter<double, cpu>("down", down.transposed_blocks());
  p.freeze();
  return p;
}

/// A loss of rows first .. first + count - 1 and, times `weight`, its gradient added to `out`.
template <class Loss>
double loss_of(context<cpu>& ctx, const Loss& loss, const routed_view<double, cpu>& routed,
               index first, index count, double weight, const routed_gradient<double, cpu>& out) {
  routed_view<double, cpu> part = routed;
  part.logits = routed.logits.row_range(first, count);
  part.routing = {routed.routing.gates.row_range(first, count),
                  routed.routing.mask.row_range(first, count)};
  const routed_gradient<double, cpu> part_out{out.dlogits.row_range(first, count),
                                              out.dgates.row_range(first, count)};
  matrix<double, cpu> upstream(1, 1);
  upstream(0, 0) = weight;
  const auto kept = loss.forward(ctx, part);
  loss.backward(ctx, part, kept, upstream, part_out, grad_mode::accumulate);
  return kept.value(0, 0);
}

void factorllm_mlp(const golden_case& c, checker& check) {
  const index experts = c.integer("hyper.E");
  const student layer{.router = {.scorer = {.bias = true}, .selector = {.k = c.integer("hyper.k")}},
                      .experts = experts};
  const auto dense = dense_network(c);
  std::vector<index> order;
  for (index i = 0; i < c.length("neuron_index"); ++i) {
    order.push_back(c.integer("neuron_index." + std::to_string(i)));
  }
  generator random(1);
  auto p = layer.split(dense, given_split(order, experts), random);
  if (c.has("params.experts.gate_proj")) {
    p.expert = swiglu_bank(c, "params.experts");
    p.expert.train();
  }
  p.router.scorer.weight = parameter<double, cpu>("weight", c.at("params.route1.weight").rows());
  p.router.scorer.bias = parameter<double, cpu>("bias", c.at("params.route1.bias").rows());

  // The student on its own tokens x.
  const matrix<double, cpu> x = c.at("inputs.x").rows(), dy = c.at("inputs.cotangent").rows();
  const bool same = c.flag("hyper.gt_is_x");
  const matrix<double, cpu> h = same ? x : c.at("inputs.gt_hidden").rows();
  const index tokens = x.rows(), width = x.cols();
  matrix<double, cpu> y(tokens, width), dx(tokens, width), teacher(tokens, width);
  context<cpu> ctx;
  const auto kept = layer.forward(ctx, p, x, y.view(), mode::training);
  check.equal("outputs.y", y, c.forward());
  check.equal("outputs.student_mask", bits_of(kept.routed.routing), c.forward());
  layer.backward(ctx, p, kept, x, dy, dx.view(), grad_mode::overwrite);

  // Teacher, labels and losses on h.
  dense_ffn<>{}.forward(ctx, dense, h, teacher.view(), mode::inference);
  check.equal("outputs.teacher_out", teacher, c.forward());
  const auto labels = layer.label(ctx, p, h, teacher);
  check.equal("outputs.expert_mse", labels.errors, c.forward());
  check.equal("outputs.pseudo_label", bits_of(labels.chosen), c.forward());
  const auto on_h = layer.router.forward(ctx, p.router, experts, h, mode::training, {});
  routed_view<double, cpu> labelled = on_h.routed;
  labelled.routing = labels.chosen;
  matrix<double, cpu> dlogits(tokens, experts), dgates(tokens, experts), dh(tokens, width);
  const routed_gradient<double, cpu> losses{dlogits.view(), dgates.view()};
  const double route_weight = c.number("hyper.route_weight");
  const double balance_weight = c.number("hyper.balance_weight");
  const double balance = loss_of(ctx, top_k_mass{}, on_h.routed, 0, tokens, balance_weight, losses);
  check.equal("outputs.balance_loss", balance, c.forward());
  // The original takes the mean over one sequence's tokens, but of a batch returns the first
  // sequence's tokens one by one.
  double route = 0.0;
  if (c.integer("hyper.B") == 1) {
    route = loss_of(ctx, prior_approximate{}, labelled, 0, tokens, route_weight, losses);
    check.equal("outputs.route_loss", route, c.forward());
  } else {
    matrix<double, cpu> each(1, c.integer("hyper.L"));
    for (index n = 0; n < each.cols(); ++n) {
      each(0, n) = loss_of(ctx, prior_approximate{}, labelled, n, 1, route_weight, losses);
      route += each(0, n);
    }
    check.equal("outputs.route_loss", each, c.forward());
  }
  check.equal("loss.total", inner_product(y, dy) + route_weight * route + balance_weight * balance,
              c.forward());

  matrix<double, cpu> no_dgates(tokens, experts);
  layer.router.backward(ctx, p.router, on_h, h, no_dgates.view(), dh.view(), grad_mode::overwrite,
                        &losses);
  if (same) {
    for (index i = 0; i < dx.size(); ++i) dx.data()[i] += dh.data()[i];
  } else {
    check.equal("grads.gt_hidden", dh, c.gradient());
  }
  check.equal("grads.x", dx, c.gradient());
  check.equal("grads.route1.weight", p.router.scorer.weight.grad(), c.gradient());
  check.equal("grads.route1.bias", p.router.scorer.bias.grad(), c.gradient());
  check.equal("grads.experts.gate_proj", p.expert.gate.grad(), c.gradient());
  check.equal("grads.experts.up_proj", p.expert.up.grad(), c.gradient());
  check.equal("grads.experts.down_proj", in_blocks(p.expert.down.grad(), experts), c.gradient());
}

const registration entry{"perft/factorllm_mlp", factorllm_mlp};

}  // namespace

}  // namespace talpa::golden::factorllm_mlp_method
