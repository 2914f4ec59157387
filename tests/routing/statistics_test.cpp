// SPDX-License-Identifier: Apache-2.0
#include "support/routed.hpp"
#include "support/scalars.hpp"
#include "support/tolerance.hpp"

#include <talpa/cpu/routing_sums.hpp>
#include <talpa/routing/statistics.hpp>

#include <doctest/doctest.h>

#include <vector>

namespace talpa::statistics_test {

using namespace support;

namespace {

/// Logits (0, 0, 0, 0), (ln 5, 0, 0, 0), padding, (-1, 0, 0, 0); experts {0, 1}, {0}, -, {1}.
routed_layer<double> small_layer() {
  routed_layer<double> layer(4, 4);
  layer.logits(1, 0) = std::log(5.0);
  layer.logits(2, 2) = 1e6;
  layer.logits(3, 0) = -1.0;
  layer.turn_on(0, 0, 0.5);
  layer.turn_on(0, 1, 0.5);
  layer.turn_on(1, 0, 0.75);
  layer.turn_on(3, 1, 1.0);
  layer.padding = vector<std::uint8_t, cpu>(4);
  layer.padding[0] = layer.padding[1] = layer.padding[3] = 1;
  return layer;
}

}  // namespace

TEST_SUITE("routing/statistics") {
  TEST_CASE("measure reports an example worked by hand") {
    context<cpu> ctx(1);
    const statistics_report r(measure(ctx, small_layer().view()));
    CHECK(r.tokens == 3);
    // Element by element: gcc 12.2 with AVX-512 miscompiles a temporary vector {2, 2, 0, 0}.
    CHECK(r.counts.size() == 4);
    CHECK(r.counts[0] == 2);
    CHECK(r.counts[1] == 2);
    CHECK(r.counts[2] == 0);
    CHECK(r.counts[3] == 0);
    CHECK(r.selections() == 4);
    CHECK(r.share(0) == 0.5);
    CHECK(r.share(3) == 0.0);
    CHECK(r.importance == std::vector<double>{1.25, 1.5, 0.0, 0.0});
    CHECK(r.mean_gate(0) == 0.625);
    CHECK(r.mean_gate(2) == 0.0);
    CHECK(r.active_experts() == 4.0 / 3.0);
    CHECK(r.max_violation() == 1.0);  // 2 against a mean of 1
    CHECK(r.dead_experts() == 2);
    // p_0: 1/4, 5/8, 1 / (1 + 3 e); the entropies likewise by their definition.
    const double q = std::exp(-1.0) / (std::exp(-1.0) + 3.0), other = (1.0 - q) / 3.0;
    const double bound = rounding_bound<double>(20.0, 3.0);
    CHECK(within(r.mean_probability(0), (0.25 + 0.625 + q) / 3.0, bound));
    const double entropy = std::log(4.0) - 0.625 * std::log(0.625) - 0.375 * std::log(0.125) -
                           q * std::log(q) - 3.0 * other * std::log(other);
    CHECK(within(r.mean_entropy(), entropy / 3.0, bound));
    CHECK(within(r.normalised_entropy(), entropy / 3.0 / std::log(4.0), bound));
    const double z0 = std::log(4.0), z1 = std::log(8.0), z3 = std::log(std::exp(-1.0) + 3.0);
    CHECK(within(r.mean_squared_logsumexp(), (z0 * z0 + z1 * z1 + z3 * z3) / 3.0, bound));
  }

  TEST_CASE("measure says 1 for the normalised entropy of equal logits and 0 for one expert") {
    context<cpu> ctx(1);
    const statistics_report even(measure(ctx, routed_layer<double>(5, 6).view()));
    CHECK(within(even.normalised_entropy(), 1.0, rounding_bound<double>(20.0, 1.0)));
    CHECK(even.dead_experts() == 6);
    CHECK(even.max_violation() == 0.0);
    routed_layer<double> one(2, 1);
    one.turn_on(0, 0, 1.0);
    const statistics_report single(measure(ctx, one.view()));
    CHECK(single.mean_entropy() == 0.0);
    CHECK(single.normalised_entropy() == 0.0);
    CHECK(single.max_violation() == 0.0);
    CHECK(single.mean_probability(0) == 1.0);
  }

  TEST_CASE("measure of nothing divides by nothing") {
    context<cpu> ctx(1);
    const statistics_report none(measure(ctx, routed_layer<float>(0, 3).view()));
    CHECK(none.tokens == 0);
    CHECK(none.mean_entropy() == 0.0);
    CHECK(none.active_experts() == 0.0);
    CHECK(none.share(1) == 0.0);
    CHECK(none.mean_probability(1) == 0.0);
    CHECK(none.dead_experts() == 3);
  }

  TEST_CASE_TEMPLATE("measure merges batches on the backend and reports merge on the host", T,
                     TALPA_SCALARS) {
    test_random random(7);
    const routed_layer<T> first = random_layer<T>(random, 90, 6, 2, 4);
    const routed_layer<T> second = random_layer<T>(random, 260, 6, 3);
    context<cpu> ctx(2);
    const auto together = make_statistics<T>(ctx.memory, 6);
    measure(ctx, first.view(), together, grad_mode::overwrite);
    measure(ctx, second.view(), together, grad_mode::accumulate);
    statistics_report merged(measure(ctx, first.view()));
    merged.merge(statistics_report(measure(ctx, second.view())));
    const statistics_report device(together);
    CHECK(device.tokens == merged.tokens);
    CHECK(device.counts == merged.counts);
    for (std::size_t e = 0; e < 6; ++e) {
      // One addition in T against one in double.
      CHECK(within(device.importance[e], merged.importance[e],
                   rounding_bound<T>(1.0, merged.importance[e])));
      CHECK(within(device.probability[e], merged.probability[e],
                   rounding_bound<T>(1.0, merged.probability[e])));
    }
    CHECK(within(device.entropy, merged.entropy, rounding_bound<T>(1.0, merged.entropy)));
    CHECK(merged.entropy > 10.0);

    statistics_report none;
    none.merge(merged);
    CHECK(none.counts == merged.counts);
    CHECK(none.tokens == merged.tokens);
  }

  TEST_CASE("measure has the same bits for any number of threads") {
    test_random random(17);
    const routed_layer<float> layer = random_layer<float>(random, 3000, 10, 2, 9);
    context<cpu> one(1);
    const statistics_report expected(measure(one, layer.view()));
    for (const int threads : {2, 3}) {
      context<cpu> ctx(threads);
      const statistics_report found(measure(ctx, layer.view()));
      CHECK(found.counts == expected.counts);
      CHECK(found.importance == expected.importance);
      CHECK(found.probability == expected.probability);
      CHECK(found.entropy == expected.entropy);
      CHECK(found.squared_logsumexp == expected.squared_logsumexp);
    }
  }

  TEST_CASE("a report prints as a table") {
    context<cpu> ctx(1);
    const statistics_report r(measure(ctx, small_layer().view()));
    const std::string text = r.text();
    CHECK(text.find("3 tokens, 4 experts, 1.33 active a token, 2 dead\n") == 0);
    CHECK(text.find("max violation 1\n") != std::string::npos);
    CHECK(text.find("  expert      count    share     gate  probability\n") != std::string::npos);
    CHECK(text.find("       1          2   0.5000   0.7500       0.2240\n") != std::string::npos);
  }

  TEST_CASE("statistics of different numbers of experts do not merge") {
    context<cpu> ctx(1);
    statistics_report four(measure(ctx, routed_layer<double>(1, 4).view()));
    const statistics_report five(measure(ctx, routed_layer<double>(1, 5).view()));
    CHECK_THROWS_WITH_AS(
        four.merge(five),
        "talpa::statistics_report::merge: 'experts' is 5, expected 4..4 = experts of the report",
        value_error);
    const auto statistics = make_statistics<double>(ctx.memory, 4);
    CHECK_THROWS_WITH_AS(
        measure(ctx, routed_layer<double>(1, 5).view(), statistics, grad_mode::overwrite),
        "talpa::ops::routing_sums: 'counts' has shape [1, 4], expected [1, 5] = groups, experts",
        shape_error);
  }
}

}  // namespace talpa::statistics_test
