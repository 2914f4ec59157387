// SPDX-License-Identifier: Apache-2.0
#include "products.hpp"
#include "support/both_backends.hpp"

#include <talpa/cpu/add.hpp>
#include <talpa/cpu/bias.hpp>
#include <talpa/cpu/copy.hpp>
#include <talpa/cpu/dropout.hpp>
#include <talpa/cpu/fill.hpp>
#include <talpa/cpu/gather.hpp>
#include <talpa/cpu/gemm.hpp>
#include <talpa/cpu/grouped_gemm.hpp>
#include <talpa/cpu/noise.hpp>
#include <talpa/cpu/rank_gate.hpp>
#include <talpa/cpu/reduce.hpp>
#include <talpa/cpu/routed_linear.hpp>
#include <talpa/cpu/segments.hpp>
#include <talpa/cpu/select.hpp>
#include <talpa/cuda/add.hpp>
#include <talpa/cuda/bias.hpp>
#include <talpa/cuda/copy.hpp>
#include <talpa/cuda/dropout.hpp>
#include <talpa/cuda/fill.hpp>
#include <talpa/cuda/gather.hpp>
#include <talpa/cuda/grouped_gemm.hpp>
#include <talpa/cuda/indexed_gemm.hpp>
#include <talpa/cuda/noise.hpp>
#include <talpa/cuda/rank_gate.hpp>
#include <talpa/cuda/reduce.hpp>
#include <talpa/cuda/segments.hpp>
#include <talpa/cuda/select.hpp>
#include <talpa/experts/lora.hpp>
#include <talpa/layers/infer.hpp>
#include <talpa/layers/mole_linear.hpp>
#include <talpa/routing/record.hpp>
#include <talpa/scorers/linear_scorer.hpp>
#include <talpa/scorers/noisy.hpp>
#include <talpa/selectors/biased_top_k.hpp>
#include <talpa/selectors/sparsegen.hpp>
#include <talpa/selectors/top_k.hpp>

#include <doctest/doctest.h>

#include <string>

namespace talpa::cuda_routers_test {

namespace {

constexpr index features = 6;

template <class B>
affine_params<double, B> linear_base(generator& random) {
  return init_affine<double, B>(features, 5, true, false, random, "base.");
}

/// A router before four experts.
template <class Router>
std::string difference(const Router& router) {
  const mole_linear<Router, lora> layer{router, {.rank = 3}, 4, strategy::grouped};
  return support::backend_difference(layer, [&]<class B>(generator& random) {
    return layer.template init<double, B>(linear_base<B>(random), random);
  });
}

}  // namespace

TEST_SUITE("cuda_policies/routers") {
  TEST_CASE("a router trains its noise on a device as on the host") {
    CHECK(difference(router<noisy<linear_scorer>, top_k<gate::renormalised>>{{}, {2}}) == "");
  }

  TEST_CASE("a router trains the control of its selector on a device as on the host") {
    CHECK(difference(router<linear_scorer, sparsegen<linear_scorer>>{}) == "");
  }

  TEST_CASE("a router with a bias of its experts chooses on a device as on the host") {
    CHECK(difference(router<linear_scorer, biased_top_k<>>{{}, {.k = 2}}) == "");
  }

  // The recorded experts are those of other tokens, so that the router would choose others.
  TEST_CASE("a layer of a device replays what it has recorded") {
    const mole_linear<router<linear_scorer, top_k<gate::renormalised>>, lora> layer{
        {{}, {2}}, {.rank = 3}, 4, strategy::grouped};
    CHECK(support::recorded(
              [&]<class B>(context<B>& ctx, generator& random, support::run_record& out) {
                auto p = layer.template init<double, B>(linear_base<B>(random), random);
                support::fill_parameters<B>(p, random);
                matrix<double, B> x(9, features), other(9, features), y(9, 5), z(9, 5);
                fill_uniform(x.view(), 1.0, random);
                fill_uniform(other.view(), 1.0, random);
                const auto first = layer.forward(ctx, p, other, y.view(), mode::inference);
                const auto kept = record(first.routed.routing);
                const auto batch = replay(batch_info<double, B>{}, kept);
                infer(ctx, layer, p, x, y.view(), batch);
                const auto again = layer.forward(ctx, p, x, z.view(), mode::inference, batch);
                support::detail::wait(ctx);
                out.add("y", y.view());
                out.add("y once more", z.view());
                out.add("gates", again.routed.routing.gates);
                out.add_mask(matrix_view<const std::uint32_t, B>(kept.mask.view()));
                out.add_mask(again.routed.routing.mask);
              },
              2 * features + 3 + 2 + 64) == "");
  }
}

}  // namespace talpa::cuda_routers_test
