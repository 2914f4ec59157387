// SPDX-License-Identifier: Apache-2.0
#include "golden/methods/moe.hpp"
#include "golden/runner.hpp"

#include <talpa/experts/adapted_glu.hpp>

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

matrix<double, cpu> product(const matrix<double, cpu>& a, const matrix<double, cpu>& b) {
  matrix<double, cpu> c(a.rows(), b.cols());
  for (index i = 0; i < a.rows(); ++i) {
    for (index k = 0; k < a.cols(); ++k) {
      for (index j = 0; j < b.cols(); ++j) c(i, j) += a(i, k) * b(k, j);
    }
  }
  return c;
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

/// LoRA on the router alone: the router's weight is W + s B A, whose gradient is that of A and B by
/// the chain rule.
template <class Selector>
void tune_router(const golden_case& c, checker& check, const Selector& selector) {
  const moe<Selector> layer{.router = {.selector = selector},
                            .expert = {.hidden = c.integer("hyper.F")},
                            .experts = c.integer("hyper.E")};
  auto p = moe_params<Selector>(c, true);
  const matrix<double, cpu> a = c.at("params.gate.A").rows(), b = c.at("params.gate.B").rows();
  const double s = c.number("hyper.alpha") / c.number("hyper.r");
  const matrix<double, cpu> update = product(b, a);
  auto& weight = p.router.scorer.weight;
  for (index i = 0; i < update.size(); ++i) weight.value().data[i] += s * update.data()[i];
  compare_layer(c, check, layer, p);
  matrix<double, cpu> dweight(weight.grad());
  for (index i = 0; i < dweight.size(); ++i) dweight.data()[i] *= s;
  check.equal("grads.gate.A", product(transposed(b.view()), dweight), c.gradient());
  check.equal("grads.gate.B", product(dweight, transposed(a.view())), c.gradient());
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
