// SPDX-License-Identifier: Apache-2.0
#include "support/routed.hpp"
#include "support/scalars.hpp"
#include "support/tolerance.hpp"

#include <talpa/cpu/fill.hpp>
#include <talpa/cpu/group_loss.hpp>
#include <talpa/losses/labelled.hpp>
#include <talpa/losses/prior_approximate.hpp>

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace talpa::prior_approximate_test {

using namespace support;

namespace {

/// One token's divergence and its gradient by the whole Jacobian of the softmax.
double slow_divergence(const routed_layer<double>& layer, index n, double clip,
                       std::vector<double>& dlogits) {
  const std::vector<double> p = probabilities(layer, n);
  const auto clipped = [&](double v) { return std::min(std::max(v, clip), 1.0 - clip); };
  double mass = 0.0, value = 0.0;
  for (index e = 0; e < layer.experts(); ++e) mass += layer.on(n, e) ? std::exp(1.0) : 1.0;
  dlogits.assign(p.size(), 0.0);
  for (index e = 0; e < layer.experts(); ++e) {
    const auto i = static_cast<std::size_t>(e);
    const double q = clipped((layer.on(n, e) ? std::exp(1.0) : 1.0) / mass);
    value += clipped(p[i]) * std::log(clipped(p[i]) / q);
    if (p[i] < clip || p[i] > 1.0 - clip) continue;
    const double slope = std::log(p[i] / q) + 1.0;
    for (std::size_t j = 0; j < p.size(); ++j) {
      dlogits[j] += slope * p[i] * ((i == j ? 1.0 : 0.0) - p[j]);
    }
  }
  return value;
}

/// A divergence has E products of logarithms of at most ln(1 / clip) < 17 and a softmax before.
template <class T>
double bound_of(index tokens, index experts, double spread) {
  return rounding_bound<T>(column_sum_roundings(tokens, 2) +
                               4.0 * softmax_roundings(experts, spread) +
                               static_cast<double>(experts) + 16.0,
                           2.0 * 17.0);
}

}  // namespace

TEST_SUITE("losses/prior_approximate") {
  TEST_CASE_TEMPLATE("prior_approximate on two experts, by hand", T, TALPA_SCALARS) {
    // p = (1/2, 1/2), expert 1 is right: q = (1, e) / (1 + e). 1/2 (ln(1/2 / q_0) + ln(1/2 / q_1))
    // is ln((1 + e) / 2) - 1/2. The slopes differ by ln(q_1 / q_0) = 1: dlogits = (1/4, -1/4).
    routed_layer<T> layer(1, 2);
    layer.turn_on(0, 1, 1.0);
    context<cpu> ctx(1);
    const auto r = run_loss<T>(ctx, prior_approximate{}, {layer}, T{1}, grad_mode::overwrite, T{5});
    const double bound = bound_of<T>(1, 2, 0.0);
    CHECK(within(r.value, std::log((1.0 + std::exp(1.0)) / 2.0) - 0.5, bound));
    CHECK(within(r.dlogits[0](0, 0), 0.25, bound));
    CHECK(within(r.dlogits[0](0, 1), -0.25, bound));
    CHECK(largest(to_table(r.dgates[0].view())) == 0.0);
  }

  TEST_CASE_TEMPLATE("prior_approximate and its gradient agree with loops in double", T,
                     TALPA_SCALARS) {
    test_random random(421);
    context<cpu> ctx(2);
    for (int trial = 0; trial < 30; ++trial) {
      const index experts = 1 + random.below(40), tokens = 1 + random.below(300);
      const routed_layer<T> layer =
          random_layer<T>(random, tokens, experts, 1 + random.below(experts), 4);
      const routed_layer<double> wide = widened(layer);
      double sum = 0.0, real = 0.0;
      std::vector<std::vector<double>> rows(static_cast<std::size_t>(tokens));
      for (index n = 0; n < tokens; ++n) {
        auto& row = rows[static_cast<std::size_t>(n)];
        if (!layer.real(n)) {
          row.assign(static_cast<std::size_t>(experts), 0.0);
          continue;
        }
        sum += slow_divergence(wide, n, 1e-7, row);
        real += 1.0;
      }
      const double bound = bound_of<T>(tokens, experts, spread_of({wide}));
      const auto r = run_loss<T>(ctx, prior_approximate{}, {layer});
      CHECK(within(r.value, real > 0.0 ? sum / real : 0.0, bound));
      bool fine = true;
      for (index n = 0; n < tokens; ++n) {
        for (index e = 0; e < experts; ++e) {
          const double g =
              rows[static_cast<std::size_t>(n)][static_cast<std::size_t>(e)] / std::max(real, 1.0);
          fine = fine && within(static_cast<double>(r.dlogits[0](n, e)), g, bound);
        }
      }
      CHECK(fine);
    }
  }

  TEST_CASE("it is least, and flat, where the router says what the labels say") {
    context<cpu> ctx(1);
    routed_layer<double> layer(1, 4);
    for (const index e : {1, 3}) {
      layer.turn_on(0, e, 1.0);
      layer.logits(0, e) = 1.0;
    }
    const auto r = run_loss<double>(ctx, prior_approximate{}, {layer});
    const double bound = bound_of<double>(1, 4, 1.0);
    CHECK(within(r.value, 0.0, bound));
    CHECK(largest(to_table(r.dlogits[0].view())) <= bound);
  }

  TEST_CASE("a router that is sure and wrong gets no gradient, and a wider clip gives less loss") {
    context<cpu> ctx(1);
    routed_layer<double> layer(1, 3);
    layer.logits(0, 0) = 60.0;
    layer.turn_on(0, 2, 1.0);
    const auto r = run_loss<double>(ctx, prior_approximate{}, {layer});
    CHECK(largest(to_table(r.dlogits[0].view())) == 0.0);
    const auto wide = run_loss<double>(ctx, prior_approximate{.clip = 0.25}, {layer});
    CHECK(wide.value < r.value);
    layer.logits(0, 1) = std::nan("");
    CHECK(std::isnan(run_loss<double>(ctx, prior_approximate{}, {layer}).value));
    CHECK_THROWS_WITH_AS(run_loss<double>(ctx, prior_approximate{.clip = 0.5}, {layer}),
                         "talpa::prior_approximate: 'clip' is 0.5, expected above 0, below 0.5 = "
                         "least probability",
                         value_error);
  }

  TEST_CASE("prior_approximate has the same bits for every lane group") {
    test_random random(422);
    for (const index experts : {1, 2, 32, 33, 70}) {
      CAPTURE(experts);
      routed_layer<float> layer = random_layer<float>(random, 21, experts, 1);
      add_control(random, layer);
      CHECK(row_term_difference(detail::prior_approximate_row{1e-7}, layer) == "");
    }
  }

  TEST_CASE("labelled puts its mask in the place of the router's") {
    test_random random(423);
    context<cpu> ctx(1);
    const routed_layer<double> chosen = random_layer<double>(random, 9, 5, 2);
    routed_layer<double> right = chosen;
    right.mask = random_layer<double>(random, 9, 5, 2).mask;
    const labelled<prior_approximate> loss{.labels = right.mask.view()};
    const auto found = run_loss<double>(ctx, loss, {chosen});
    const auto expected = run_loss<double>(ctx, prior_approximate{}, {right});
    CHECK(found.value == expected.value);
    CHECK(same_bits(found.dlogits[0].view(), expected.dlogits[0].view()));
    CHECK(found.value != run_loss<double>(ctx, prior_approximate{}, {chosen}).value);
    CHECK_THROWS_WITH_AS(run_loss<double>(ctx, loss, {chosen, chosen}),
                         "talpa::labelled: 'layers' is 2, expected 1..1 = layer of the labels",
                         value_error);
    const labelled<prior_approximate> short_of_one{.labels = right.mask.view().row_range(0, 8)};
    CHECK_THROWS_WITH_AS(run_loss<double>(ctx, short_of_one, {chosen}),
                         "talpa::labelled: 'labels' has shape [8, 1], expected [9, 1] = tokens, "
                         "mask words of the experts",
                         shape_error);
  }
}

}  // namespace talpa::prior_approximate_test
