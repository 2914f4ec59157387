// SPDX-License-Identifier: Apache-2.0
#include "support/random.hpp"

#include <talpa/analysis/neuron_clusters.hpp>
#include <talpa/core/error.hpp>
#include <talpa/cpu/assign_balanced.hpp>

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <set>
#include <string>
#include <utility>
#include <vector>

namespace talpa::neuron_clusters_test {

using namespace support;

namespace {

using set_of_experts = std::set<std::vector<index>>;

/// The experts as sets of neurons: their numbers depend on where the centres began.
set_of_experts parts(const neuron_split& split) {
  set_of_experts all;
  for (index e = split.shared; e < split.shared + split.experts(); ++e) {
    std::vector<index> part(split.order.begin() + e * split.hidden,
                            split.order.begin() + (e + 1) * split.hidden);
    CHECK(std::is_sorted(part.begin(), part.end()));
    all.insert(part);
  }
  return all;
}
bool is_permutation_of_all(const neuron_split& split) {
  std::vector<index> sorted = split.order, all(split.order.size());
  std::sort(sorted.begin(), sorted.end());
  std::iota(all.begin(), all.end(), index{0});
  return sorted == all;
}

/// sum over neurons of the squared distance from their expert's mean, on rows of length 1.
double scatter(matrix<double, cpu> rows, const neuron_split& split) {
  for (index f = 0; f < rows.rows(); ++f) {
    double squares = 0.0;
    for (index d = 0; d < rows.cols(); ++d) squares += rows(f, d) * rows(f, d);
    for (index d = 0; d < rows.cols(); ++d) rows(f, d) /= std::sqrt(squares);
  }
  double sum = 0.0;
  for (index e = 0; e < split.experts(); ++e) {
    for (index d = 0; d < rows.cols(); ++d) {
      double mean = 0.0, squares = 0.0;
      for (index i = 0; i < split.hidden; ++i) {
        const double v = rows(split.order[static_cast<std::size_t>(e * split.hidden + i)], d);
        mean += v / static_cast<double>(split.hidden);
        squares += v * v;
      }
      sum += squares - static_cast<double>(split.hidden) * mean * mean;
    }
  }
  return sum;
}

/// Activations in which neuron f works for the tokens s with pattern[f][s] == '1'.
matrix<float, cpu> activations(const std::vector<std::string>& pattern) {
  const auto tokens = static_cast<index>(pattern[0].size());
  matrix<float, cpu> h(tokens, static_cast<index>(pattern.size()));
  for (index s = 0; s < tokens; ++s) {
    for (index f = 0; f < h.cols(); ++f) {
      const bool on = pattern[static_cast<std::size_t>(f)][static_cast<std::size_t>(s)] == '1';
      h(s, f) = on ? (f % 2 == 0 ? 3.0F : -3.0F) : 0.5F;
    }
  }
  return h;
}

}  // namespace

TEST_SUITE("analysis/neuron_clusters") {
  TEST_CASE("weight_split finds directions, whatever the lengths and the seed") {
    // Three directions; neuron f has direction f mod 3 and length f + 1.
    matrix<double, cpu> w(9, 3);
    for (index f = 0; f < 9; ++f) {
      for (index d = 0; d < 3; ++d) {
        w(f, d) = static_cast<double>(f + 1) * (d == f % 3 ? 1.0 : 0.01 * static_cast<double>(f));
      }
    }
    context<cpu> ctx;
    const set_of_experts expected{{0, 3, 6}, {1, 4, 7}, {2, 5, 8}};
    for (std::uint64_t seed = 0; seed < 8; ++seed) {
      CHECK(parts(weight_split{.seed = seed}(ctx, w.view(), 3)) == expected);
    }
  }

  TEST_CASE("clusters are balanced where directions are not, and steps only improve") {
    test_random random(61);
    context<cpu> ctx;
    for (int trial = 0; trial < 10; ++trial) {
      const auto seed = static_cast<std::uint64_t>(trial);
      const matrix<double, cpu> w = random_matrix<double>(random, 24, 5);
      double before = std::numeric_limits<double>::infinity();
      for (const index steps : {1, 2, 4, 100}) {
        const neuron_split split =
            weight_split{.iterations = steps, .seed = seed}(ctx, w.view(), 4);
        CHECK(is_permutation_of_all(split));
        CHECK(split.hidden == 6);
        const double now = scatter(w, split);
        // Sums of 120 squares of size one.
        CHECK(now <= before + 256.0 * std::numeric_limits<double>::epsilon() * 24.0);
        before = now;
      }
      CHECK(before < scatter(w, contiguous_split(24, 4)));
      context<cpu> other(3);
      CHECK(weight_split{.seed = seed}(other, w.view(), 4).order ==
            weight_split{.seed = seed}(ctx, w.view(), 4).order);
    }
  }

  TEST_CASE("one expert, one neuron an expert, and rows of zeros are legal") {
    const matrix<float, cpu> zeros(4, 3);
    context<cpu> ctx;
    for (const index experts : {1, 2, 4}) {
      CHECK(is_permutation_of_all(weight_split{}(ctx, zeros.view(), experts)));
    }
  }

  TEST_CASE("coactivation_split puts neurons together that work for the same tokens") {
    // Neurons 0, 3, 4 work for tokens 0..3, neurons 1, 2, 5 for tokens 4..7.
    const auto h =
        activations({"11110000", "00001111", "00001111", "11110000", "11110000", "00001111"});
    context<cpu> ctx;
    const set_of_experts expected{{0, 3, 4}, {1, 2, 5}};
    for (std::uint64_t seed = 0; seed < 8; ++seed) {
      const coactivation_split split{.active = 3, .seed = seed};
      CHECK(parts(split(ctx, h.view(), 2)) == expected);
    }
  }

  TEST_CASE("coactivation_split ends where no exchange of two neurons raises the co-activation") {
    test_random random(62);
    context<cpu> ctx;
    const auto h = random_matrix<double>(random, 40, 12);
    const auto within = [&](const std::vector<index>& neurons) {
      // Pairs of neurons of one expert that both are among the 4 largest of a token.
      index pairs = 0;
      for (index s = 0; s < 40; ++s) {
        std::vector<index> order(12);
        std::iota(order.begin(), order.end(), index{0});
        std::stable_sort(order.begin(), order.end(),
                         [&](index a, index b) { return std::abs(h(s, a)) > std::abs(h(s, b)); });
        order.resize(4);
        for (index e = 0; e < 3; ++e) {
          const auto first = neurons.begin() + 4 * e;
          const auto both = std::count_if(first, first + 4, [&](index f) {
            return std::find(order.begin(), order.end(), f) != order.end();
          });
          pairs += both * (both - 1) / 2;
        }
      }
      return pairs;
    };
    index best = 0;
    for (std::uint64_t seed = 0; seed < 4; ++seed) {
      const coactivation_split split{.active = 4, .seed = seed};
      std::vector<index> neurons = split(ctx, h.view(), 3).order;
      const index found = within(neurons);
      best = std::max(best, found);
      index higher = 0;
      for (std::size_t i = 0; i < 12; ++i) {
        for (std::size_t j = 0; j < i; ++j) {
          std::swap(neurons[i], neurons[j]);
          higher += within(neurons) > found ? 1 : 0;
          std::swap(neurons[i], neurons[j]);
        }
      }
      CHECK(higher == 0);
    }
    CHECK(best > within(contiguous_split(12, 3).order));
  }

  TEST_CASE("activation_split by hand: shared neurons, centres and representatives") {
    // Rates of 4 tokens with 3 of 6 neurons: 5 works for all, 4 for 3, the others 2, 1, 1, 1.
    // 5 and 4 are shared. Of the rest 0 (tokens 0, 1) has the highest rate, then 1 (token 2).
    // Neuron 2 (token 1) is nearer to 0, neuron 3 (token 3) must go to 1. Means (1/2, 1, 0, 0) and
    // (0, 0, 1/2, 1/2): distances 1/2 and 1/2, 1 and 1: the lower neuron stands for each.
    const auto h = activations({"1100", "0010", "0100", "0001", "1011", "1111"});
    context<cpu> ctx;
    const neuron_split split = activation_split{.active = 3, .shared = 1}(ctx, h.view(), 2);
    CHECK(split.order == std::vector<index>{5, 4, 0, 2, 1, 3});
    CHECK(split.hidden == 2);
    CHECK(split.shared == 1);
    CHECK(split.experts() == 2);
    CHECK(split.representative == std::vector<index>{0, 1});
    // Without shared experts three experts begin at neurons 5, 4 and 0.
    const neuron_split all = activation_split{.active = 3}(ctx, h.view(), 3);
    CHECK(is_permutation_of_all(all));
    CHECK(all.experts() == 3);
    CHECK(parts(all).size() == 3);
    CHECK(activation_split{.active = 3, .iterations = 50}(ctx, h.view(), 3).representative.size() ==
          3);
  }

  TEST_CASE("what does not fit is refused") {
    matrix<double, cpu> w(8, 3), h(4, 8), none(0, 8);
    context<cpu> ctx;
    CHECK_THROWS_WITH_AS(
        weight_split{}(ctx, w.view(), 3),
        "talpa::weight_split: 'experts' is 3, expected a divisor of 8 = neurons of "
        "the dense network",
        value_error);
    CHECK_THROWS_WITH_AS(
        weight_split{.iterations = 0}(ctx, w.view(), 2),
        "talpa::weight_split: 'iterations' is 0, expected >= 1 = steps of k-means at most",
        value_error);
    CHECK_THROWS_WITH_AS(coactivation_split{.active = 9}(ctx, h.view(), 2),
                         "talpa::coactivation_split: 'active' is 9, expected 1..8 = neurons",
                         value_error);
    CHECK_THROWS_WITH_AS(coactivation_split{.active = 2}(ctx, h.view(), 3),
                         "talpa::coactivation_split: 'experts' is 3, expected a divisor of 8 = "
                         "neurons of the dense network",
                         value_error);
    CHECK_THROWS_WITH_AS(
        activation_split{.active = 2}(ctx, none.view(), 2),
        "talpa::activation_split: 'tokens' is 0, expected >= 1 = rows of activations", value_error);
    const activation_split shared{.active = 2, .shared = 1};
    CHECK_THROWS_WITH_AS(shared(ctx, h.view(), 2),
                         "talpa::activation_split: 'experts' is 3, expected a divisor of 8 = "
                         "neurons of the dense network",
                         value_error);
    const activation_split negative{.active = 2, .shared = -1};
    CHECK_THROWS_WITH_AS(
        negative(ctx, h.view(), 2),
        "talpa::activation_split: 'shared' is -1, expected >= 0 = experts that are always on",
        value_error);
    w(2, 1) = std::numeric_limits<double>::infinity();
    h(0, 0) = std::nan("");
    CHECK_THROWS_WITH_AS(weight_split{}(ctx, w.view(), 2),
                         "talpa::weight_split: 'weights' is inf, expected finite numbers",
                         value_error);
    CHECK_THROWS_WITH_AS(coactivation_split{.active = 2}(ctx, h.view(), 2),
                         "talpa::coactivation_split: 'activations' is nan, expected finite numbers",
                         value_error);
  }
}

}  // namespace talpa::neuron_clusters_test
