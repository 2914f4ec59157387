// SPDX-License-Identifier: Apache-2.0
#include "support/routed.hpp"
#include "support/scalars.hpp"
#include "support/tolerance.hpp"

#include <talpa/cpu/fill.hpp>
#include <talpa/cpu/group_loss.hpp>
#include <talpa/losses/lambda.hpp>

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace talpa::lambda_test {

using namespace support;

namespace {

/// lambda of token n.
double lambda_of(const routed_layer<double>& layer, index n, double epsilon) {
  return std::log(1.0 / (1.0 + std::exp(-layer.control(n, 0)))) + 1.0 - epsilon;
}
/// relu(lower_k - lambda) of token n, with the logits sorted.
double lack_of(const routed_layer<double>& layer, index n, index k, double epsilon) {
  std::vector<double> u;
  for (index e = 0; e < layer.experts(); ++e) u.push_back(layer.logits(n, e));
  std::sort(u.begin(), u.end());
  double lower = 1.0;
  for (index j = 1; j <= k; ++j) lower -= u[u.size() - static_cast<std::size_t>(j)];
  lower += static_cast<double>(k) * u[u.size() - static_cast<std::size_t>(k) - 1];
  return std::max(0.0, lower - lambda_of(layer, n, epsilon));
}
/// Controls lie in (-2, 2), so 1 - lambda is below 3, and sums of differences of logits below k
/// times their spread.
template <class T>
double bound_of(index tokens, double k, double spread) {
  return rounding_bound<T>(column_sum_roundings(tokens, 2) + k + 16.0, 2.0 * (3.0 + k * spread));
}

}  // namespace

TEST_SUITE("losses/lambda") {
  TEST_CASE_TEMPLATE("lambda_mean gives the value and gradient of an example worked by hand", T,
                     TALPA_SCALARS) {
    // control 0 and ln 3: sigmoid 1/2 and 3/4, 1 - lambda = 1/4 + ln 2 and 1/4 + ln 4/3.
    routed_layer<T> layer(2, 3);
    layer.control = matrix<T, cpu>(2, 1);
    layer.control(1, 0) = static_cast<T>(std::log(3.0));
    context<cpu> ctx(1);
    const auto r =
        run_loss<T>(ctx, lambda_mean{.epsilon = 0.25}, {layer}, T{1}, grad_mode::overwrite, T{5});
    const double bound = bound_of<T>(2, 0.0, 0.0);
    CHECK(within(r.value, 0.25 + 0.5 * std::log(8.0 / 3.0), bound));
    CHECK(within(r.dcontrol[0](0, 0), -0.25, bound));
    CHECK(within(r.dcontrol[0](1, 0), -0.125, bound));
    CHECK(largest(to_table(r.dlogits[0].view())) == 0.0);
    CHECK(largest(to_table(r.dgates[0].view())) == 0.0);
  }

  TEST_CASE_TEMPLATE("lambda_sparsity gives the value and gradient of an example worked by hand", T,
                     TALPA_SCALARS) {
    // Control 0: 1 - lambda = 1/4 + ln 2. Logits (1, 3/4, 3/4), k = 1: the gap is 1/4, ln 2 is
    // lacking; k = 2 has the same gap. Logits (3, 0, 0): a gap of 3, nothing is lacking.
    routed_layer<T> layer(2, 3);
    layer.control = matrix<T, cpu>(2, 1);
    layer.logits(0, 0) = T{1};
    layer.logits(0, 1) = layer.logits(0, 2) = static_cast<T>(0.75);
    layer.logits(1, 0) = T{3};
    context<cpu> ctx(1);
    const double bound = bound_of<T>(2, 2.0, 3.0);
    for (const index k : {1, 2}) {
      const auto r = run_loss<T>(ctx, lambda_sparsity{.k = k, .epsilon = 0.25}, {layer}, T{1},
                                 grad_mode::overwrite, T{5});
      CHECK(within(r.value, 0.5 * std::log(2.0), bound));
      CHECK(within(r.dcontrol[0](0, 0), -0.25, bound));
      CHECK(r.dcontrol[0](1, 0) == T{0});
      CHECK(largest(to_table(r.dlogits[0].view())) == 0.0);
    }
  }

  TEST_CASE_TEMPLATE("both agree with loops in double for thousands of rows", T, TALPA_SCALARS) {
    test_random random(431);
    context<cpu> ctx(2);
    for (int trial = 0; trial < 60; ++trial) {
      const index experts = 2 + random.below(40), tokens = 1 + random.below(200);
      const index k = 1 + random.below(std::min<index>(experts - 1, 6));
      std::vector<routed_layer<T>> layers = {random_layer<T>(random, tokens, experts, 1, 4),
                                             random_layer<T>(random, tokens, experts, 1)};
      for (auto& layer : layers) {
        add_control(random, layer);
        // Close logits and ties, so that experts are lacking in some rows.
        for (index i = 0; i < layer.logits.size(); ++i) {
          layer.logits.data()[i] = std::round(layer.logits.data()[i] * T{4}) / T{16};
        }
      }
      const auto wide = all_widened(layers);
      const double bound = bound_of<T>(tokens, static_cast<double>(k), spread_of(wide));
      CAPTURE(trial);
      CHECK(within(run_loss<T>(ctx, lambda_mean{}, layers).value,
                   mean_over_tokens(wide, [](const auto& layer,
                                             index n) { return 1.0 - lambda_of(layer, n, 1e-2); }),
                   bound));
      CHECK(within(run_loss<T>(ctx, lambda_sparsity{.k = k}, layers).value,
                   mean_over_tokens(wide, [&](const auto& layer,
                                              index n) { return lack_of(layer, n, k, 1e-2); }),
                   bound));
    }
  }

  TEST_CASE("lambda_sparsity lacks nothing with k finite logits, and is NaN without a valid row") {
    routed_layer<double> layer(1, 4);
    layer.control = matrix<double, cpu>(1, 1);
    layer.logits(0, 2) = layer.logits(0, 3) = -std::numeric_limits<double>::infinity();
    context<cpu> ctx(1);
    CHECK(run_loss<double>(ctx, lambda_sparsity{.k = 2}, {layer}).value == 0.0);
    CHECK(run_loss<double>(ctx, lambda_sparsity{.k = 3}, {layer}).value == 0.0);
    CHECK(run_loss<double>(ctx, lambda_sparsity{.k = 1}, {layer}).value > 0.0);
    layer.logits(0, 0) = std::nan("");
    CHECK(std::isnan(run_loss<double>(ctx, lambda_sparsity{.k = 2}, {layer}).value));
  }

  TEST_CASE("the losses of lambda have the same bits for every lane group") {
    test_random random(432);
    for (const index experts : {2, 32, 33, 70}) {
      CAPTURE(experts);
      routed_layer<float> layer = random_layer<float>(random, 21, experts, 1);
      add_control(random, layer);
      CHECK(row_term_difference(detail::lambda_mean_row{1e-2}, layer) == "");
      CHECK(row_term_difference(detail::lambda_sparsity_row{1, 1e-2}, layer) == "");
    }
  }

  TEST_CASE("the losses of lambda refuse too large a k, epsilon, and a router without control") {
    context<cpu> ctx(1);
    routed_layer<double> layer(2, 2);
    CHECK_THROWS_WITH_AS(run_loss<double>(ctx, lambda_sparsity{}, {layer}),
                         "talpa::lambda_sparsity: 'k' is 2, expected 1..1 = experts - 1",
                         value_error);
    CHECK_THROWS_WITH_AS(run_loss<double>(ctx, lambda_sparsity{.k = 1, .epsilon = 1.0}, {layer}),
                         "talpa::lambda_sparsity: 'epsilon' is 1, expected 0..1", value_error);
    CHECK_THROWS_WITH_AS(run_loss<double>(ctx, lambda_mean{.epsilon = -1.0}, {layer}),
                         "talpa::lambda_mean: 'epsilon' is -1, expected 0..1", value_error);
    CHECK_THROWS_WITH_AS(
        run_loss<double>(ctx, lambda_mean{}, {layer}),
        "talpa::lambda_mean: 'layers[0].control' has shape [0, 0], expected [2, 1] = one number a "
        "token",
        shape_error);
  }
}

}  // namespace talpa::lambda_test
