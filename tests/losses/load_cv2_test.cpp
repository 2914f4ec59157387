// SPDX-License-Identifier: Apache-2.0
#include "support/routed.hpp"
#include "support/sanitized.hpp"
#include "support/scalars.hpp"
#include "support/tolerance.hpp"

#include <talpa/cpu/fill.hpp>
#include <talpa/cpu/group_loss.hpp>
#include <talpa/losses/load_cv2.hpp>

#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <vector>

namespace talpa::load_cv2_test {

using namespace support;

namespace {

constexpr double infinite = std::numeric_limits<double>::infinity();

double normal_cdf(double x) { return 0.5 * std::erfc(-x / std::sqrt(2.0)); }
double normal_density(double x) {
  return std::exp(-0.5 * x * x) / std::sqrt(2.0 * std::acos(-1.0));
}

/// The experts of token n but e, the largest logit first.
std::vector<index> others(const routed_layer<double>& layer, index n, index e) {
  std::vector<index> order;
  for (const index i : ranked(layer, n)) {
    if (i != e) order.push_back(i);
  }
  return order;
}

/// Value and gradients for layers whose tokens use their top k: expert e is in when it beats the
/// kth largest of the other logits.
struct slow_load {
  double value = 0.0;
  double load = 0.0;      // of all experts of the last layer
  double steepest = 0.0;  // largest derivative of the value by a load
  std::vector<table> dlogits, dclean, ddeviation;
};
slow_load evaluate(const std::vector<routed_layer<double>>& layers, index k, double epsilon) {
  slow_load r;
  for (const auto& layer : layers) {
    const index experts = layer.experts();
    const auto count = static_cast<double>(experts);
    std::vector<double> load(static_cast<std::size_t>(experts), 0.0);
    const auto place = [&](index n, index e) {
      const index rival = others(layer, n, e)[static_cast<std::size_t>(k - 1)];
      return (layer.clean(n, e) - layer.logits(n, rival)) / layer.deviation(n, e);
    };
    r.load = 0.0;
    for (index n = 0; n < layer.tokens(); ++n) {
      for (index e = 0; e < experts && layer.real(n); ++e) {
        const double chance = k < experts ? normal_cdf(place(n, e)) : 1.0;
        load[static_cast<std::size_t>(e)] += chance;
        r.load += chance;
      }
    }
    const double value = variation(load, epsilon);
    r.value += value;
    table dlogits(layer.tokens(), experts), dclean(layer.tokens(), experts),
        ddeviation(layer.tokens(), experts);
    const double mean = r.load / count, norm = mean * mean + epsilon;
    for (index n = 0; n < layer.tokens(); ++n) {
      for (index e = 0; e < experts && layer.real(n) && k < experts; ++e) {
        const double w = 2.0 * (load[static_cast<std::size_t>(e)] - mean) / ((count - 1.0) * norm) -
                         value * 2.0 * mean / (count * norm);
        const double z = place(n, e), slope = w * normal_density(z) / layer.deviation(n, e);
        dclean(n, e) = slope;
        ddeviation(n, e) = -slope * z;
        dlogits(n, others(layer, n, e)[static_cast<std::size_t>(k - 1)]) -= slope;
        r.steepest = std::max(r.steepest, std::abs(w));
      }
    }
    r.dlogits.push_back(dlogits);
    r.dclean.push_back(dclean);
    r.ddeviation.push_back(ddeviation);
  }
  return r;
}

/// Roundings of a load: those of the argument and of the distribution function (8 ulp), and the
/// sums; then those of the sums over experts.
double roundings_of(index tokens, index experts) {
  return 20.0 + column_sum_roundings(tokens) + 2.0 * static_cast<double>(experts) + 10.0;
}

/// One token, two experts, the first on: u = c = (1, 0), s = 1, so P = (Phi(1), Phi(-1)).
template <class T>
routed_layer<T> two_experts() {
  routed_layer<T> layer(1, 2);
  layer.logits(0, 0) = T{1};
  layer.turn_on(0, 0, 1.0);
  layer.clean = layer.deviation = layer.logits;
  layer.deviation(0, 0) = layer.deviation(0, 1) = T{1};
  return layer;
}

}  // namespace

TEST_SUITE("losses/load_cv2") {
  TEST_CASE_TEMPLATE("load_cv2 gives the value and gradients of an example worked by hand", T,
                     TALPA_SCALARS) {
    // L = (1/2 + d, 1/2 - d) with d = Phi(1) - 1/2 = 0.3413447460685429: v = 2 d^2, m = 1/2, value
    // 8 d^2. w = (8 d - 16 d^2, -8 d - 16 d^2).
    const double d = 0.3413447460685429, phi = 0.24197072451914337;
    context<cpu> ctx(1);
    const auto r =
        run_loss<T>(ctx, load_cv2{}, {two_experts<T>()}, T{1}, grad_mode::overwrite, T{5});
    const double bound = rounding_bound<T>(40.0, 4.0) + 16.0 * 1e-10;  // epsilon over m^2
    CHECK(within(r.value, 8.0 * d * d, bound));
    const double first = (8.0 * d - 16.0 * d * d) * phi, second = (-8.0 * d - 16.0 * d * d) * phi;
    CHECK(within(r.dclean[0](0, 0), first, bound));
    CHECK(within(r.dclean[0](0, 1), second, bound));
    CHECK(within(r.ddeviation[0](0, 0), -first, bound));  // z = 1
    CHECK(within(r.ddeviation[0](0, 1), second, bound));  // z = -1
    CHECK(within(r.dlogits[0](0, 1), -first, bound));
    CHECK(within(r.dlogits[0](0, 0), -second, bound));
    CHECK(largest(to_table(r.dgates[0].view())) == 0.0);
  }

  TEST_CASE_TEMPLATE("load_cv2 of top-k agrees with loops in double that know k", T,
                     TALPA_SCALARS) {
    test_random random(19);
    context<cpu> ctx(2);
    for (const index experts : {2, 5, 34, 70}) {
      for (const index k : {index{1}, index{2}, experts}) {
        if (k > experts) continue;
        const index tokens = support::many_rows(300);
        std::vector<routed_layer<T>> layers = {random_layer<T>(random, tokens, experts, k, 4),
                                               random_layer<T>(random, tokens, experts, k)};
        for (auto& layer : layers) add_noise(random, layer, 1.0);
        const load_cv2 loss{.epsilon = 1e-6};
        const auto result = run_loss<T>(ctx, loss, layers);
        const slow_load expected = evaluate(all_widened(layers), k, 1e-6);
        CAPTURE(experts);
        CAPTURE(k);
        // A load is wrong by gamma N at most, each of E; the value is E^2 / (E - 1) sum (L - m)^2 /
        // S^2, S the sum of loads.
        const auto e = static_cast<double>(experts), n = static_cast<double>(tokens);
        const double factor = e * e / (e - 1.0), share = n * e / expected.load;
        CHECK(within(result.value, expected.value,
                     rounding_bound<T>(roundings_of(tokens, experts), 8.0 * factor * share)));
        // A derivative by a load is w, wrong by gamma F share / S; phi / s and phi z / s are below
        // 1, and E of them meet in one logit.
        const double bound =
            rounding_bound<T>(2.0 * roundings_of(tokens, experts),
                              e * (expected.steepest + 8.0 * factor * share / expected.load));
        for (std::size_t l = 0; l < 2; ++l) {
          if (k == experts) {
            CHECK(largest(to_table(result.dclean[l].view())) == 0.0);
            CHECK(largest(to_table(result.ddeviation[l].view())) == 0.0);
            CHECK(largest(to_table(result.dlogits[l].view())) == 0.0);
            continue;
          }
          CHECK(difference(result.dclean[l].view(), expected.dclean[l], bound) == "");
          CHECK(difference(result.ddeviation[l].view(), expected.ddeviation[l], bound) == "");
          CHECK(difference(result.dlogits[l].view(), expected.dlogits[l], bound) == "");
          if (experts == 5) CHECK(largest(expected.dclean[l]) > 5.0 * bound);
        }
      }
    }
  }

  TEST_CASE("load_cv2 counts where no noise was drawn, and where its deviation is zero") {
    test_random random(29);
    context<cpu> ctx(1);
    for (const bool alone : {false, true}) {
      routed_layer<double> counted = random_layer<double>(random, 40, 5, 2, 3);
      counted.clean = counted.logits;  // as at inference
      const load_cv2 loss{.noise_alone = alone};
      const auto r = run_loss<double>(ctx, loss, {counted}, 1.0, grad_mode::overwrite, 5.0);
      std::vector<double> counts(5, 0.0);
      for (index n = 0; n < 40; ++n) {
        for (index e = 0; e < 5; ++e) {
          counts[static_cast<std::size_t>(e)] += counted.real(n) && counted.on(n, e) ? 1.0 : 0.0;
        }
      }
      CHECK(within(r.value, variation(counts, 1e-10), rounding_bound<double>(40.0, 5.0)));
      CHECK(r.value > 0.0);
      CHECK(largest(to_table(r.dlogits[0].view())) == 0.0);
      CHECK(r.dclean[0].size() == 0);
      counted.deviation = matrix<double, cpu>(40, 5);
      const auto still = run_loss<double>(ctx, loss, {counted}, 1.0, grad_mode::overwrite, 5.0);
      CHECK(still.value == r.value);
      CHECK(largest(to_table(still.dlogits[0].view())) == 0.0);
      CHECK(largest(to_table(still.dclean[0].view())) == 0.0);
      CHECK(largest(to_table(still.ddeviation[0].view())) == 0.0);
    }
  }

  TEST_CASE("load_cv2 asks on request whether the noise alone exceeds the largest logit off") {
    routed_layer<double> layer = two_experts<double>();
    layer.clean(0, 0) = 2.0;  // the noise of expert 0 is -1
    context<cpu> ctx(1);
    // Expert 0 is on: (2 - 0) / 1. By its noise alone it is not: (2 - 1) / 1.
    const double whole = run_loss<double>(ctx, load_cv2{}, {layer}).value;
    const double alone = run_loss<double>(ctx, load_cv2{.noise_alone = true}, {layer}).value;
    const auto expected = [](double first, double second) {
      return variation({normal_cdf(first), normal_cdf(second)}, 1e-10);
    };
    CHECK(within(whole, expected(2.0, -1.0), rounding_bound<double>(40.0, 4.0)));
    CHECK(within(alone, expected(1.0, -1.0), rounding_bound<double>(40.0, 4.0)));
    // Noise of 1/2 exceeds the logit 0 of the other.
    layer.clean(0, 0) = 0.5;
    CHECK(within(run_loss<double>(ctx, load_cv2{.noise_alone = true}, {layer}).value,
                 expected(0.5, -1.0), rounding_bound<double>(40.0, 4.0)));
  }

  TEST_CASE("load_cv2 takes masked experts, tokens without an expert and equal logits") {
    context<cpu> ctx(1);
    // Expert 2 is masked; the others are alike.
    routed_layer<double> layer(1, 3);
    layer.logits(0, 2) = -infinite;
    layer.turn_on(0, 0, 1.0);
    layer.clean = layer.logits;
    layer.deviation = matrix<double, cpu>(1, 3);
    for (index e = 0; e < 3; ++e) layer.deviation(0, e) = 1.0;
    const double bound = rounding_bound<double>(40.0, 8.0);
    auto r = run_loss<double>(ctx, load_cv2{}, {layer});
    CHECK(within(r.value, variation({0.5, 0.5, 0.0}, 1e-10), bound));
    CHECK(r.dclean[0](0, 2) == 0.0);
    CHECK(r.ddeviation[0](0, 2) == 0.0);
    CHECK(r.dlogits[0](0, 2) == 0.0);
    CHECK(r.dclean[0](0, 0) != 0.0);
    // All that is off is masked: expert 0 is in for sure.
    layer.logits(0, 1) = layer.clean(0, 1) = -infinite;
    r = run_loss<double>(ctx, load_cv2{}, {layer});
    CHECK(within(r.value, variation({1.0, 0.0, 0.0}, 1e-10), bound));
    CHECK(largest(to_table(r.dclean[0].view())) == 0.0);
    CHECK(largest(to_table(r.dlogits[0].view())) == 0.0);
    // Nothing is on.
    routed_layer<double> none(1, 3);
    none.clean = none.logits;
    none.deviation = layer.deviation;
    r = run_loss<double>(ctx, load_cv2{}, {none});
    CHECK(r.value == 0.0);
    CHECK(largest(to_table(r.dclean[0].view())) == 0.0);
    // Experts 1 and 2 are the largest that are off: the lower one takes the gradient.
    none.turn_on(0, 0, 1.0);
    r = run_loss<double>(ctx, load_cv2{}, {none});
    CHECK(r.dlogits[0](0, 1) == -r.dclean[0](0, 0));
    CHECK(r.dlogits[0](0, 2) == 0.0);
    none.clean(0, 2) = std::numeric_limits<double>::quiet_NaN();
    CHECK(std::isnan(run_loss<double>(ctx, load_cv2{}, {none}).value));
  }

  TEST_CASE("load_cv2 has the same bits for every lane group") {
    test_random random(59);
    for (const index experts : {1, 2, 32, 33, 70}) {
      CAPTURE(experts);
      for (const bool alone : {false, true}) {
        const detail::load_cv2_group loss{1e-10, {alone}};
        CHECK(lane_group_difference<float>(loss, random, experts) == "");
        CHECK(lane_group_difference<double>(loss, random, experts) == "");
        routed_layer<float> layer = random_layer<float>(random, 13, experts, experts > 1 ? 2 : 1);
        add_noise(random, layer, 1.0);
        CHECK(row_term_difference(loss.term, layer) == "");
      }
    }
  }

  TEST_CASE("load_cv2 refuses a scorer without noise and an epsilon that protects from nothing") {
    context<cpu> ctx(1);
    CHECK_THROWS_WITH_AS(
        run_loss<double>(ctx, load_cv2{}, {routed_layer<double>(2, 3)}),
        "talpa::load_cv2: 'layers[0].noise.clean' has shape [0, 0], expected [2, 3] = shape of "
        "logits, from a scorer that adds noise",
        shape_error);
    routed_layer<double> layer = two_experts<double>();
    CHECK_THROWS_WITH_AS(run_loss<double>(ctx, load_cv2{.epsilon = 0.0}, {layer}),
                         "talpa::load_cv2: 'epsilon' is 0, expected a positive number",
                         value_error);
    // Room for the gradients of noise is not left out.
    const auto kept = load_cv2{}.forward(ctx, layer.view());
    matrix<double, cpu> dlogits(1, 2), dgates(1, 2), one(1, 1);
    CHECK_THROWS_WITH_AS(
        load_cv2{}.backward(ctx, layer.view(), kept, one, {dlogits.view(), dgates.view(), {}, {}},
                            grad_mode::overwrite),
        "talpa::load_cv2: 'out[0].dnoise.dclean' has shape [0, 0], expected [1, 2] = shape of "
        "logits",
        shape_error);
    layer.deviation = matrix<double, cpu>(1, 3);
    CHECK_THROWS_WITH_AS(run_loss<double>(ctx, load_cv2{}, {layer}),
                         "talpa::load_cv2: 'layers[0].noise.deviation' has shape [1, 3], expected "
                         "[1, 2] = shape of logits",
                         shape_error);
  }
}

}  // namespace talpa::load_cv2_test
