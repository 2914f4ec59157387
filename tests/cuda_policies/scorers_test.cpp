// SPDX-License-Identifier: Apache-2.0
#include "products.hpp"
#include "support/both_backends.hpp"

#include <talpa/cpu/activation.hpp>
#include <talpa/cpu/add.hpp>
#include <talpa/cpu/bias.hpp>
#include <talpa/cpu/copy.hpp>
#include <talpa/cpu/dropout.hpp>
#include <talpa/cpu/exp_scale.hpp>
#include <talpa/cpu/fill.hpp>
#include <talpa/cpu/gemm.hpp>
#include <talpa/cpu/mix_logits.hpp>
#include <talpa/cpu/mul.hpp>
#include <talpa/cpu/noise.hpp>
#include <talpa/cpu/reduce.hpp>
#include <talpa/cpu/scale.hpp>
#include <talpa/cpu/sequence_rows.hpp>
#include <talpa/cpu/unit_rows.hpp>
#include <talpa/cuda/activation.hpp>
#include <talpa/cuda/add.hpp>
#include <talpa/cuda/bias.hpp>
#include <talpa/cuda/copy.hpp>
#include <talpa/cuda/dropout.hpp>
#include <talpa/cuda/exp_scale.hpp>
#include <talpa/cuda/fill.hpp>
#include <talpa/cuda/mix_logits.hpp>
#include <talpa/cuda/mul.hpp>
#include <talpa/cuda/noise.hpp>
#include <talpa/cuda/reduce.hpp>
#include <talpa/cuda/scale.hpp>
#include <talpa/cuda/sequence_rows.hpp>
#include <talpa/cuda/unit_rows.hpp>
#include <talpa/scorers/cluster_scorer.hpp>
#include <talpa/scorers/cosine_scorer.hpp>
#include <talpa/scorers/cross_attention_scorer.hpp>
#include <talpa/scorers/glu_scorer.hpp>
#include <talpa/scorers/linear_scorer.hpp>
#include <talpa/scorers/lora_scorer.hpp>
#include <talpa/scorers/mixture_of_routers.hpp>
#include <talpa/scorers/mlp_scorer.hpp>
#include <talpa/scorers/noisy.hpp>
#include <talpa/scorers/task_mixture.hpp>

#include <doctest/doctest.h>

#include <string>

namespace talpa::cuda_scorers_test {

namespace {

template <class Scorer>
std::string difference(const Scorer& scorer, const support::parity_sizes& sizes = {}) {
  return support::backend_difference(
      scorer,
      [&]<class B>(generator& random) {
        return scorer.template init<double, B>(sizes.inputs, sizes.outputs, random, "");
      },
      sizes);
}

}  // namespace

TEST_SUITE("cuda_policies/scorers") {
  TEST_CASE("linear_scorer scores on a device as on the host") {
    CHECK(difference(linear_scorer{.bias = true}) == "");
    CHECK(difference(linear_scorer{}, {.outputs = 1}) == "");
    CHECK(difference(linear_scorer{.bias = true}, {.tokens = 0}) == "");
  }

  TEST_CASE("mlp_scorer scores on a device as on the host") {
    CHECK(difference(mlp_scorer<>{.hidden = 7, .bias = true, .initial_bias = 0.25}) == "");
    CHECK(difference(mlp_scorer<>{.hidden = 7, .hidden_bias = false, .normalise = true}) == "");
  }

  TEST_CASE("cosine_scorer scores on a device as on the host") {
    CHECK(difference(cosine_scorer{.temperature = 0.5}) == "");
    CHECK(difference(cosine_scorer{.temperature = 0.5, .learned = true}) == "");
  }

  TEST_CASE("glu_scorer scores on a device as on the host") {
    CHECK(difference(glu_scorer{}) == "");
  }

  TEST_CASE("cluster_scorer scores sequences on a device as on the host") {
    const cluster_scorer scorer{.clusters = 4, .width = 5, .temperature = 0.5, .noise = 0.5};
    CHECK(difference(scorer, {.sequence_length = 3, .classes = 4, .zero = "dx"}) == "");
  }

  TEST_CASE("cross_attention_scorer scores sequences on a device as on the host") {
    CHECK(difference(cross_attention_scorer{.query_row = 1},
                     {.sequence_length = 3, .conditioning_rows = 4, .conditioning_width = 6}) ==
          "");
  }

  TEST_CASE("lora_scorer scores on a device as on the host") {
    CHECK(difference(lora_scorer<linear_scorer>{.rank = 3, .dropout = 0.25}) == "");
  }

  TEST_CASE("noisy and jittered draw on a device what they draw on the host") {
    CHECK(difference(noisy<linear_scorer>{.floor = 0.1}) == "");
    CHECK(difference(jittered<linear_scorer>{.width = 0.5}) == "");
  }

  TEST_CASE("task_mixture scores tasks on a device as on the host") {
    CHECK(difference(task_mixture<linear_scorer, linear_scorer>{.alpha = 0.5, .width = 4},
                     {.sequence_length = 3, .conditioning_rows = 1, .conditioning_width = 4}) ==
          "");
  }

  TEST_CASE("mixture_of_routers scores on a device as on the host") {
    CHECK(difference(mixture_of_routers<mix::probability, linear_scorer>{.top_m = 2}) == "");
    CHECK(difference(mixture_of_routers<mix::logit, linear_scorer>{}) == "");
  }

  // A product of D terms.
  TEST_CASE("mixture_of_routers shows its sub-routers to losses on a device") {
    const mixture_of_routers<mix::logit, linear_scorer> scorer{.sub_routers = 2};
    CHECK(support::recorded(
              [&]<class B>(context<B>& ctx, generator& random, support::run_record& out) {
                const auto p = scorer.init<double, B>(6, 5, random, "");
                matrix<double, B> x(9, 6), logits(9, 5);
                fill_uniform(x.view(), 1.0, random);
                const auto kept =
                    scorer.forward<double, B>(ctx, p, x, logits.view(), mode::training, {});
                const auto main = scorer.main_view(kept), sub = scorer.sub_view(ctx, kept, 1);
                support::detail::wait(ctx);
                out.add("main", main.logits);
                out.add("sub", sub.logits);
                out.add_mask(main.routing.mask);
                out.add_mask(sub.routing.mask);
              },
              6 + 64) == "");
  }
}

}  // namespace talpa::cuda_scorers_test
