// SPDX-License-Identifier: Apache-2.0
#include "support/routed.hpp"
#include "support/scalars.hpp"
#include "support/tolerance.hpp"

#include <talpa/cpu/fill.hpp>
#include <talpa/cpu/group_loss.hpp>
#include <talpa/losses/importance_cv2.hpp>

#include <doctest/doctest.h>

#include <vector>

namespace talpa::importance_cv2_test {

using namespace support;

namespace {

/// Sum of all gates of real tokens.
double gate_mass(const routed_layer<double>& layer) {
  double sum = 0.0;
  for (index n = 0; n < layer.tokens(); ++n) {
    for (index e = 0; e < layer.experts(); ++e) {
      if (layer.real(n) && layer.on(n, e)) sum += layer.gates(n, e);
    }
  }
  return sum;
}

/// Roundings of an importance and of the sums over experts made from it.
double roundings_of(index tokens, index experts) {
  return column_sum_roundings(tokens) + 2.0 * static_cast<double>(experts) + 10.0;
}

/// Error of the value: each deviation I_e - m is wrong by gamma S at most, S the mass, so the
/// variance by (2 S gamma) sqrt(E v) / (E - 1) at most with v <= S^2 / E; over m^2 = S^2 / E^2.
template <class T>
double value_bound(index tokens, index experts) {
  const auto e = static_cast<double>(experts);
  return rounding_bound<T>(roundings_of(tokens, experts), 2.0 * e * e / (e - 1.0) + e);
}

}  // namespace

TEST_SUITE("losses/importance_cv2") {
  TEST_CASE_TEMPLATE("importance_cv2 gives the value and gradient of an example worked by hand", T,
                     TALPA_SCALARS) {
    // I = (2, 1), m = 3/2, v = (1/4 + 1/4) / 1 = 1/2, value (1/2) / (9/4) = 2/9.
    // d / d I_0 = 2 (1/2) / (9/4) - (1/2) 2 (3/2) / (2 (81/16)) = 4/9 - 4/27 = 8/27,
    // d / d I_1 = -4/9 - 4/27 = -16/27.
    routed_layer<T> layer(3, 2);
    layer.turn_on(0, 0, 1.0);
    layer.turn_on(1, 0, 1.0);
    layer.turn_on(2, 1, 1.0);
    context<cpu> ctx(1);
    const auto result =
        run_loss<T>(ctx, importance_cv2{}, {layer}, T{1}, grad_mode::overwrite, T{5});
    const double bound = rounding_bound<T>(20.0, 1.0) + 1e-10;  // epsilon over m^2 > 1
    CHECK(within(result.value, 2.0 / 9.0, bound));
    CHECK(within(result.dgates[0](0, 0), 8.0 / 27.0, bound));
    CHECK(within(result.dgates[0](2, 1), -16.0 / 27.0, bound));
    CHECK(result.dgates[0](0, 1) == T{0});
    CHECK(largest(to_table(result.dlogits[0].view())) == 0.0);
  }

  TEST_CASE("importance_cv2 is 0 at perfect balance and E when one expert has everything") {
    context<cpu> ctx(1);
    routed_layer<double> layer(4, 4), single(4, 4);
    for (index n = 0; n < 4; ++n) {
      layer.turn_on(n, n, 0.75);
      single.turn_on(n, 2, 0.75);
    }
    const auto even = run_loss<double>(ctx, importance_cv2{}, {layer});
    CHECK(even.value == 0.0);
    CHECK(largest(to_table(even.dgates[0].view())) == 0.0);
    CHECK(within(run_loss<double>(ctx, importance_cv2{}, {single}).value, 4.0,
                 value_bound<double>(4, 4) + 4.0 * 1e-10 / (0.75 * 0.75)));
  }

  TEST_CASE_TEMPLATE("importance_cv2 agrees with loops in double and with central differences", T,
                     TALPA_SCALARS) {
    test_random random(19);
    context<cpu> ctx(2);
    for (const index experts : {2, 5, 34}) {
      const std::vector<routed_layer<T>> layers = {random_layer<T>(random, 11, experts, 2, 4),
                                                   random_layer<T>(random, 11, experts, 2)};
      std::vector<routed_layer<double>> wide;
      for (const auto& layer : layers) wide.push_back(widened(layer));
      const importance_cv2 loss{.epsilon = 1e-6};
      const auto result = run_loss<T>(ctx, loss, layers);
      CAPTURE(experts);
      CHECK(within(result.value, variation(wide, 1e-6), 2.0 * value_bound<T>(11, experts)));
      const double step = central_difference_step(1.0);
      for (std::size_t l = 0; l < 2; ++l) {
        const layer_gradient expected =
            numeric_gradient(wide, l, step, [](const auto& at) { return variation(at, 1e-6); });
        // With F = E^2 / (E - 1) the value is F sum I^2 / S^2 and a constant; its third derivative
        // by a gate is at most 72 F / S^3, and a gradient is 2 |I - m| / ((E - 1) m^2) and a
        // smaller part, at most 4 F / S for |I - m| <= S, v <= S^2 / E.
        const auto e = static_cast<double>(experts);
        const double mass = gate_mass(wide[l]), factor = e * e / (e - 1.0);
        const double bound =
            rounding_bound<T>(2.0 * roundings_of(11, experts), 4.0 * factor / mass) +
            central_difference_bound(step, 72.0 * factor / (mass * mass * mass),
                                     roundings_of(11, experts), 2.0 * factor);
        CHECK(difference(result.dgates[l].view(), expected.dgates, bound) == "");
        CHECK(largest(expected.dgates) > 100.0 * bound);
        CHECK(largest(to_table(result.dlogits[l].view())) == 0.0);
      }
    }
  }

  TEST_CASE("importance_cv2 is 0 without gradient for one expert, no tokens, no layers") {
    test_random random(29);
    context<cpu> ctx(1);
    routed_layer<float> one = random_layer<float>(random, 5, 1, 1);
    routed_layer<float> masked = random_layer<float>(random, 5, 3, 1);
    masked.padding = vector<std::uint8_t, cpu>(5);
    for (const auto& layer : {one, masked, routed_layer<float>(0, 3)}) {
      const auto result =
          run_loss<float>(ctx, importance_cv2{}, {layer}, 1.0f, grad_mode::overwrite, 5.0f);
      CHECK(result.value == 0.0f);
      CHECK(largest(to_table(result.dgates[0].view())) == 0.0);
      CHECK(largest(to_table(result.dlogits[0].view())) == 0.0);
    }
    CHECK(run_loss<float>(ctx, importance_cv2{}, {}).value == 0.0f);
  }

  TEST_CASE("importance_cv2 treats padding as absent") {
    test_random random(39);
    routed_layer<double> padded = random_layer<double>(random, 200, 4, 2, 3);
    const routed_layer<double> removed = without_padding(padded);
    // Even a gate that a careless router left on padding does not count.
    for (index n = 0; n < padded.tokens(); ++n) {
      if (!padded.real(n)) padded.turn_on(n, 3, 100.0);
    }
    context<cpu> ctx(1);
    const auto with = run_loss<double>(ctx, importance_cv2{}, {padded});
    CHECK(within(with.value, run_loss<double>(ctx, importance_cv2{}, {removed}).value,
                 2.0 * value_bound<double>(200, 4)));
    for (index n = 0; n < padded.tokens(); ++n) {
      if (!padded.real(n)) CHECK(with.dgates[0](n, 3) == 0.0);
    }
  }

  TEST_CASE(
      "importance_cv2 adds in accumulate mode, scales with dvalue, same bits for any threads") {
    test_random random(49);
    const std::vector<routed_layer<double>> layers = {random_layer<double>(random, 700, 9, 2, 6)};
    context<cpu> one(1);
    const auto expected = run_loss<double>(one, importance_cv2{}, layers);
    for (const int threads : {2, 3}) {
      context<cpu> ctx(threads);
      const auto found = run_loss<double>(ctx, importance_cv2{}, layers);
      CHECK(found.value == expected.value);
      CHECK(same_bits(found.dgates[0].view(), expected.dgates[0].view()));
      const auto added =
          run_loss<double>(ctx, importance_cv2{}, layers, 2.0, grad_mode::accumulate, 1.0);
      for (index i = 0; i < added.dgates[0].size(); ++i) {
        CHECK(added.dgates[0].data()[i] == 1.0 + 2.0 * expected.dgates[0].data()[i]);
        CHECK(added.dlogits[0].data()[i] == 1.0);
      }
    }
  }

  TEST_CASE("importance_cv2 has the same bits for every lane group") {
    test_random random(59);
    for (const index experts : {1, 2, 32, 33, 70}) {
      CAPTURE(experts);
      const detail::importance_cv2_group loss{1e-10};
      CHECK(lane_group_difference<float>(loss, random, experts) == "");
      CHECK(lane_group_difference<double>(loss, random, experts) == "");
    }
  }

  TEST_CASE("importance_cv2 refuses an epsilon that protects from nothing") {
    context<cpu> ctx(1);
    CHECK_THROWS_WITH_AS(
        run_loss<double>(ctx, importance_cv2{.epsilon = 0.0}, {routed_layer<double>(2, 2)}),
        "talpa::importance_cv2: 'epsilon' is 0, expected a positive number", value_error);
  }
}

}  // namespace talpa::importance_cv2_test
