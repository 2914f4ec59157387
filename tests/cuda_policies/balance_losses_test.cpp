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
#include <talpa/losses/importance_cv2.hpp>
#include <talpa/losses/load_balance.hpp>
#include <talpa/losses/load_cv2.hpp>
#include <talpa/losses/localized_balance.hpp>
#include <talpa/losses/losses.hpp>
#include <talpa/losses/router_z.hpp>

#include <doctest/doctest.h>

#include <vector>

namespace talpa::cuda_balance_losses_test {
using support::loss_difference;

TEST_SUITE("cuda_policies/balance_losses") {
  TEST_CASE("load_balance of every fraction, pooling and affinity has the bits of the host") {
    using namespace balance;
    CHECK(loss_difference(load_balance<per_selection, pooled>{}) == "");
    CHECK(loss_difference(load_balance<per_token, per_sequence>{}) == "");
    CHECK(loss_difference(load_balance<per_target, per_layer, affinity::gates>{{2}}) == "");
    CHECK(loss_difference(load_balance<soft_mass, per_layer>{}) == "");
    CHECK(loss_difference(load_balance<per_selection, per_layer, affinity::sigmoid>{}) == "");
    CHECK(loss_difference(load_balance<per_selection, per_layer, affinity::margin>{}) == "");
  }

  TEST_CASE("losses of importance, load and size have the bits of the host") {
    CHECK(loss_difference(importance_cv2{}) == "");
    CHECK(loss_difference(load_cv2{}) == "");
    CHECK(loss_difference(load_cv2{.noise_alone = true}) == "");
    CHECK(loss_difference(localized_balance{}) == "");
    CHECK(loss_difference(router_z{}) == "");
    CHECK(loss_difference(losses{term{0.5, router_z{}}, term{2.0, importance_cv2{}}}) == "");
  }

  // 600 of (sequence, expert), more than a row of experts may have.
  TEST_CASE("localized_balance of many sequences has the bits of the host") {
    support::test_random random(33);
    const std::vector<support::loss_layer> many{support::make_loss_layer(random, 300, 6)};
    context<cpu> host(1);
    context<support::device> ctx;
    const auto on_both = [&](grad_mode mode) {
      return loss_difference(
          support::run_loss<support::device>(ctx, localized_balance{}, many, mode),
          support::run_loss<cpu>(host, localized_balance{}, many, mode), false);
    };
    CHECK(on_both(grad_mode::overwrite) == "");
    CHECK(on_both(grad_mode::accumulate) == "");
  }
}

}  // namespace talpa::cuda_balance_losses_test
