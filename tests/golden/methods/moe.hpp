// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "golden/case.hpp"
#include "golden/methods/chosen.hpp"
#include "golden/methods/mole.hpp"

#include <talpa/cpu/activation.hpp>
#include <talpa/cpu/gated_activation.hpp>
#include <talpa/cpu/group_loss.hpp>
#include <talpa/cpu/routing_sums.hpp>
#include <talpa/cpu/scale.hpp>
#include <talpa/cpu/slot_dropout.hpp>
#include <talpa/layers/moe_ffn.hpp>
#include <talpa/losses/load_balance.hpp>
#include <talpa/selectors/top_k.hpp>

#include <string>
#include <utility>

namespace talpa::golden {

/// A base of SwiGLU experts behind a linear router without bias.
template <class Selector>
using moe = moe_ffn<router<linear_scorer, Selector>>;

/// The banks of a case: Mixtral names its factors w1, w3, w2, OLMoE gate_proj, up_proj, down_proj.
/// Frozen.
inline swiglu::params<double, cpu> swiglu_bank(const golden_case& c, const std::string& prefix) {
  const bool mixtral = c.has(prefix + ".w1");
  const auto name = [&](const char* one, const char* other) {
    return prefix + (mixtral ? one : other);
  };
  swiglu::params<double, cpu> p;
  p.gate = parameter<double, cpu>("gate", c.at(name(".w1", ".gate_proj")).rows());
  p.up = parameter<double, cpu>("up", c.at(name(".w3", ".up_proj")).rows());
  p.down = parameter<double, cpu>("down", c.at(name(".w2", ".down_proj")).transposed_blocks());
  p.freeze();
  return p;
}

/// The base of a case: params.gate and params.experts.*, frozen but for the router where asked.
template <class Selector>
typename moe<Selector>::template params<double, cpu> moe_params(const golden_case& c,
                                                                bool router_trains) {
  typename moe<Selector>::template params<double, cpu> p;
  p.router.scorer.weight = parameter<double, cpu>("router.weight", c.at("params.gate").rows());
  p.expert = swiglu_bank(c, "params.experts");
  if (!router_trains) p.router.freeze();
  return p;
}

/// Value and gradients of the balance loss of Mixtral's code on one routing.
struct balance_term {
  double value = 0.0;
  matrix<double, cpu> dlogits, dgates;

  balance_term(context<cpu>& ctx, const routed_view<double, cpu>& routed, double weight)
      : dlogits(routed.logits.rows, routed.logits.cols),
        dgates(routed.logits.rows, routed.logits.cols) {
    const load_balance<balance::per_rank, balance::pooled> loss;
    const auto kept = loss.forward(ctx, routed);
    matrix<double, cpu> upstream(1, 1);
    upstream(0, 0) = weight;
    loss.backward(ctx, routed, kept, upstream, gradient(), grad_mode::overwrite);
    value = kept.value(0, 0);
  }
  routed_gradient<double, cpu> gradient() { return {dlogits.view(), dgates.view()}; }
};

/// sum of a * b.
inline double inner_product(const matrix<double, cpu>& a, const matrix<double, cpu>& b) {
  double sum = 0.0;
  for (index i = 0; i < a.size(); ++i) sum += a.data()[i] * b.data()[i];
  return sum;
}

}  // namespace talpa::golden
