// SPDX-License-Identifier: Apache-2.0
#include "support/random.hpp"
#include "support/tolerance.hpp"

#include <talpa/cpu/group_loss.hpp>
#include <talpa/ops/group_loss.hpp>

#include <doctest/doctest.h>

#include <cstddef>
#include <type_traits>
#include <vector>

namespace talpa::group_loss_test {

using namespace support;

namespace {

/// sum_e count_e P_e / tokens + scale z, by P: count_e / tokens, by z: scale.
struct counted_mean {
  static constexpr used_totals uses{.counts = true, .probability = true, .squared_logsumexp = true};
  double scale;

  template <class G, class T>
  group_value<typename G::template value<T>> operator()(const G& g, const totals_row<T>& in,
                                                        const totals_derivative_row<T>& out) const {
    const auto tokens = g.uniform(in.tokens > T{0} ? in.tokens : T{1});
    const auto weight = [&](auto e) { return g.load(in.counts, e, T{0}) / tokens; };
    g.for_each([&](auto e) { g.store(out.probability, e, weight(e)); });
    const auto sum = g.template sum<T>(
        [&](auto e) { return math::mul(weight(e), g.load(in.probability, e, T{0})); });
    const auto factor = g.uniform(static_cast<T>(scale));
    return {math::fma(factor, g.uniform(in.squared_logsumexp), sum), factor};
  }
};

/// Totals of three groups of two experts, the second without tokens.
struct example {
  vector<index, cpu> tokens{3};
  matrix<index, cpu> counts{3, 2};
  matrix<double, cpu> probability{3, 2};
  vector<double, cpu> squares{3};
  matrix<double, cpu> dprobability{3, 2};
  vector<double, cpu> dsquares{3};
  matrix<double, cpu> value{1, 1};

  example() {
    tokens[0] = 4;
    tokens[2] = 2;
    counts(0, 0) = 1;
    counts(0, 1) = 3;
    counts(2, 1) = 2;
    probability(0, 0) = 3.0;
    probability(0, 1) = 1.0;
    probability(2, 1) = 0.5;
    squares[0] = 10.0;
    squares[2] = 20.0;
    value(0, 0) = 100.0;
  }
  void run(context<cpu>& ctx, group_reduction reduction, grad_mode mode) {
    routing_totals<double, cpu> totals;
    totals.tokens = tokens;
    totals.counts = counts;
    totals.probability = probability;
    totals.squared_logsumexp = squares;
    routing_totals_gradient<double, cpu> derivative;
    derivative.probability = dprobability;
    derivative.squared_logsumexp = dsquares;
    ops::group_loss(ctx, counted_mean{0.5}, reduction, totals, derivative, value, mode);
  }
};

}  // namespace

TEST_SUITE("ops/group_loss") {
  TEST_CASE("group_loss sums or averages an example worked by hand") {
    // Group 0: (1 * 3 + 3 * 1) / 4 + 5 = 6.5; group 1: 0, without tokens; group 2: 0.5 + 10 = 10.5.
    context<cpu> ctx(2);
    example sum;
    sum.run(ctx, group_reduction::sum, grad_mode::overwrite);
    CHECK(sum.value(0, 0) == 17.0);
    CHECK(difference(sum.dprobability.view(), table(3, 2, {0.25, 0.75, 0.0, 0.0, 0.0, 1.0}), 0.0) ==
          "");
    CHECK(sum.dsquares[0] == 0.5);
    sum.run(ctx, group_reduction::sum, grad_mode::accumulate);
    CHECK(sum.value(0, 0) == 34.0);
    sum.run(ctx, group_reduction::sum, grad_mode::ignore);
    CHECK(sum.value(0, 0) == 34.0);

    example mean;
    mean.run(ctx, group_reduction::mean, grad_mode::overwrite);
    CHECK(mean.value(0, 0) == 8.5);
    CHECK(difference(mean.dprobability.view(), table(3, 2, {0.125, 0.375, 0.0, 0.0, 0.0, 0.5}),
                     0.0) == "");
    CHECK(mean.dsquares[2] == 0.25);
  }

  TEST_CASE("group_loss of no live group is 0") {
    context<cpu> ctx(1);
    example dead;
    dead.tokens[0] = dead.tokens[2] = 0;
    for (index i = 0; i < 6; ++i) dead.counts.data()[i] = 0;
    dead.run(ctx, group_reduction::mean, grad_mode::overwrite);
    CHECK(dead.value(0, 0) == 0.0);
    CHECK(dead.dsquares[0] == 0.0);
    routing_totals<double, cpu> none;
    none.counts = {nullptr, 0, 2};
    none.probability = {nullptr, 0, 2};
    ops::group_loss(ctx, counted_mean{1.0}, group_reduction::sum, none, {{nullptr, 0, 2}, {}, {}},
                    dead.value, grad_mode::overwrite);
    CHECK(dead.value(0, 0) == 0.0);
  }

  TEST_CASE("group_loss has the same bits for any number of threads, over many groups") {
    test_random random(66);
    const index groups = 1000, experts = 12;
    vector<index, cpu> tokens(groups);
    matrix<index, cpu> counts(groups, experts);
    matrix<double, cpu> probability = random_matrix<double>(random, groups, experts);
    vector<double, cpu> squares(groups);
    double expected = 0.0, size = 0.0;
    for (index g = 0; g < groups; ++g) {
      tokens[g] = 1 + random.below(9);
      squares[g] = random.uniform(0.0, 1.0);
      double value = 0.125 * squares[g];
      for (index e = 0; e < experts; ++e) {
        counts(g, e) = random.below(5);
        value +=
            static_cast<double>(counts(g, e)) / static_cast<double>(tokens[g]) * probability(g, e);
        size += static_cast<double>(counts(g, e)) * std::abs(probability(g, e));
      }
      expected += value;
      size += squares[g];
    }
    routing_totals<double, cpu> totals;
    totals.tokens = tokens;
    totals.counts = counts;
    totals.probability = probability;
    totals.squared_logsumexp = squares;
    double first = 0.0;
    for (const int threads : {1, 2, 3}) {
      context<cpu> ctx(threads);
      matrix<double, cpu> value(1, 1), dprobability(groups, experts);
      vector<double, cpu> dsquares(groups);
      ops::group_loss(ctx, counted_mean{0.125}, group_reduction::sum, totals,
                      {dprobability, {}, dsquares}, value, grad_mode::overwrite);
      if (threads == 1) first = value(0, 0);
      CHECK(value(0, 0) == first);
      CHECK(within(value(0, 0), expected, 2.0 * sum_bound<double>(groups * experts, size)));
    }
  }

  TEST_CASE("group_loss refuses what does not fit") {
    context<cpu> ctx(1);
    example wrong;
    wrong.counts = matrix<index, cpu>(2, 2);
    const auto run = [&] { wrong.run(ctx, group_reduction::sum, grad_mode::overwrite); };
    CHECK_THROWS_WITH_AS(
        run(),
        "talpa::ops::group_loss: 'counts' has shape [2, 2], expected [3, 2] = groups, experts",
        shape_error);
    wrong = example();
    wrong.dprobability = matrix<double, cpu>(3, 1);
    CHECK_THROWS_WITH_AS(
        run(),
        "talpa::ops::group_loss: 'dprobability' has shape [3, 1], expected [3, 2] = "
        "groups, experts",
        shape_error);
    wrong = example();
    wrong.dsquares = vector<double, cpu>(1);
    CHECK_THROWS_WITH_AS(
        run(), "talpa::ops::group_loss: 'dsquared_logsumexp' has shape [1], expected [3] = groups",
        shape_error);
    wrong = example();
    wrong.value = matrix<double, cpu>(1, 2);
    CHECK_THROWS_WITH_AS(
        run(), "talpa::ops::group_loss: 'value' has shape [1, 2], expected [1, 1] = one number",
        shape_error);
  }
}

}  // namespace talpa::group_loss_test
