// SPDX-License-Identifier: Apache-2.0
#include "support/routed.hpp"
#include "support/tolerance.hpp"

#include <talpa/cpu/add.hpp>
#include <talpa/cpu/fill.hpp>
#include <talpa/cpu/group_loss.hpp>
#include <talpa/cpu/scale.hpp>
#include <talpa/losses/load_balance.hpp>
#include <talpa/losses/losses.hpp>
#include <talpa/losses/router_z.hpp>

#include <doctest/doctest.h>

#include <cmath>
#include <span>
#include <type_traits>
#include <vector>

namespace talpa::losses_test {

using namespace support;

namespace {

using balance_loss = load_balance<balance::soft_mass, balance::pooled>;

/// value + w x of two roundings: product and sum.
double bound_of(double size) { return rounding_bound<double>(4.0, size); }

}  // namespace

TEST_SUITE("losses/losses") {
  TEST_CASE("losses adds weighted values and gradients and keeps each value") {
    test_random random(451);
    context<cpu> ctx(2);
    const std::vector<routed_layer<double>> layers = {random_layer<double>(random, 30, 5, 2, 4),
                                                      random_layer<double>(random, 20, 5, 1)};
    const losses sum{term{0.5, router_z{}}, term{-3.0, balance_loss{}}, term{1.0, router_z{}}};
    static_assert(loss_policy<std::remove_const_t<decltype(sum)>>);
    const auto z = run_loss<double>(ctx, router_z{}, layers, 2.0);
    const auto b = run_loss<double>(ctx, balance_loss{}, layers, 2.0);
    const auto all = run_loss<double>(ctx, sum, layers, 2.0, grad_mode::overwrite, 7.0);
    const auto added = run_loss<double>(ctx, sum, layers, 2.0, grad_mode::accumulate, 0.5);
    CHECK(
        within(all.value, 1.5 * z.value - 3.0 * b.value, bound_of(2.0 * z.value + 3.0 * b.value)));
    for (std::size_t l = 0; l < 2; ++l) {
      for (index i = 0; i < all.dlogits[l].size(); ++i) {
        const double dz = z.dlogits[l].data()[i], db = b.dlogits[l].data()[i];
        const double expected = 1.5 * dz - 3.0 * db;
        // Each gradient is a product of four factors, scaled before or after.
        const double bound = rounding_bound<double>(12.0, 1.5 * std::abs(dz) + 3.0 * std::abs(db));
        CHECK(within(all.dlogits[l].data()[i], expected, bound));
        CHECK(within(added.dlogits[l].data()[i], 0.5 + expected, bound + bound_of(1.0)));
        CHECK(within(all.dgates[l].data()[i], -3.0 * b.dgates[l].data()[i],
                     rounding_bound<double>(8.0, 3.0 * std::abs(b.dgates[l].data()[i]))));
      }
    }
    const std::vector<routed_view<double, cpu>> in = views(layers);
    const auto kept = sum.forward(ctx, std::span<const routed_view<double, cpu>>(in));
    CHECK(kept.values()[0](0, 0) == z.value);
    CHECK(kept.values()[1](0, 0) == b.value);
    CHECK(kept.values()[2](0, 0) == z.value);
  }

  TEST_CASE("losses nests") {
    test_random random(452);
    context<cpu> ctx(1);
    const std::vector<routed_layer<double>> layers = {random_layer<double>(random, 9, 4, 2)};
    const losses inner{term{0.5, router_z{}}};
    const losses outer{term{4.0, inner}};
    const auto z = run_loss<double>(ctx, router_z{}, layers);
    const auto r = run_loss<double>(ctx, outer, layers);
    CHECK(r.value == 2.0 * z.value);
    for (index i = 0; i < r.dlogits[0].size(); ++i) {
      CHECK(r.dlogits[0].data()[i] == 2.0 * z.dlogits[0].data()[i]);
    }
  }

  TEST_CASE("losses refuses a weight that is not finite, and says what its losses say") {
    context<cpu> ctx(1);
    const routed_layer<double> layer(2, 2);
    CHECK_THROWS_WITH_AS(run_loss<double>(ctx, losses{term{std::nan(""), router_z{}}}, {layer}),
                         "talpa::losses: 'weight' is nan, expected a finite number", value_error);
    using targeted = load_balance<balance::per_target, balance::per_layer>;
    CHECK_THROWS_WITH_AS(
        run_loss<double>(ctx, losses{term{1.0, targeted{.fraction = {.k = 0}}}}, {layer}),
        "talpa::load_balance: 'fraction.k' is 0, expected >= 1 = experts a token", value_error);
  }
}

}  // namespace talpa::losses_test
