// SPDX-License-Identifier: Apache-2.0
#include "golden/case.hpp"
#include "golden/runner.hpp"

#include <talpa/cpu/context.hpp>
#include <talpa/cpu/fill.hpp>
#include <talpa/cpu/group_loss.hpp>
#include <talpa/cpu/routing_sums.hpp>
#include <talpa/cpu/select.hpp>
#include <talpa/losses/load_balance.hpp>
#include <talpa/selectors/top_k.hpp>

#include <cstdint>
#include <string>
#include <vector>

namespace talpa::golden::load_balance_method {

namespace {

using form = load_balance<balance::per_rank, balance::pooled>;

struct outcome {
  double value = 0.0;
  std::vector<matrix<double, cpu>> dlogits;
};

/// The loss of layers with these logits. With `recorded`, every token of every layer uses the
/// experts of that mask word.
outcome evaluate(const std::vector<matrix<double, cpu>>& logits, index k,
                 const vector<std::uint8_t, cpu>& real, std::uint32_t recorded) {
  context<cpu> ctx;
  std::vector<routing<double, cpu>> chosen;
  std::vector<routed_view<double, cpu>> layers;
  outcome found;
  for (const auto& u : logits) {
    chosen.emplace_back(u.rows(), u.cols());
    found.dlogits.emplace_back(u.rows(), u.cols());
  }
  std::vector<matrix<double, cpu>> dgates = found.dlogits;
  std::vector<routed_gradient<double, cpu>> out;
  for (std::size_t l = 0; l < logits.size(); ++l) {
    routing<double, cpu>& r = chosen[l];
    const top_k<gate::raw> selector{.k = k};
    if (recorded == 0) {
      ops::select(ctx, selector, logits[l], real.view(), r.gates.view(), r.mask.view());
    } else {
      for (index n = 0; n < r.mask.rows(); ++n) r.mask(n, 0) = recorded;
      ops::replay(ctx, selector, logits[l], real.view(), r.mask.view(), r.gates.view());
    }
    layers.push_back({logits[l].view(), r.view(), real.view(), 0});
    out.push_back({found.dlogits[l].view(), dgates[l].view()});
  }
  const auto kept = form{}.forward(ctx, std::span<const routed_view<double, cpu>>(layers));
  found.value = kept.value(0, 0);
  matrix<double, cpu> one(1, 1);
  one(0, 0) = 1.0;
  form{}.backward(ctx, std::span<const routed_view<double, cpu>>(layers), kept, one,
                  std::span<const routed_gradient<double, cpu>>(out), grad_mode::overwrite);
  return found;
}

void compare(const golden_case& c, checker& check, const outcome& found) {
  check.equal("outputs.loss", found.value, c.forward());
  for (std::size_t l = 0; l < found.dlogits.size(); ++l) {
    check.equal("grads.logits." + std::to_string(l), found.dlogits[l], c.gradient());
  }
}

void load_balance_over_layers(const golden_case& c, checker& check) {
  const index layers = c.integer("hyper.layers"), experts = c.integer("hyper.E");
  const index k = c.integer("hyper.K"), tokens = c.integer("hyper.B") * c.integer("hyper.L");
  if (c.length("inputs.logits") != layers) throw malformed("'inputs.logits' has other layers");
  std::vector<matrix<double, cpu>> logits;
  bool tied = true;
  for (index l = 0; l < layers; ++l) {
    const tensor u = c.at("inputs.logits." + std::to_string(l), {tokens, experts});
    for (const double v : u.data) tied = tied && v == u.data[0];
    logits.push_back(u.rows());
  }
  vector<std::uint8_t, cpu> real;
  if (c.has("inputs.attention_mask")) {
    const tensor mask = c.at("inputs.attention_mask", {c.integer("hyper.B"), c.integer("hyper.L")});
    real = vector<std::uint8_t, cpu>(tokens);
    for (index n = 0; n < tokens; ++n) real[n] = mask.data[static_cast<std::size_t>(n)] != 0.0;
  }
  if (!tied) {
    compare(c, check, evaluate(logits, k, real, 0));
    return;
  }
  // All logits are equal: the file does not say which k experts the original took, only that every
  // token took the same. One choice must give its value and gradient.
  for (std::uint32_t mask = 1; mask < (1u << experts); ++mask) {
    index count = 0;
    for (index e = 0; e < experts; ++e) count += (mask >> e) & 1u;
    if (count != k) continue;
    checker attempt(c);
    compare(c, attempt, evaluate(logits, k, real, mask));
    if (!attempt.failure().empty()) continue;
    check = attempt;
    return;
  }
  compare(c, check, evaluate(logits, k, real, 0));
}

const registration entry("perft/load_balance", load_balance_over_layers);

}  // namespace

}  // namespace talpa::golden::load_balance_method
