// SPDX-License-Identifier: Apache-2.0
#include "support/loss_parity.hpp"

#include <talpa/cpu/add.hpp>
#include <talpa/cpu/fill.hpp>
#include <talpa/cpu/group_loss.hpp>
#include <talpa/cpu/routing_sums.hpp>
#include <talpa/cpu/scale.hpp>
#include <talpa/cuda/add.hpp>
#include <talpa/cuda/fill.hpp>
#include <talpa/cuda/group_loss.hpp>
#include <talpa/cuda/routing_sums.hpp>
#include <talpa/cuda/scale.hpp>
#include <talpa/losses/entropy.hpp>
#include <talpa/losses/gjs.hpp>
#include <talpa/losses/labelled.hpp>
#include <talpa/losses/lambda.hpp>
#include <talpa/losses/prior_approximate.hpp>
#include <talpa/losses/top_k_mass.hpp>

#include <doctest/doctest.h>

namespace talpa::cuda_row_losses_test {
using support::loss_difference;

TEST_SUITE("cuda_policies/row_losses") {
  TEST_CASE("losses of the rows of a routing have the bits of the host") {
    CHECK(loss_difference(entropy_loss<entropy::shannon>{}) == "");
    CHECK(loss_difference(
              entropy_loss<entropy::tsallis, balance::pooled>{.include_padding = true}) == "");
    CHECK(loss_difference(entropy_loss<entropy::renyi, balance::per_sequence>{}) == "");
    CHECK(loss_difference(gjs{}) == "");
    CHECK(loss_difference(lambda_mean{}) == "");
    CHECK(loss_difference(lambda_sparsity{.k = 1}, false) == "");
    CHECK(loss_difference(top_k_mass{}) == "");
  }

  TEST_CASE("labels of experts have the bits of the host") {
    CHECK(loss_difference(prior_approximate{}) == "");
    for (const index experts : {index{6}, index{40}}) {
      support::test_random random(33);
      const support::loss_layer layer = support::make_loss_layer(random, 12, experts);
      const support::loss_layer other = support::make_loss_layer(random, 12, experts);
      const auto labels = to_device<support::device>(other.mask.view());
      context<cpu> host(1);
      context<support::device> ctx;
      const labelled<prior_approximate, cpu> on_host{{}, other.mask.view()};
      const labelled<prior_approximate, support::device> there{{}, labels.view()};
      CHECK(loss_difference(
                support::run_loss<support::device>(ctx, there, {layer}, grad_mode::overwrite),
                support::run_loss<cpu>(host, on_host, {layer}, grad_mode::overwrite), false) == "");
    }
  }
}

}  // namespace talpa::cuda_row_losses_test
