// SPDX-License-Identifier: Apache-2.0
#include "golden/case.hpp"
#include "golden/runner.hpp"

#include <talpa/cpu/assign_balanced.hpp>
#include <talpa/cpu/limit_experts.hpp>
#include <talpa/cpu/select.hpp>
#include <talpa/routing/routing.hpp>
#include <talpa/selectors/base_assignment.hpp>
#include <talpa/selectors/expert_choice.hpp>

#include <algorithm>
#include <string>
#include <vector>

namespace talpa::golden::expert_choice_base_method {

namespace {

template <class Selector>
routing<double, cpu> route(const Selector& selector, const matrix<double, cpu>& logits) {
  context<cpu> ctx;
  routing<double, cpu> r(logits.rows(), logits.cols());
  ops::select(ctx, selector, logits, {}, r.gates.view(), r.mask.view());
  return r;
}

void compare_choice(const golden_case& c, checker& check, const matrix<double, cpu>& u) {
  const expert_choice selector{.factor = c.number("hparams.capacity_factor")};
  const routing<double, cpu> r = route(selector, u);
  check.equal("outputs.weights", r.gates, c.forward());
  const index capacity = c.integer("hparams.capacity");
  matrix<double, cpu> tokens(u.cols(), capacity);
  for (index e = 0; e < u.cols(); ++e) {
    std::vector<index> taken;
    for (index n = 0; n < u.rows(); ++n) {
      if (r.view().on(n, e)) taken.push_back(n);
    }
    std::stable_sort(taken.begin(), taken.end(),
                     [&](index a, index b) { return r.gates(a, e) > r.gates(b, e); });
    if (static_cast<index>(taken.size()) != capacity) {
      check.account("outputs.tokens_of_expert", "expert " + std::to_string(e) + " takes " +
                                                    std::to_string(taken.size()) + " tokens");
      return;
    }
    for (index i = 0; i < capacity; ++i) {
      tokens(e, i) = static_cast<double>(taken[static_cast<std::size_t>(i)]);
    }
  }
  check.equal("outputs.tokens_of_expert", tokens, {});
  context<cpu> ctx;
  matrix<double, cpu> dlogits(u.rows(), u.cols());
  ops::select_backward(ctx, selector, u, r.gates.view(), r.mask.view(),
                       c.at("inputs.upstream", {u.rows(), u.cols()}).rows(), dlogits.view());
  check.equal("grads.logits", dlogits, c.gradient());
}

/// The one expert of each token, [1, T].
matrix<double, cpu> expert_of_token(const routing<double, cpu>& r) {
  matrix<double, cpu> found(1, r.gates.rows());
  for (index n = 0; n < r.gates.rows(); ++n) {
    found(0, n) = -1.0;
    for (index e = 0; e < r.gates.cols(); ++e) {
      if (r.view().on(n, e)) found(0, n) = static_cast<double>(e);
    }
  }
  return found;
}

void compare_base(const golden_case& c, checker& check, const matrix<double, cpu>& u) {
  const routing<double, cpu> r = route(selector_at(base_assignment{}, mode::training), u);
  const matrix<double, cpu> expert = expert_of_token(r);
  matrix<double, cpu> alpha(1, u.rows());
  double total = 0.0;
  for (index n = 0; n < u.rows(); ++n) {
    const auto e = static_cast<index>(expert(0, n));
    alpha(0, n) = r.gates(n, e);
    total += u(n, e);
  }
  check.equal("outputs.assignment", expert, {});
  check.equal("outputs.total", total, c.forward());
  check.equal("outputs.alpha", alpha, c.forward());
  check.equal("outputs.inference_assignment",
              expert_of_token(route(selector_at(base_assignment{}, mode::inference), u)), {});
}

void expert_choice_base(const golden_case& c, checker& check) {
  const matrix<double, cpu> u = c.at("inputs.logits").rows();
  if (c.text("hparams.mode") == "base") {
    compare_base(c, check, u);
  } else {
    compare_choice(c, check, u);
  }
}

const registration entry("routers/expert_choice_base", expert_choice_base);

}  // namespace

}  // namespace talpa::golden::expert_choice_base_method
