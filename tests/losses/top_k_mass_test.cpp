// SPDX-License-Identifier: Apache-2.0
#include "support/routed.hpp"
#include "support/scalars.hpp"
#include "support/tolerance.hpp"

#include <talpa/cpu/fill.hpp>
#include <talpa/cpu/group_loss.hpp>
#include <talpa/losses/top_k_mass.hpp>

#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <vector>

namespace talpa::top_k_mass_test {

using namespace support;

namespace {

/// Sum of probabilities (at most 1) and their mean.
template <class T>
double bound_of(index tokens, index experts, double spread) {
  return rounding_bound<T>(
      column_sum_roundings(tokens, 2) + 2.0 * softmax_roundings(experts, spread) + 8.0, 2.0);
}

}  // namespace

TEST_SUITE("losses/top_k_mass") {
  TEST_CASE_TEMPLATE("top_k_mass gives the value and gradient of an example worked by hand", T,
                     TALPA_SCALARS) {
    // p = (1/2, 1/2) with expert 1 on, p = (3/4, 1/4) with expert 0 on: (1/2 + 3/4) / 4 = 5/16.
    // Token 1: dlogits_0 = 3/4 (1 - 3/4) / 4 = 3/64, dlogits_1 = 1/4 (0 - 3/4) / 4 = -3/64.
    routed_layer<T> layer(2, 2);
    layer.logits(1, 0) = static_cast<T>(std::log(3.0));
    layer.turn_on(0, 1, 1.0);
    layer.turn_on(1, 0, 1.0);
    context<cpu> ctx(1);
    const auto r = run_loss<T>(ctx, top_k_mass{}, {layer}, T{1}, grad_mode::overwrite, T{5});
    const double bound = bound_of<T>(2, 2, std::log(3.0));
    CHECK(within(r.value, 5.0 / 16.0, bound));
    CHECK(within(r.dlogits[0](0, 1), 1.0 / 16.0, bound));
    CHECK(within(r.dlogits[0](1, 0), 3.0 / 64.0, bound));
    CHECK(within(r.dlogits[0](1, 1), -3.0 / 64.0, bound));
    CHECK(largest(to_table(r.dgates[0].view())) == 0.0);
  }

  TEST_CASE_TEMPLATE("top_k_mass agrees with loops in double for thousands of rows", T,
                     TALPA_SCALARS) {
    test_random random(411);
    context<cpu> ctx(2);
    for (int trial = 0; trial < 40; ++trial) {
      const index experts = 1 + random.below(40), tokens = 1 + random.below(300);
      const std::vector<routed_layer<T>> layers = {
          random_layer<T>(random, tokens, experts, 1 + random.below(experts), 4),
          random_layer<T>(random, tokens, experts, 1)};
      const auto wide = all_widened(layers);
      const double expected = mean_over_tokens(wide, [](const auto& layer, index n) {
        const std::vector<double> p = probabilities(layer, n);
        double sum = 0.0;
        for (index e = 0; e < layer.experts(); ++e) {
          if (layer.on(n, e)) sum += p[static_cast<std::size_t>(e)];
        }
        return sum / static_cast<double>(layer.experts());
      });
      CHECK(within(run_loss<T>(ctx, top_k_mass{}, layers).value, expected,
                   bound_of<T>(tokens, experts, spread_of(wide))));
    }
  }

  TEST_CASE("top_k_mass is 1 / E when the chosen experts have everything, 0 without a choice") {
    context<cpu> ctx(1);
    routed_layer<double> all(3, 4), none(3, 4);
    for (index n = 0; n < 3; ++n) {
      all.logits(n, 2) = 2000.0;
      all.turn_on(n, 2, 1.0);
    }
    CHECK(within(run_loss<double>(ctx, top_k_mass{}, {all}).value, 0.25,
                 rounding_bound<double>(8.0, 1.0)));
    CHECK(run_loss<double>(ctx, top_k_mass{}, {none}).value == 0.0);
    all.logits(1, 1) = std::nan("");
    CHECK(std::isnan(run_loss<double>(ctx, top_k_mass{}, {all}).value));
  }

  TEST_CASE("top_k_mass has the same bits for every lane group") {
    test_random random(412);
    for (const index experts : {1, 2, 32, 33, 70}) {
      CAPTURE(experts);
      routed_layer<float> layer = random_layer<float>(random, 21, experts, 1);
      add_control(random, layer);
      CHECK(row_term_difference(detail::top_k_mass_row{}, layer) == "");
    }
  }
}

}  // namespace talpa::top_k_mass_test
