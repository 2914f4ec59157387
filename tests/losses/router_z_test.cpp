// SPDX-License-Identifier: Apache-2.0
#include "support/routed.hpp"
#include "support/scalars.hpp"
#include "support/tolerance.hpp"

#include <talpa/cpu/fill.hpp>
#include <talpa/cpu/group_loss.hpp>
#include <talpa/losses/router_z.hpp>

#include <doctest/doctest.h>

#include <limits>
#include <vector>

namespace talpa::router_z_test {

using namespace support;

namespace {

/// Largest |ln sum exp| of a real token.
double largest_z(const std::vector<routed_layer<double>>& layers) {
  double z = 0.0;
  for (const auto& layer : layers) {
    for (index n = 0; n < layer.tokens(); ++n) {
      if (layer.real(n)) z = std::max(z, std::abs(log_sum_exp(layer, n)));
    }
  }
  return z;
}

/// Error of the mean of z^2 over n tokens, layers times: z is top + ln sum with an error of
/// (E + spread + 4) u in the sum, absolute in its logarithm, and of 3 u |z| besides.
template <class T>
double value_bound(const std::vector<routed_layer<double>>& layers) {
  const double z = largest_z(layers), spread = spread_of(layers);
  const double of_z = rounding_bound<T>(softmax_roundings(layers[0].experts(), spread), 1.0) +
                      rounding_bound<T>(3.0, z + spread);
  const auto count = static_cast<double>(layers.size());
  return count * (2.0 * z * of_z + of_z * of_z +
                  rounding_bound<T>(column_sum_roundings(layers[0].tokens()) + 4.0, z * z));
}

}  // namespace

TEST_SUITE("losses/router_z") {
  TEST_CASE_TEMPLATE("router_z gives the value and gradient of an example worked by hand", T,
                     TALPA_SCALARS) {
    // Rows (0, ln 3): z = ln 4, p = (1/4, 3/4). Rows of zeros: z = ln 2, p = (1/2, 1/2).
    // Value ((ln 4)^2 + (ln 2)^2) / 2 = 5/2 (ln 2)^2; gradient of the first row 2 ln 4 p / 2.
    routed_layer<T> layer(2, 2);
    layer.logits(0, 1) = static_cast<T>(std::log(3.0));
    context<cpu> ctx(1);
    const auto result = run_loss<T>(ctx, router_z{}, {layer}, T{1}, grad_mode::overwrite, T{5});
    const double ln2 = std::log(2.0);
    const double bound = rounding_bound<T>(20.0, 2.5 * ln2 * ln2);
    CHECK(within(result.value, 2.5 * ln2 * ln2, bound));
    CHECK(within(result.dlogits[0](0, 0), 0.5 * ln2, bound));
    CHECK(within(result.dlogits[0](0, 1), 1.5 * ln2, bound));
    CHECK(within(result.dlogits[0](1, 0), 0.5 * ln2, bound));
    CHECK(largest(to_table(result.dgates[0].view())) == 0.0);
  }

  TEST_CASE_TEMPLATE("router_z agrees with loops in double and with central differences", T,
                     TALPA_SCALARS) {
    test_random random(15);
    context<cpu> ctx(2);
    for (const index experts : {1, 2, 5, 33, 66}) {
      const std::vector<routed_layer<T>> layers = {random_layer<T>(random, 9, experts, 1, 4),
                                                   random_layer<T>(random, 9, experts, 1)};
      std::vector<routed_layer<double>> wide;
      for (const auto& layer : layers) wide.push_back(widened(layer));
      const auto result = run_loss<T>(ctx, router_z{}, layers);
      CAPTURE(experts);
      CHECK(within(result.value, z_loss(wide), value_bound<T>(wide)));
      // (z^2)''' = 6 z' z'' + 2 z z''' with |z'| <= 1, |z''|, |z'''| <= 1/4, over few tokens.
      const double z = largest_z(wide), step = central_difference_step(1.0);
      const double bound =
          rounding_bound<T>(3.0 * softmax_roundings(experts, spread_of(wide)) + 10.0,
                            2.0 * (z + spread_of(wide))) +
          central_difference_bound(step, 1.5 + 0.5 * z, softmax_roundings(experts, 0.0) + 20.0,
                                   2.0 * z * z);
      for (std::size_t l = 0; l < 2; ++l) {
        const layer_gradient expected =
            numeric_gradient(wide, l, step, [](const auto& at) { return z_loss(at); });
        CHECK(difference(result.dlogits[l].view(), expected.dlogits, bound) == "");
        CHECK(largest(expected.dlogits) > 100.0 * bound);
      }
    }
  }

  TEST_CASE("router_z is (ln E)^2 a layer for logits of zero") {
    context<cpu> ctx(1);
    const routed_layer<double> layer(3, 7);
    const double one = std::log(7.0) * std::log(7.0);
    CHECK(within(run_loss<double>(ctx, router_z{}, {layer, layer}).value, 2.0 * one,
                 value_bound<double>({layer, layer})));
  }

  TEST_CASE("router_z takes large logits, -inf as a masked expert, and shows NaN") {
    context<cpu> ctx(1);
    routed_layer<float> layer(2, 3);
    layer.logits(0, 0) = 1000.0f;
    layer.logits(1, 0) = -1000.0f;
    layer.logits(1, 1) = -1000.0f;
    layer.logits(1, 2) = -std::numeric_limits<float>::infinity();
    const auto result = run_loss<float>(ctx, router_z{}, {layer});
    const double second = -1000.0 + std::log(2.0);
    const double expected = (1e6 + second * second) / 2.0;
    CHECK(within(result.value, expected, rounding_bound<float>(8.0, expected)));
    CHECK(result.dlogits[0](1, 2) == 0.0f);
    CHECK(within(result.dlogits[0](1, 0), second / 2.0, rounding_bound<float>(10.0, second)));
    layer.logits(1, 2) = std::numeric_limits<float>::quiet_NaN();
    CHECK(std::isnan(run_loss<float>(ctx, router_z{}, {layer}).value));
    for (index e = 0; e < 3; ++e) layer.logits(1, e) = -std::numeric_limits<float>::infinity();
    CHECK(std::isnan(run_loss<float>(ctx, router_z{}, {layer}).value));
  }

  TEST_CASE("router_z treats padding as absent") {
    test_random random(25);
    const routed_layer<double> padded = random_layer<double>(random, 290, 4, 1, 3);
    const std::vector<routed_layer<double>> removed = {without_padding(padded)};
    context<cpu> ctx(1);
    const auto with = run_loss<double>(ctx, router_z{}, {padded}, 1.0, grad_mode::overwrite, 3.0);
    CHECK(within(with.value, run_loss<double>(ctx, router_z{}, removed).value,
                 2.0 * value_bound<double>(removed)));
    for (index n = 0; n < padded.tokens(); ++n) {
      if (!padded.real(n)) CHECK(with.dlogits[0](n, 2) == 0.0);
    }
  }

  TEST_CASE("router_z is 0 without real tokens, tokens or layers") {
    context<cpu> ctx(1);
    routed_layer<float> masked(3, 2);
    masked.padding = vector<std::uint8_t, cpu>(3);
    const auto result =
        run_loss<float>(ctx, router_z{}, {masked}, 1.0f, grad_mode::overwrite, 3.0f);
    CHECK(result.value == 0.0f);
    CHECK(largest(to_table(result.dlogits[0].view())) == 0.0);
    CHECK(run_loss<float>(ctx, router_z{}, {routed_layer<float>(0, 2)}).value == 0.0f);
    CHECK(run_loss<float>(ctx, router_z{}, {}).value == 0.0f);
  }

  TEST_CASE("router_z adds in accumulate mode, scales with dvalue, same bits for any threads") {
    test_random random(35);
    const std::vector<routed_layer<double>> layers = {random_layer<double>(random, 700, 9, 2, 6)};
    context<cpu> one(1);
    const auto expected = run_loss<double>(one, router_z{}, layers);
    for (const int threads : {2, 3}) {
      context<cpu> ctx(threads);
      const auto found = run_loss<double>(ctx, router_z{}, layers);
      CHECK(found.value == expected.value);
      CHECK(same_bits(found.dlogits[0].view(), expected.dlogits[0].view()));
      const auto added = run_loss<double>(ctx, router_z{}, layers, 2.0, grad_mode::accumulate, 1.0);
      for (index i = 0; i < added.dlogits[0].size(); ++i) {
        CHECK(added.dlogits[0].data()[i] == 1.0 + 2.0 * expected.dlogits[0].data()[i]);
        CHECK(added.dgates[0].data()[i] == 1.0);
      }
    }
  }

  TEST_CASE("router_z has the same bits for every lane group") {
    test_random random(45);
    CHECK(lane_group_difference<float>(detail::router_z_group{}, random, 5) == "");
    CHECK(lane_group_difference<double>(detail::router_z_group{}, random, 40) == "");
  }

  TEST_CASE("router_z refuses gradients of another shape") {
    context<cpu> ctx(1);
    const routed_layer<double> layer(3, 2);
    const auto saved = router_z{}.forward(ctx, layer.view());
    matrix<double, cpu> dvalue(1, 1), right(3, 2), wrong(2, 3);
    CHECK_THROWS_WITH_AS(
        router_z{}.backward(ctx, layer.view(), saved, dvalue, {right, wrong}, grad_mode::overwrite),
        "talpa::router_z: 'out[0].dgates' has shape [2, 3], expected [3, 2] = shape of logits",
        shape_error);
  }
}

}  // namespace talpa::router_z_test
