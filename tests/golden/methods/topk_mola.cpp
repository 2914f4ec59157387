// SPDX-License-Identifier: Apache-2.0
#include "golden/methods/chosen.hpp"
#include "golden/methods/mole.hpp"
#include "golden/runner.hpp"

#include <talpa/cpu/group_loss.hpp>
#include <talpa/cpu/routing_sums.hpp>
#include <talpa/losses/load_balance.hpp>
#include <talpa/selectors/top_k.hpp>

#include <cstdint>
#include <string>
#include <vector>

namespace talpa::golden::topk_mola_method {

namespace {

using selector = top_k<gate::renormalised>;

/// Value and gradient of one form of the balance loss, through router and scorer.
template <class Loss>
void compare_balance(const golden_case& c, checker& check, const std::string& name,
                     const Loss& loss, context<cpu>& ctx, const mole<selector>& layer,
                     const mole<selector>::saved<double, cpu>& kept, const matrix<double, cpu>& x) {
  auto p = mole_params<selector>(matrix<double, cpu>(c.at("inputs.upstream").dim(1), x.cols()),
                                 c.at("inputs.w_gate").rows(), c.at("inputs.A").rows(),
                                 c.at("inputs.B").transposed_blocks());
  const auto found = loss.forward(ctx, kept.routed);
  matrix<double, cpu> one(1, 1), dlogits(x.rows(), layer.experts), dgates(x.rows(), layer.experts);
  one(0, 0) = 1.0;
  const routed_gradient<double, cpu> gradient{dlogits.view(), dgates.view()};
  loss.backward(ctx, kept.routed, found, one, gradient, grad_mode::overwrite);
  const matrix<double, cpu> nothing(x.rows(), p.base.weight.rows());
  layer.backward(ctx, p, kept, x, nothing, {}, grad_mode::ignore, &gradient);
  // The originals form the shares of experts in float32.
  check.equal("outputs." + name, found.value(0, 0), float32_inside);
  check.equal("grads.w_gate_from_" + name, p.router.scorer.weight.grad(), float32_inside);
}

void topk_mola(const golden_case& c, checker& check) {
  const index experts = c.integer("hparams.num_experts"), k = c.integer("hparams.top_k");
  const index rank = c.integer("hparams.lora_r");
  const matrix<double, cpu> x = c.at("inputs.x").rows(), dy = c.at("inputs.upstream").rows();
  const tensor chosen = c.at("outputs.experts", {x.rows(), k});
  const bool ties = c.flag("ties");
  c.at("inputs.A", {experts, rank, x.cols()});
  c.at("inputs.B", {experts, dy.cols(), rank});
  for (const strategy execution : {strategy::dense_masked, strategy::grouped}) {
    const mole<selector> layer =
        make_mole(selector{.k = k}, experts, rank, c.number("hparams.scaling"), execution);
    // The reference adds the delta to a residual: a base of zeros leaves the delta alone.
    auto p = mole_params<selector>(matrix<double, cpu>(dy.cols(), x.cols()),
                                   c.at("inputs.w_gate", {experts, x.cols()}).rows(),
                                   c.at("inputs.A").rows(), c.at("inputs.B").transposed_blocks());
    context<cpu> ctx;
    matrix<double, cpu> y(x.rows(), dy.cols()), dx(x.rows(), x.cols());
    auto kept = layer.forward(ctx, p, x, y.view(), mode::training);
    check.account("outputs.experts", compare_experts(kept.routed, chosen, ties));
    const matrix<std::uint32_t, cpu> recorded = mask_of(chosen, experts);
    if (ties) {
      // Which of equal logits win is the implementation's choice: go on with the file's.
      kept = layer.forward(ctx, p, x, y.view(), mode::training, {.replay = recorded.view()});
    }
    matrix<double, cpu> weights(x.rows(), k);
    for (index i = 0; i < chosen.size(); ++i) {
      weights(i / k, i % k) = kept.routed.routing.gates(
          i / k, static_cast<index>(chosen.data[static_cast<std::size_t>(i)]));
    }
    check.equal("outputs.topk_weights", weights, c.forward());
    check.equal("outputs.delta", y, c.forward());
    layer.backward(ctx, p, kept, x, dy, dx.view(), grad_mode::overwrite);
    check.equal("grads.x", dx, c.gradient());
    check.equal("grads.w_gate", p.router.scorer.weight.grad(), c.gradient());
    check.equal("grads.A", p.expert.a.grad(), c.gradient());
    check.equal("grads.B", in_blocks(p.expert.b.grad(), experts), c.gradient());
    compare_balance(c, check, "balance_mola",
                    load_balance<balance::per_selection, balance::per_layer>{}, ctx, layer, kept,
                    x);
    compare_balance(c, check, "balance_mixtral", load_balance<balance::per_rank, balance::pooled>{},
                    ctx, layer, kept, x);
  }
}

const registration entry("routers/topk_mola", topk_mola);

}  // namespace

}  // namespace talpa::golden::topk_mola_method
