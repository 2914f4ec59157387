// SPDX-License-Identifier: Apache-2.0
#include "golden/runner.hpp"

#include <talpa/cpu/select.hpp>
#include <talpa/routing/routing.hpp>
#include <talpa/selectors/straight_through.hpp>
#include <talpa/selectors/top_k.hpp>

namespace talpa::golden::factorllm_gate_method {

namespace {

template <class Selector>
void compare(const golden_case& c, checker& check, const Selector& selector) {
  const matrix<double, cpu> u = c.at("inputs.logits").rows();
  routing<double, cpu> r(u.rows(), u.cols());
  matrix<double, cpu> du(u.rows(), u.cols());
  context<cpu> ctx;
  ops::select(ctx, selector, u, {}, r.gates.view(), r.mask.view());
  ops::select_backward(ctx, selector, u, r.gates.view(), r.mask.view(),
                       c.at("inputs.cotangent").rows(), du.view());
  check.equal("outputs.gate", r.gates, c.forward());
  check.equal("grads.logits", du, c.gradient());
}

void factorllm_gate(const golden_case& c, checker& check) {
  const index k = c.integer("hyper.k");
  if (c.flag("hyper.hard")) {
    compare(c, check, top_k<gate::hard>{.k = k});
  } else {
    compare(c, check, straight_through{.k = k});
  }
}

const registration entry{"perft/factorllm_gate", factorllm_gate};

}  // namespace

}  // namespace talpa::golden::factorllm_gate_method
