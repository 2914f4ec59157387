// SPDX-License-Identifier: Apache-2.0
#include "golden/methods/by_mass.hpp"
#include "golden/runner.hpp"

#include <talpa/losses/load_balance.hpp>
#include <talpa/selectors/top_p.hpp>

namespace talpa::golden::topp_huang_method {

namespace {

void topp_huang(const golden_case& c, checker& check) {
  const matrix<double, cpu> u = c.at("inputs.logits").rows();
  const index tokens = u.rows(), experts = u.cols();
  const matrix<double, cpu> dy = c.at("inputs.upstream", {tokens, experts}).rows();
  const tensor weights = c.at("outputs.weights", {tokens, experts});
  const double p = c.number("hparams.top_p");
  const bool sensitive = c.flag("rounding_sensitive");
  const top_p<gate::raw, crossing::kept> selector{.p = p};

  context<cpu> ctx;
  routing<double, cpu> r(tokens, experts);
  ops::select(ctx, selector, u, {}, r.gates.view(), r.mask.view());
  const std::string differs = compare_masks(u, r.view(), weights, sensitive, p);
  if (sensitive && differs.empty()) {
    // Either side of the last bit is right: go on with the file's.
    r.mask = words_of(weights);
    ops::replay(ctx, selector, u, {}, r.mask.view(), r.gates.view());
  }
  matrix<double, cpu> active(1, tokens);
  for (index n = 0; n < tokens; ++n) {
    for (index e = 0; e < experts; ++e) active(0, n) += r.view().on(n, e) ? 1.0 : 0.0;
  }
  check.account("outputs.weights", differs);
  check.equal("outputs.weights", r.gates, c.forward());
  check.equal("outputs.num_active", active, {});

  matrix<double, cpu> du(tokens, experts);
  ops::select_backward(ctx, selector, u, r.gates.view(), r.mask.view(), dy, du.view());
  check.equal("grads.logits", du, c.gradient());

  const routed_view<double, cpu> routed{u, r.view()};
  matrix<double, cpu> from_balance(tokens, experts), from_entropy(tokens, experts);
  // MoE-PEFT forms the shares of experts in float32.
  check.equal("outputs.balance_mixlora_dynamic",
              add_loss(load_balance<balance::per_rank, balance::pooled>{}, 1.0, selector, routed,
                       from_balance.view()),
              float32_inside);
  check.equal("grads.logits_from_balance", from_balance, float32_inside);
  check.equal("outputs.dynamic_loss",
              add_loss(entropy_loss<entropy::shannon>{.entropy = {.normalised = false}}, 1.0,
                       selector, routed, from_entropy.view()),
              c.forward());
  check.equal("grads.logits_from_dynamic_loss", from_entropy, c.gradient());
}

const registration entry("routers/topp_huang", topp_huang);

}  // namespace

}  // namespace talpa::golden::topp_huang_method
