// SPDX-License-Identifier: Apache-2.0
#include "golden/methods/moe.hpp"
#include "golden/runner.hpp"

#include <talpa/selectors/intervene.hpp>

#include <limits>
#include <string>

namespace talpa::golden::routerlens_mask_method {

namespace {

expert_set experts_in(const golden_case& c, const std::string& field) {
  expert_set experts;
  for (index i = 0; c.has(field) && i < c.length(field); ++i) {
    experts.add(c.integer(field + "." + std::to_string(i)));
  }
  return experts;
}

template <class Inner>
void compare(const golden_case& c, checker& check) {
  using selector = intervene<Inner>;
  const selector s{.inner = {.k = c.integer("hyper.K")},
                   .blocked = experts_in(c, "hyper.block"),
                   .stimulated = experts_in(c, "hyper.stimulate")};
  const moe<selector> layer{.router = {.selector = s},
                            .expert = {.hidden = c.integer("hyper.F")},
                            .experts = c.integer("hyper.E")};
  const auto p = moe_params<selector>(c, false);
  const matrix<double, cpu> x = c.at("inputs.x").rows();
  matrix<double, cpu> y(x.rows(), x.cols());
  context<cpu> ctx;
  const auto kept = layer.forward(ctx, p, x, y.view(), mode::inference);
  check.equal("outputs.y", y, c.forward());
  // The original writes -inf into the logits it returns.
  matrix<double, cpu> logits(kept.routed.logits);
  for (index n = 0; n < logits.rows(); ++n) {
    for (index e = 0; e < logits.cols(); ++e) {
      if (s.blocked.has(e)) logits(n, e) = -std::numeric_limits<double>::infinity();
    }
  }
  check.equal("outputs.router_logits", logits, c.forward());
}

void routerlens_mask(const golden_case& c, checker& check) {
  if (c.flag("hyper.norm_topk_prob")) {
    compare<top_k<gate::renormalised>>(c, check);
  } else {
    compare<top_k<gate::raw>>(c, check);
  }
}

const registration entry{"perft/routerlens_mask", routerlens_mask};

}  // namespace

}  // namespace talpa::golden::routerlens_mask_method
