// SPDX-License-Identifier: Apache-2.0
#include "golden/case.hpp"
#include "golden/runner.hpp"

#include <talpa/cpu/select.hpp>
#include <talpa/routing/routing.hpp>
#include <talpa/selectors/dense.hpp>
#include <talpa/selectors/top_k.hpp>

namespace talpa::golden::xlora_method {

namespace {

/// The scalings of a selector on logits / temperature, and their gradient.
template <class Selector>
void run(const golden_case& c, checker& check, const Selector& selector) {
  matrix<double, cpu> u = c.at("inputs.logits").rows();
  const matrix<double, cpu> upstream = c.at("inputs.upstream").rows();
  const double temperature = c.number("hparams.temperature");
  for (index i = 0; i < u.size(); ++i) u.data()[i] /= temperature;
  context<cpu> ctx;
  routing<double, cpu> r(u.rows(), u.cols());
  matrix<double, cpu> du(u.rows(), u.cols());
  ops::select(ctx, selector, u, {}, r.gates.view(), r.mask.view());
  ops::select_backward(ctx, selector, u, r.gates.view(), r.mask.view(), upstream, du.view());
  for (index i = 0; i < du.size(); ++i) du.data()[i] /= temperature;
  check.equal("outputs.scalings_peft", r.gates, c.forward());
  check.equal("grads.logits_peft", du, c.gradient());
  check.leave("outputs.scalings_released", "a softmax over the whole batch: a defect, evidence");
}

void xlora(const golden_case& c, checker& check) {
  const bool before = c.flag("hparams.enable_softmax");
  const bool behind = c.flag("hparams.enable_softmax_topk");
  if (!c.has("hparams.top_k")) return run(c, check, dense{});
  const index k = c.integer("hparams.top_k");
  if (before && behind) return run(c, check, top_k<gate::softmax_probability>{.k = k});
  if (before) return run(c, check, top_k<gate::raw>{.k = k});
  if (behind) return run(c, check, top_k<gate::softmax_selected>{.k = k});
  throw malformed("'hparams' ask for no softmax");
}

const registration entry("routers/xlora", xlora);

}  // namespace

}  // namespace talpa::golden::xlora_method
