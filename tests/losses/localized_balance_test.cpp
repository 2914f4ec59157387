// SPDX-License-Identifier: Apache-2.0
#include "support/routed.hpp"
#include "support/scalars.hpp"
#include "support/tolerance.hpp"

#include <talpa/cpu/fill.hpp>
#include <talpa/cpu/group_loss.hpp>
#include <talpa/losses/localized_balance.hpp>

#include <doctest/doctest.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace talpa::localized_balance_test {

using namespace support;

namespace {

/// Gives a layer sequences of `length` tokens with random classes -1, 0, 1.
template <class T>
void add_labels(test_random& random, routed_layer<T>& layer, index length) {
  layer.sequence_length = length;
  layer.labels = vector<std::int32_t, cpu>(layer.tokens() / length);
  for (index s = 0; s < layer.labels.size(); ++s) {
    layer.labels[s] = static_cast<std::int32_t>(random.below(3)) - 1;
  }
}

/// The loss of one layer by plain loops over a list of (sequence, expert).
double slow_balance(const routed_layer<double>& layer, double delta, double epsilon) {
  const index length = layer.sequence_length, experts = layer.experts();
  std::vector<double> z;
  for (index s = 0; s * length < layer.tokens(); ++s) {
    std::vector<double> sums(static_cast<std::size_t>(experts), 0.0);
    bool live = false;
    for (index n = s * length; n < (s + 1) * length; ++n) {
      if (!layer.real(n)) continue;
      live = true;
      for (index e = 0; e < experts; ++e) {
        if (layer.on(n, e)) sums[static_cast<std::size_t>(e)] += layer.gates(n, e);
      }
    }
    if (!live) continue;
    for (index e = 0; e < experts; ++e) {
      const bool first = e < experts / 2;
      const bool own = layer.labels[s] == 1 ? first : layer.labels[s] == 0 ? !first : false;
      z.push_back(sums[static_cast<std::size_t>(e)] * (own ? 1.0 + delta : 1.0 - delta));
    }
  }
  if (z.size() < 2) return 0.0;
  const auto count = static_cast<double>(z.size());
  double mean = 0.0, squares = 0.0;
  for (const double x : z) mean += x / count;
  for (const double x : z) squares += (x - mean) * (x - mean);
  return squares / (count - 1.0) / (mean * mean + epsilon);
}

/// As for importance_cv2, with M = S E numbers in place of E.
template <class T>
double bound_of(index tokens, double numbers) {
  return rounding_bound<T>(column_sum_roundings(tokens) + 2.0 * numbers + 12.0,
                           2.0 * numbers * numbers / (numbers - 1.0) + numbers);
}

}  // namespace

TEST_SUITE("losses/localized_balance") {
  TEST_CASE_TEMPLATE("localized_balance gives the value and gradient of an example worked by hand",
                     T, TALPA_SCALARS) {
    // Two sequences of one token, E = 2, delta = 1/2. Label 1 has gates (1, 1): z = (3/2, 1/2).
    // Label 0 has gates (1, 1): z = (1/2, 3/2). m = 1, v = 4 (1/4) / 3 = 1/3, value 1/3.
    // dz = 2 (z - m) / 3 - 1/3 2 / 4 = 1/3 - 1/6 = 1/6 above the mean, -1/2 below;
    // dgates = 3/2 (1/6) = 1/4 above, 1/2 (-1/2) = -1/4 below.
    routed_layer<T> layer(2, 2);
    for (index n = 0; n < 2; ++n) {
      for (index e = 0; e < 2; ++e) layer.turn_on(n, e, 1.0);
    }
    layer.sequence_length = 1;
    layer.labels = vector<std::int32_t, cpu>(2);
    layer.labels[0] = 1;
    context<cpu> ctx(1);
    const auto r = run_loss<T>(ctx, localized_balance{.delta = 0.5}, {layer}, T{1},
                               grad_mode::overwrite, T{5});
    const double bound = bound_of<T>(2, 4.0) + 1e-10;  // epsilon over m^2 = 1
    CHECK(within(r.value, 1.0 / 3.0, bound));
    CHECK(within(r.dgates[0](0, 0), 0.25, bound));
    CHECK(within(r.dgates[0](0, 1), -0.25, bound));
    CHECK(within(r.dgates[0](1, 0), -0.25, bound));
    CHECK(within(r.dgates[0](1, 1), 0.25, bound));
    CHECK(largest(to_table(r.dlogits[0].view())) == 0.0);
  }

  TEST_CASE_TEMPLATE("localized_balance agrees with loops in double for thousands of rows", T,
                     TALPA_SCALARS) {
    test_random random(441);
    context<cpu> ctx(2);
    for (int trial = 0; trial < 60; ++trial) {
      const index experts = 1 + random.below(20), length = 1 + random.below(30);
      const index sequences = 1 + random.below(8);
      std::vector<routed_layer<T>> layers;
      double expected = 0.0;
      for (int l = 0; l < 2; ++l) {
        layers.push_back(random_layer<T>(random, sequences * length, experts,
                                         1 + random.below(experts), l == 0 ? 3 : 0));
        add_labels(random, layers.back(), length);
        expected += slow_balance(widened(layers.back()), 0.25, 1e-6);
      }
      const auto numbers = static_cast<double>(sequences * experts);
      CAPTURE(trial);
      CHECK(
          within(run_loss<T>(ctx, localized_balance{.delta = 0.25, .epsilon = 1e-6}, layers).value,
                 expected, 2.0 * bound_of<T>(sequences * length, std::max(2.0, numbers))));
    }
  }

  TEST_CASE("localized_balance is 0 where a half weighs what is wanted of it, and M for one of M") {
    // delta = 1/2: gates 1/3 in the own half, 1 in the other.
    routed_layer<double> layer(2, 4), one(2, 4);
    layer.sequence_length = one.sequence_length = 1;
    layer.labels = one.labels = vector<std::int32_t, cpu>(2);
    layer.labels[0] = 1;
    for (index n = 0; n < 2; ++n) {
      for (index e = 0; e < 4; ++e) layer.turn_on(n, e, (e < 2) == (n == 0) ? 1.0 / 3.0 : 1.0);
    }
    one.turn_on(1, 3, 0.5);
    context<cpu> ctx(1);
    CHECK(within(run_loss<double>(ctx, localized_balance{.delta = 0.5}, {layer}).value, 0.0,
                 bound_of<double>(2, 8.0)));
    // m = z / 8: epsilon over m^2.
    CHECK(within(run_loss<double>(ctx, localized_balance{.delta = 0.0}, {one}).value, 8.0,
                 bound_of<double>(2, 8.0) + 8.0 * 1e-10 * 256.0));
  }

  TEST_CASE("localized_balance is 0 without gradient for a single number, padding and no tokens") {
    context<cpu> ctx(1);
    routed_layer<float> single(3, 1), padded(2, 3);
    single.labels = padded.labels = vector<std::int32_t, cpu>(1);
    padded.padding = vector<std::uint8_t, cpu>(2);
    for (index n = 0; n < 3; ++n) single.turn_on(n, 0, 1.0);
    padded.turn_on(0, 1, 1.0);
    for (const auto& layer : {single, padded, routed_layer<float>(0, 3)}) {
      const auto r =
          run_loss<float>(ctx, localized_balance{}, {layer}, 1.0f, grad_mode::overwrite, 5.0f);
      CHECK(r.value == 0.0f);
      CHECK(largest(to_table(r.dgates[0].view())) == 0.0);
      CHECK(largest(to_table(r.dlogits[0].view())) == 0.0);
    }
    // A layer of no tokens before another leaves the other's gradient alone.
    routed_layer<float> live(1, 2);
    live.labels = vector<std::int32_t, cpu>(1);
    live.turn_on(0, 0, 1.0);
    const auto alone = run_loss<float>(ctx, localized_balance{}, {live});
    const auto behind =
        run_loss<float>(ctx, localized_balance{}, {routed_layer<float>(0, 3), live});
    CHECK(alone.value == behind.value);
    CHECK(same_bits(alone.dgates[0].view(), behind.dgates[1].view()));
  }

  TEST_CASE("localized_balance has the same bits for every lane group") {
    test_random random(442);
    for (const index experts : {1, 3, 33}) {
      std::vector<std::int32_t> labels;
      std::vector<index> tokens;
      for (int s = 0; s < 5; ++s) {
        labels.push_back(static_cast<std::int32_t>(random.below(2)));
        tokens.push_back(random.below(3));
      }
      tokens[0] = 1;
      const detail::localized_balance_group loss{0.25, 1e-10, experts, labels.data(),
                                                 tokens.data()};
      CHECK(lane_group_difference<float>(loss, random, 5 * experts) == "");
      CHECK(lane_group_difference<double>(loss, random, 5 * experts) == "");
    }
  }

  TEST_CASE("localized_balance refuses numbers out of range and a layer without labels") {
    context<cpu> ctx(1);
    routed_layer<double> layer(4, 2);
    layer.sequence_length = 2;
    CHECK_THROWS_WITH_AS(run_loss<double>(ctx, localized_balance{.delta = 2.0}, {layer}),
                         "talpa::localized_balance: 'delta' is 2, expected 0..1", value_error);
    CHECK_THROWS_WITH_AS(run_loss<double>(ctx, localized_balance{.epsilon = 0.0}, {layer}),
                         "talpa::localized_balance: 'epsilon' is 0, expected a positive number",
                         value_error);
    CHECK_THROWS_WITH_AS(run_loss<double>(ctx, localized_balance{}, {layer}),
                         "talpa::localized_balance: 'layers[0].labels' has shape [0], expected [2] "
                         "= one class a sequence",
                         shape_error);
  }
}

}  // namespace talpa::localized_balance_test
