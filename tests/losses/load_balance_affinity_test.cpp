// SPDX-License-Identifier: Apache-2.0
#include "support/routed.hpp"
#include "support/scalars.hpp"
#include "support/tolerance.hpp"

#include <talpa/cpu/fill.hpp>
#include <talpa/cpu/group_loss.hpp>
#include <talpa/losses/load_balance.hpp>

#include <doctest/doctest.h>

#include <cmath>
#include <vector>

namespace talpa::load_balance_affinity_test {

using namespace support;

namespace {

enum class source { gates, sigmoid, margin };

/// Affinity of token n to expert e.
double affinity_of(source from, const routed_layer<double>& layer, index n, index e, double most) {
  if (from == source::gates) return layer.on(n, e) ? layer.gates(n, e) : 0.0;
  const auto sigmoid = [](double x) { return 1.0 / (1.0 + std::exp(-x)); };
  if (from == source::margin) {
    return probabilities(layer, n)[static_cast<std::size_t>(e)] -
           most * sigmoid(layer.control(n, 0));
  }
  double sum = 0.0;
  for (index j = 0; j < layer.experts(); ++j) sum += sigmoid(layer.logits(n, j));
  return sigmoid(layer.logits(n, e)) / sum;
}

/// E sum_e count_e / whole mean_n a_ne over tokens first .. last - 1; k = 0: whole is the number of
/// selections.
double slow_group(source from, const routed_layer<double>& layer, index first, index last, double k,
                  double most) {
  double real = 0.0, selections = 0.0, sum = 0.0;
  for (index n = first; n < last; ++n) {
    if (!layer.real(n)) continue;
    real += 1.0;
    for (index e = 0; e < layer.experts(); ++e) selections += layer.on(n, e) ? 1.0 : 0.0;
  }
  if (real == 0.0) return 0.0;
  for (index e = 0; e < layer.experts(); ++e) {
    double count = 0.0, mass = 0.0;
    for (index n = first; n < last; ++n) {
      if (!layer.real(n)) continue;
      count += layer.on(n, e) ? 1.0 : 0.0;
      mass += affinity_of(from, layer, n, e, most);
    }
    sum += count / (k > 0.0 ? k * real : selections) * mass / real;
  }
  return static_cast<double>(layer.experts()) * sum;
}

/// E sum_e f_e P_e with sum f_e at most E (all experts on, k = 1), |P_e| at most 1: every factor
/// has a relative error of that many roundings.
template <class T>
double bound_of(index tokens, index experts, double spread) {
  const auto e = static_cast<double>(experts);
  return rounding_bound<T>(
      column_sum_roundings(tokens, 2) + softmax_roundings(experts, spread) + 2.0 * e + 16.0,
      2.0 * e * e);
}

}  // namespace

TEST_SUITE("losses/load_balance") {
  TEST_CASE_TEMPLATE("load_balance of gates is worked by hand", T, TALPA_SCALARS) {
    // ReMoE: E / (T^2 k) sum_e (sum_t w_te) count_e, E = 2, T = 2, k = 2. Gates (1, 0), (2, 4):
    // sums (3, 4), counts (2, 1): 2 / 8 (6 + 4) = 5/2; dgates_e = 1/4 count_e.
    routed_layer<T> layer(2, 2);
    layer.turn_on(0, 0, 1.0);
    layer.turn_on(1, 0, 2.0);
    layer.turn_on(1, 1, 4.0);
    using form = load_balance<balance::per_target, balance::per_layer, affinity::gates>;
    context<cpu> ctx(1);
    const auto r =
        run_loss<T>(ctx, form{.fraction = {.k = 2}}, {layer}, T{1}, grad_mode::overwrite, T{5});
    CHECK(r.value == static_cast<T>(2.5));
    CHECK(r.dgates[0](0, 0) == static_cast<T>(0.5));
    CHECK(r.dgates[0](0, 1) == T{0});
    CHECK(r.dgates[0](1, 1) == static_cast<T>(0.25));
    CHECK(largest(to_table(r.dlogits[0].view())) == 0.0);
    // soft_mass: 2 (3/2 3/2 + 2 2) = 25/2, dgates_e = 2 2 I_e / 4 = I_e.
    using square = load_balance<balance::soft_mass, balance::per_layer, affinity::gates>;
    const auto s = run_loss<T>(ctx, square{}, {layer});
    CHECK(s.value == static_cast<T>(12.5));
    CHECK(s.dgates[0](0, 0) == T{3});
    CHECK(s.dgates[0](1, 1) == T{4});
  }

  TEST_CASE_TEMPLATE("load_balance of normalised sigmoids is worked by hand", T, TALPA_SCALARS) {
    // One token, logits (ln 3, 0): s = (3/4, 1/2), a = (3/5, 2/5), expert 0 on: 2 (3/5) = 6/5.
    // da_0 = 2: ds_0 = 2 (1 - 3/5) / (5/4) = 16/25, dlogits_0 = 3/16 16/25 = 3/25;
    // ds_1 = -2 (3/5) / (5/4) = -24/25, dlogits_1 = -6/25.
    routed_layer<T> layer(1, 2);
    layer.logits(0, 0) = static_cast<T>(std::log(3.0));
    layer.turn_on(0, 0, 1.0);
    using form = load_balance<balance::per_selection, balance::per_sequence, affinity::sigmoid>;
    context<cpu> ctx(1);
    const auto r = run_loss<T>(ctx, form{}, {layer}, T{1}, grad_mode::overwrite, T{5});
    const double bound = bound_of<T>(1, 2, std::log(3.0));
    CHECK(within(r.value, 1.2, bound));
    CHECK(within(r.dlogits[0](0, 0), 0.12, bound));
    CHECK(within(r.dlogits[0](0, 1), -0.24, bound));
    CHECK(largest(to_table(r.dgates[0].view())) == 0.0);
  }

  TEST_CASE_TEMPLATE("load_balance of margins is worked by hand", T, TALPA_SCALARS) {
    // p = (3/4, 1/4), control 0, thresholds at most 1/2: a = (1/2, 0), expert 0 on: 2 (1/2) = 1.
    // dlogits_0 = 3/4 (2 - 3/2) = 3/8, dcontrol = -2 1/2 1/4 = -1/4.
    routed_layer<T> layer(1, 2);
    layer.logits(0, 0) = static_cast<T>(std::log(3.0));
    layer.control = matrix<T, cpu>(1, 1);
    layer.turn_on(0, 0, 1.0);
    using form = load_balance<balance::per_token, balance::per_layer, affinity::margin>;
    context<cpu> ctx(1);
    const double bound = bound_of<T>(1, 2, std::log(3.0));
    for (const bool named : {false, true}) {  // the largest threshold is 1 / E
      const auto r = run_loss<T>(ctx, named ? form{.affinity = {.relative = 1.0}} : form{}, {layer},
                                 T{1}, grad_mode::overwrite, T{5});
      CHECK(within(r.value, 1.0, bound));
      CHECK(within(r.dlogits[0](0, 0), 0.375, bound));
      CHECK(within(r.dlogits[0](0, 1), -0.375, bound));
      CHECK(within(r.dcontrol[0](0, 0), -0.25, bound));
    }
  }

  TEST_CASE_TEMPLATE("load_balance of every affinity agrees with loops in double", T,
                     TALPA_SCALARS) {
    test_random random(461);
    context<cpu> ctx(2);
    for (int trial = 0; trial < 60; ++trial) {
      const index experts = 1 + random.below(24), length = 1 + random.below(20);
      const index sequences = 1 + random.below(6);
      routed_layer<T> layer =
          random_layer<T>(random, sequences * length, experts, 1 + random.below(experts), 4);
      layer.sequence_length = length;
      add_control(random, layer);
      const routed_layer<double> wide = widened(layer);
      const double bound = bound_of<T>(layer.tokens(), experts, spread_of({wide}));
      const index k = 1 + random.below(3), all = layer.tokens();
      CAPTURE(trial);
      CHECK(
          within(run_loss<T>(ctx,
                             load_balance<balance::per_target, balance::per_layer, affinity::gates>{
                                 .fraction = {.k = k}},
                             {layer})
                     .value,
                 slow_group(source::gates, wide, 0, all, static_cast<double>(k), 0.0), bound));
      CHECK(within(
          run_loss<T>(ctx, load_balance<balance::per_selection, balance::pooled, affinity::gates>{},
                      {layer})
              .value,
          slow_group(source::gates, wide, 0, all, 0.0, 0.0), bound));
      CHECK(within(
          run_loss<T>(ctx,
                      load_balance<balance::per_token, balance::per_layer, affinity::margin>{
                          .affinity = {.relative = 0.5 * static_cast<double>(wide.experts())}},
                      {layer})
              .value,
          slow_group(source::margin, wide, 0, all, 1.0, 0.5), bound));
      double sum = 0.0, live = 0.0;
      for (index first = 0; first < all; first += length) {
        bool any = false;
        for (index n = first; n < first + length; ++n) any = any || wide.real(n);
        sum += slow_group(source::sigmoid, wide, first, first + length, 0.0, 0.0);
        live += any ? 1.0 : 0.0;
      }
      CHECK(within(
          run_loss<T>(
              ctx, load_balance<balance::per_selection, balance::per_sequence, affinity::sigmoid>{},
              {layer})
              .value,
          live > 0.0 ? sum / live : 0.0, bound));
    }
  }

  TEST_CASE("load_balance knows its ideal value for every affinity") {
    using targeted = load_balance<balance::per_target, balance::per_layer, affinity::gates>;
    CHECK(targeted{.fraction = {.k = 4}}.ideal(3, 2.0, 0.5) == 0.75);
    CHECK(load_balance<balance::per_selection, balance::per_sequence, affinity::sigmoid>{}.ideal(
              1, 2.0, 0.5) == 1.0);
    CHECK(load_balance<balance::per_token, balance::pooled, affinity::margin>{}.ideal(3, 2.0) ==
          2.0);
  }

  TEST_CASE("load_balance of every affinity has the same bits for every lane group") {
    test_random random(462);
    for (const index experts : {1, 3, 32, 33, 70}) {
      CAPTURE(experts);
      routed_layer<float> layer = random_layer<float>(random, 21, experts, 1);
      add_control(random, layer);
      CHECK(row_term_difference(affinity::detail::sigmoid_row{}, layer) == "");
      CHECK(row_term_difference(affinity::detail::margin_row{0.5 * static_cast<double>(experts)},
                                layer) == "");
      using targeted = detail::balance_group<balance::per_target, affinity::gates>;
      CHECK(lane_group_difference<float>(targeted{{.k = 2}, {}}, random, experts) == "");
      using soft = detail::balance_group<balance::soft_mass, affinity::gates>;
      CHECK(lane_group_difference<double>(soft{}, random, experts) == "");
      using scored = detail::balance_group<balance::per_selection, affinity::sigmoid>;
      CHECK(lane_group_difference<double>(scored{}, random, experts) == "");
    }
  }

  TEST_CASE("load_balance refuses numbers of its parts that are out of range, and no control") {
    context<cpu> ctx(1);
    const routed_layer<double> layer(2, 2);
    using targeted = load_balance<balance::per_target, balance::per_layer>;
    CHECK_THROWS_WITH_AS(run_loss<double>(ctx, targeted{.fraction = {.k = 0}}, {layer}),
                         "talpa::load_balance: 'fraction.k' is 0, expected >= 1 = experts a token",
                         value_error);
    using margins = load_balance<balance::per_token, balance::per_layer, affinity::margin>;
    CHECK_THROWS_WITH_AS(
        run_loss<double>(ctx, margins{.affinity = {.relative = 2.5}}, {layer}),
        "talpa::load_balance: 'affinity.relative' is 2.5, expected in (0, experts] = largest "
        "threshold in units of 1 / experts",
        value_error);
    CHECK_THROWS_AS(run_loss<double>(ctx, margins{.affinity = {.relative = 0.0}}, {layer}),
                    value_error);
    CHECK_THROWS_WITH_AS(
        run_loss<double>(ctx, margins{}, {layer}),
        "talpa::load_balance: 'layers[0].control' has shape [0, 0], expected [2, 1] = one number a "
        "token",
        shape_error);
  }
}

}  // namespace talpa::load_balance_affinity_test
