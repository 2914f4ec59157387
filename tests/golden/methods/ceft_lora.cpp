// SPDX-License-Identifier: Apache-2.0
#include "golden/methods/moe.hpp"
#include "golden/runner.hpp"

#include <talpa/experts/adapted_glu.hpp>
#include <talpa/scorers/lora_scorer.hpp>

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

namespace talpa::golden::ceft_lora_method {

namespace {

using adapted = adapted_glu<swiglu, lora>;

/// Rows of a small matrix into the block of an expert's bank.
void put(const matrix<double, cpu>& from, index expert, parameter<double, cpu>& bank) {
  for (index r = 0; r < from.rows(); ++r) {
    for (index c = 0; c < from.cols(); ++c) {
      bank.value()(expert * from.rows() + r, c) = from(r, c);
    }
  }
}

matrix<double, cpu> transposed(matrix_view<const double, cpu> m) {
  matrix<double, cpu> t(m.cols, m.rows);
  for (index r = 0; r < m.rows; ++r) {
    for (index c = 0; c < m.cols; ++c) t(c, r) = m(r, c);
  }
  return t;
}

/// Forward and backward of a layer on the case's tokens, with what all cases have.
template <class Layer, class Params>
void compare_layer(const golden_case& c, checker& check, const Layer& layer, Params& p) {
  const matrix<double, cpu> x = c.at("inputs.x").rows(), dy = c.at("inputs.cotangent").rows();
  matrix<double, cpu> y(x.rows(), x.cols()), dx(x.rows(), x.cols());
  context<cpu> ctx;
  const auto kept = layer.forward(ctx, p, x, y.view(), mode::training);
  check.equal("outputs.y", y, c.forward());
  check.equal("outputs.router_logits", kept.routed.logits, c.forward());
  check.equal("loss.total", inner_product(y, dy), c.forward());
  layer.backward(ctx, p, kept, x, dy, dx.view(), grad_mode::overwrite);
  check.equal("grads.x", dx, c.gradient());
}

/// LoRA on the router alone.
template <class Selector>
void tune_router(const golden_case& c, checker& check, const Selector& selector) {
  using layer_type = moe_ffn<router<lora_scorer<linear_scorer>, Selector>>;
  const index experts = c.integer("hyper.E");
  const lora_scorer<linear_scorer> scorer{.rank = c.integer("hyper.r"),
                                          .alpha = c.number("hyper.alpha")};
  const layer_type layer{.router = {.scorer = scorer, .selector = selector},
                         .expert = {.hidden = c.integer("hyper.F")},
                         .experts = experts};
  auto base = moe_params<Selector>(c, false);
  const matrix<double, cpu> a =
      c.at("params.gate.A", {scorer.rank, c.at("inputs.x").rows().cols()}).rows();
  generator random(1);
  typename layer_type::template params<double, cpu> p;
  p.expert = std::move(base.expert);
  p.router.scorer =
      scorer.adapt<double, cpu>(std::move(base.router.scorer), a.cols(), experts, random, "");
  put(a, 0, p.router.scorer.a);
  put(transposed(c.at("params.gate.B", {experts, scorer.rank}).rows().view()), 0,
      p.router.scorer.b);
  compare_layer(c, check, layer, p);
  check.equal("grads.gate.A", p.router.scorer.a.grad(), c.gradient());
  check.equal("grads.gate.B", transposed(p.router.scorer.b.grad()), c.gradient());
  check.account("memory of gradients",
                p.router.scorer.inner.weight.trained_size() == 0 ? "" : "the router trains");
}

/// LoRA on the three matrices of the listed experts.
template <class Selector>
void tune_experts(const golden_case& c, checker& check, const Selector& selector) {
  using layer_type = moe_ffn<router<linear_scorer, Selector>, adapted>;
  const index experts = c.integer("hyper.E"), rank = c.integer("hyper.r");
  const adapted expert{.network = {.hidden = c.integer("hyper.F")},
                       .adapter = {.rank = rank, .alpha = c.number("hyper.alpha")}};
  const layer_type layer{.router = {.selector = selector}, .expert = expert, .experts = experts};
  generator random(1);
  typename layer_type::template params<double, cpu> p;
  p.router.scorer.weight = parameter<double, cpu>("router.weight", c.at("params.gate").rows());
  p.router.freeze();
  p.expert = expert.adapt<double, cpu>(swiglu_bank(c, "params.experts"), experts, random, "");
  std::vector<index> chosen;
  for (const double e : c.at("hyper.trainable").data) chosen.push_back(static_cast<index>(e));
  expert.train_experts(p.expert, chosen);
  const std::pair<const char*, lora::params<double, cpu>*> banks[] = {
      {"gate_proj", &p.expert.gate}, {"up_proj", &p.expert.up}, {"down_proj", &p.expert.down}};
  const auto field = [](const char* section, index e, const char* which) {
    return std::string(section) + ".experts." + std::to_string(e) + "." + which;
  };
  for (const auto& [which, bank] : banks) {
    for (const index e : chosen) {
      put(c.at(field("params", e, which) + ".A").rows(), e, bank->a);
      put(transposed(c.at(field("params", e, which) + ".B").rows().view()), e, bank->b);
    }
  }
  compare_layer(c, check, layer, p);
  for (const auto& [which, bank] : banks) {
    for (std::size_t i = 0; i < chosen.size(); ++i) {
      // Gradients of the trained experts alone, one behind the other.
      const auto rows = [&](const parameter<double, cpu>& q) {
        return q.grad().row_range(static_cast<index>(i) * rank, rank);
      };
      check.equal(field("grads", chosen[i], which) + ".A", rows(bank->a), c.gradient());
      check.equal(field("grads", chosen[i], which) + ".B", transposed(rows(bank->b)), c.gradient());
    }
  }
}

void ceft_lora(const golden_case& c, checker& check) {
  const auto run = [&](auto selector) {
    if (c.has("params.gate.A")) {
      tune_router(c, check, selector);
    } else {
      tune_experts(c, check, selector);
    }
  };
  const index k = c.integer("hyper.K");
  if (c.flag("hyper.norm_topk_prob")) {
    run(top_k<gate::renormalised>{.k = k});
  } else {
    run(top_k<gate::raw>{.k = k});
  }
}

const registration entry("perft/ceft_lora", ceft_lora);

}  // namespace

}  // namespace talpa::golden::ceft_lora_method
