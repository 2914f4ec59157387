// SPDX-License-Identifier: Apache-2.0
#include "products.hpp"
#include "support/both_backends.hpp"

#include <talpa/cpu/activation.hpp>
#include <talpa/cpu/add.hpp>
#include <talpa/cpu/bias.hpp>
#include <talpa/cpu/block_scale.hpp>
#include <talpa/cpu/copy.hpp>
#include <talpa/cpu/dropout.hpp>
#include <talpa/cpu/fill.hpp>
#include <talpa/cpu/gated_activation.hpp>
#include <talpa/cpu/gather.hpp>
#include <talpa/cpu/gemm.hpp>
#include <talpa/cpu/grouped_gemm.hpp>
#include <talpa/cpu/mul.hpp>
#include <talpa/cpu/ragged_gate.hpp>
#include <talpa/cpu/ragged_gemm.hpp>
#include <talpa/cpu/rank_gate.hpp>
#include <talpa/cpu/rank_share.hpp>
#include <talpa/cpu/reduce.hpp>
#include <talpa/cpu/routed_linear.hpp>
#include <talpa/cpu/scale.hpp>
#include <talpa/cpu/segments.hpp>
#include <talpa/cpu/select.hpp>
#include <talpa/cpu/slot_dropout.hpp>
#include <talpa/cpu/weight_norm.hpp>
#include <talpa/cuda/activation.hpp>
#include <talpa/cuda/add.hpp>
#include <talpa/cuda/bias.hpp>
#include <talpa/cuda/block_scale.hpp>
#include <talpa/cuda/copy.hpp>
#include <talpa/cuda/dropout.hpp>
#include <talpa/cuda/fill.hpp>
#include <talpa/cuda/gated_activation.hpp>
#include <talpa/cuda/gather.hpp>
#include <talpa/cuda/grouped_gemm.hpp>
#include <talpa/cuda/indexed_gemm.hpp>
#include <talpa/cuda/mul.hpp>
#include <talpa/cuda/ragged_gate.hpp>
#include <talpa/cuda/ragged_gemm.hpp>
#include <talpa/cuda/rank_gate.hpp>
#include <talpa/cuda/rank_share.hpp>
#include <talpa/cuda/reduce.hpp>
#include <talpa/cuda/scale.hpp>
#include <talpa/cuda/segments.hpp>
#include <talpa/cuda/select.hpp>
#include <talpa/cuda/slot_dropout.hpp>
#include <talpa/cuda/weight_norm.hpp>
#include <talpa/experts/adapted_glu.hpp>
#include <talpa/experts/dora.hpp>
#include <talpa/experts/glu_ffn.hpp>
#include <talpa/experts/lora.hpp>
#include <talpa/experts/mixed_rank_lora.hpp>
#include <talpa/experts/mlp.hpp>
#include <talpa/experts/parallel_adapter.hpp>
#include <talpa/experts/shared_lora.hpp>
#include <talpa/layers/moe_ffn.hpp>
#include <talpa/layers/mole_linear.hpp>
#include <talpa/scorers/linear_scorer.hpp>
#include <talpa/selectors/top_k.hpp>

#include <doctest/doctest.h>

#include <string>
#include <utility>
#include <vector>

namespace talpa::cuda_experts_test {

namespace {

// Experts behind a router, which shows the gradients of their gates.
using own_router = router<linear_scorer, top_k<gate::renormalised>>;

/// Trains some experts alone, where a bank can.
template <class Expert, class Params>
void train(const Expert& expert, Params& p, const std::vector<index>& trained) {
  if constexpr (requires { expert.train_experts(p, trained); }) expert.train_experts(p, trained);
}

/// A bank in mole_linear under one strategy, of which all experts train or those of `trained`.
template <class Expert>
std::string banked(const Expert& expert, strategy execution, index experts = 4, index k = 2,
                   const support::parity_sizes& sizes = {},
                   const std::vector<index>& trained = {}) {
  const mole_linear<own_router, Expert> layer{{{}, {k}}, expert, experts, execution};
  return support::backend_difference(
      layer,
      [&]<class B>(generator& random) {
        auto base = init_affine<double, B>(sizes.inputs, 5, true, false, random, "base.");
        base.freeze();
        auto p = layer.template init<double, B>(std::move(base), random);
        if (!trained.empty()) train(expert, p.expert, trained);
        return p;
      },
      sizes);
}
/// Under both, with some sizes: experts without tokens, no tokens, some experts that train.
template <class Expert>
std::string in_rank_space(const Expert& expert) {
  return banked(expert, strategy::dense_masked) + banked(expert, strategy::grouped) +
         banked(expert, strategy::grouped, 4, 1, {.tokens = 2, .padded = false}) +
         banked(expert, strategy::dense_masked, 4, 2, {.tokens = 0}) +
         banked(expert, strategy::grouped, 4, 2, {.tokens = 0}) +
         banked(expert, strategy::dense_masked, 4, 2, {}, {0, 2}) +
         banked(expert, strategy::grouped, 4, 2, {}, {0, 2});
}

/// A bank in moe_ffn, which knows one way.
template <class Expert>
std::string grouped(const Expert& expert, index experts = 4, index k = 2,
                    const support::parity_sizes& sizes = {}) {
  moe_ffn<own_router, Expert> layer;
  layer.router.selector.k = k;
  layer.expert = expert;
  layer.experts = experts;
  return support::backend_difference(
      layer,
      [&]<class B>(generator& random) {
        return layer.template init<double, B>(sizes.inputs, random);
      },
      sizes);
}
template <class Expert>
std::string in_slots(const Expert& expert) {
  return grouped(expert) + grouped(expert, 4, 1, {.tokens = 2, .padded = false}) +
         grouped(expert, 1, 1) + grouped(expert, 4, 2, {.tokens = 0});
}

}  // namespace

TEST_SUITE("cuda_policies/experts") {
  TEST_CASE("low-rank experts do on a device what they do on the host") {
    CHECK(in_rank_space(lora{.rank = 3, .dropout = 0.25}) == "");
    CHECK(in_rank_space(shared_a_lora{.rank = 3}) == "");
    CHECK(in_rank_space(shared_b_lora{.rank = 3}) == "");
    CHECK(in_rank_space(mixed_rank_lora{.ranks = {1, 3, 2, 4}}) == "");
    CHECK(banked(lora{.rank = 3}, strategy::dense_masked, 1, 1) == "");
    CHECK(banked(lora{.rank = 3}, strategy::grouped, 1, 1) == "");
  }

  TEST_CASE("dora does on a device what it does on the host") {
    CHECK(in_rank_space(dora{.rank = 3}) == "");
    CHECK(banked(dora{.rank = 3, .norm = dora_norm::constant}, strategy::grouped) == "");
    // Over a base of its own, which trains; with so many ranks the layer goes by slots.
    const dora many{.rank = 16};
    REQUIRE(mixture<dora>{many, 16, 1}.choose<support::device>(6, 6) == strategy::grouped);
    CHECK(grouped(many, 16, 1) == "");
  }

  TEST_CASE("parallel_adapter does on a device what it does on the host") {
    CHECK(in_rank_space(parallel_adapter<>{.rank = 3, .scale = 0.5, .dropout = 0.25}) == "");
  }

  TEST_CASE("feed-forward experts do on a device what they do on the host") {
    CHECK(in_slots(swiglu{.hidden = 4}) == "");
    CHECK(in_slots(mlp<>{.hidden = 4, .bias = true}) == "");
    CHECK(in_slots(adapted_glu<swiglu, lora>{.network = {.hidden = 4}, .adapter = {.rank = 2}}) ==
          "");
  }
}

}  // namespace talpa::cuda_experts_test
