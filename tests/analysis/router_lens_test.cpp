// SPDX-License-Identifier: Apache-2.0
#include "support/random.hpp"
#include "support/scalars.hpp"

#include <talpa/analysis/router_lens.hpp>
#include <talpa/testing/bounds.hpp>

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

namespace talpa::router_lens_test {

using namespace support;

namespace {

using flags = vector<std::uint8_t, cpu>;

flags flags_of(const std::vector<int>& values) {
  flags f(static_cast<index>(values.size()));
  for (index n = 0; n < f.size(); ++n) {
    f[n] = static_cast<std::uint8_t>(values[static_cast<std::size_t>(n)]);
  }
  return f;
}

/// Gates that are not zero are on.
template <class T>
routing<T, cpu> routing_of(index experts, const std::vector<T>& gates) {
  routing<T, cpu> r(static_cast<index>(gates.size()) / experts, experts);
  for (index i = 0; i < r.gates.size(); ++i) {
    const T gate = gates[static_cast<std::size_t>(i)];
    const index n = i / experts, e = i % experts;
    r.gates(n, e) = gate;
    if (gate != T{0}) r.mask(n, e / mask_word_bits) |= 1u << (e % mask_word_bits);
  }
  return r;
}

matrix<double, cpu> scores_of(index layers, const std::vector<double>& values) {
  matrix<double, cpu> m(layers, static_cast<index>(values.size()) / layers);
  std::copy(values.begin(), values.end(), m.data());
  return m;
}

std::vector<double> row_of(const matrix<double, cpu>& m, index l) {
  return {m.data() + l * m.cols(), m.data() + (l + 1) * m.cols()};
}

}  // namespace

TEST_SUITE("analysis/router_lens") {
  // Sample 0 has tokens {0,1} and {0}, sample 1 has {1,2} and padding: powers of two, so all exact.
  TEST_CASE_TEMPLATE("two samples by hand", T, TALPA_SCALARS) {
    const routing<T, cpu> r = routing_of<T>(3, {T(0.5), T(0.25), T(0),    //
                                                T(1), T(0), T(0),         //
                                                T(0), T(0.75), T(0.125),  //
                                                T(0.5), T(0.5), T(0.5)});
    const flags real = flags_of({1, 1, 1, 0});
    router_lens lens(1, 3, 2);
    lens.add(0, r.view(), real.view(), {}, 2);
    CHECK(lens.tokens(0) == 3);
    CHECK(lens.samples(0) == 2);
    CHECK(row_of(lens.counts(), 0) == std::vector<double>{2.0, 2.0, 1.0});
    CHECK(row_of(lens.gate_mass(), 0) == std::vector<double>{1.5, 1.0, 0.125});
    // Sample 0: (2, 1, 0) / 2 / 2; sample 1: (0, 1, 1) / 1 / 2.
    CHECK(row_of(lens.token_scores(), 0) == std::vector<double>{0.25, 0.375, 0.25});
    CHECK(row_of(lens.gate_scores(), 0) == std::vector<double>{0.375, 0.4375, 0.0625});
    // The same through what a router leaves, here with only the second token an answer.
    router_lens answers(1, 3, 2);
    const flags answer = flags_of({0, 1, 0, 1});
    routed_view<T, cpu> routed;
    routed.routing = std::as_const(r).view();
    routed.padding_mask = real.view();
    routed.sequence_length = 2;
    answers.add(0, routed, answer.view());
    CHECK(answers.samples(0) == 1);
    CHECK(row_of(answers.counts(), 0) == std::vector<double>{1.0, 0.0, 0.0});
    CHECK(row_of(answers.gate_scores(), 0) == std::vector<double>{1.0, 0.0, 0.0});
  }

  TEST_CASE("sums agree with a plain count over random batches") {
    test_random random(51);
    for (const index experts : {1, 8, 33, 70}) {
      CAPTURE(experts);
      const index length = 6, tokens = 60;
      for (int repeat = 0; repeat < 3; ++repeat) {
        router_lens lens(1, experts, 1);
        std::vector<double> count(static_cast<std::size_t>(experts)), gate = count;
        index samples = 0;
        for (int batch = 0; batch < 5; ++batch) {
          std::vector<double> gates;
          std::vector<int> real;
          for (index i = 0; i < tokens * experts; ++i) {
            gates.push_back(random.below(3) == 0 ? 1.0 + static_cast<double>(random.below(4))
                                                 : 0.0);
          }
          for (index n = 0; n < tokens; ++n) real.push_back(random.below(4) == 0 ? 0 : 1);
          for (index s = 0; s < tokens / length; ++s) {
            const auto at = [&](index n) { return static_cast<std::size_t>(s * length + n); };
            double size = 0.0;
            for (index n = 0; n < length; ++n) size += real[at(n)];
            if (size == 0.0) continue;
            ++samples;
            for (index n = 0; n < length; ++n) {
              for (std::size_t e = 0; e < count.size(); ++e) {
                const double g = gates[at(n) * count.size() + e];
                if (real[at(n)] == 0 || g == 0.0) continue;
                count[e] += 1.0;
                gate[e] += g / size;
              }
            }
          }
          const flags mask = flags_of(real);
          lens.add(0, routing_of<double>(experts, gates).view(), mask.view(), {}, length);
        }
        CHECK(lens.samples(0) == samples);
        CHECK(row_of(lens.counts(), 0) == count);
        const matrix<double, cpu> found = lens.gate_scores();
        for (std::size_t e = 0; e < count.size(); ++e) {
          const double mean = gate[e] / static_cast<double>(samples);
          // A sum of at most 300 positive terms, each with a division, and the mean's.
          CHECK(std::abs(found(0, static_cast<index>(e)) - mean) <=
                testing::gamma<double>(2 * (300 + 3)) * mean);
        }
      }
    }
  }

  TEST_CASE("nothing to count adds nothing") {
    router_lens lens(1, 2, 1);
    lens.add(0, routing<float, cpu>(0, 2).view());
    const flags padding = flags_of({0, 0});
    lens.add(0, routing_of<float>(2, {1.0f, 0.0f, 1.0f, 0.0f}).view(), padding.view());
    CHECK(lens.samples(0) == 0);
    CHECK(row_of(lens.counts(), 0) == std::vector<double>{0.0, 0.0});
    CHECK_THROWS_WITH_AS(lens.token_scores(),
                         "talpa::router_lens: 'tokens' is 0, expected >= 1 = tokens that count",
                         value_error);
  }

  TEST_CASE("the n best, ties to the lower index") {
    const auto scores = scores_of(2, {3.0, 5.0, 3.0, 0.0, 1.0, 1.0, 1.0, 2.0});
    CHECK(top_experts(scores, 2) == expert_selection{{1, 0}, {3, 0}});
    CHECK(top_experts(scores, 4) == expert_selection{{1, 0, 2, 3}, {3, 0, 1, 2}});
    CHECK_THROWS_WITH_AS(top_experts(scores, 0),
                         "talpa::top_experts: 'n' is 0, expected 1..4 = experts", value_error);
    CHECK_THROWS_WITH_AS(top_experts(scores, 5),
                         "talpa::top_experts: 'n' is 5, expected 1..4 = experts", value_error);
  }

  TEST_CASE("a share p: the sum before adding decides, and the scale") {
    // Shares 1/2, 1/4, 1/8, 1/8 in the first layer.
    const auto scores = scores_of(2, {0.5, 1.0, 0.25, 0.25, 1.0, 0.0, 0.0, 0.0});
    CHECK(cumulative_experts{.p = 0.5}(scores) == expert_selection{{1}, {0}});
    CHECK(cumulative_experts{.p = 0.51}(scores) == expert_selection{{1, 0}, {0}});
    CHECK(cumulative_experts{.p = 0.76}(scores) == expert_selection{{1, 0, 2}, {0}});
    CHECK(cumulative_experts{.p = 1.0}(scores) == expert_selection{{1, 0, 2, 3}, {0}});
    CHECK(cumulative_experts{.p = 1.0, .scale = score_scale::none}(scores) ==
          expert_selection{{1}, {0}});
    // Over layers: (1/3, 1, 1, 1) and (2/3, 0, 0, 0).
    CHECK(cumulative_experts{.p = 1.0, .scale = score_scale::released_script}(scores) ==
          expert_selection{{1}, {0, 1, 2, 3}});
    const auto over = scale_scores(scores, score_scale::released_script);
    CHECK(row_of(over, 1) == std::vector<double>{1.0 / 1.5, 0.0, 0.0, 0.0});
  }

  TEST_CASE("rounded to decimals, scores tie and their sum falls short") {
    const auto close = scores_of(1, {0.30001, 0.30004, 0.39995});
    CHECK(cumulative_experts{.p = 0.5}(close) == expert_selection{{2, 1}});
    CHECK(cumulative_experts{.p = 0.5, .decimals = 4}(close) == expert_selection{{2, 0}});
    const auto thirds = scores_of(1, {1.0, 1.0, 1.0, 0.0});
    CHECK(cumulative_experts{.p = 1.0, .decimals = 4}(thirds) == expert_selection{{0, 1, 2, 3}});
  }

  TEST_CASE("arguments out of range are refused") {
    CHECK_THROWS_WITH_AS(router_lens(0, 4, 2),
                         "talpa::router_lens: 'layers' is 0, expected >= 1 = layers with a router",
                         value_error);
    CHECK_THROWS_WITH_AS(router_lens(1, 0, 1),
                         "talpa::router_lens: 'experts' is 0, expected >= 1 = experts of a layer",
                         value_error);
    CHECK_THROWS_WITH_AS(router_lens(1, 4, 5),
                         "talpa::router_lens: 'k' is 5, expected 1..4 = experts", value_error);
    router_lens lens(2, 2, 1);
    const auto one = routing_of<float>(2, {1.0f, 0.0f});
    const auto two = routing_of<float>(2, {1.0f, 0.0f, 1.0f, 0.0f});
    const flags flag = flags_of({1});
    CHECK_THROWS_WITH_AS(lens.add(2, one.view()),
                         "talpa::router_lens: 'layer' is 2, expected 0..1 = layers", value_error);
    CHECK_THROWS_WITH_AS(lens.add(0, routing<float, cpu>(1, 3).view()),
                         "talpa::router_lens: 'experts of the routing' is 3, expected 2..2 = "
                         "experts of the lens",
                         value_error);
    CHECK_THROWS_WITH_AS(
        lens.add(0, two.view(), flag.view()),
        "talpa::router_lens: 'padding' has shape [1], expected [2] = one flag a token",
        shape_error);
    CHECK_THROWS_WITH_AS(
        lens.add(0, two.view(), {}, flag.view()),
        "talpa::router_lens: 'answer' has shape [1], expected [2] = one flag a token", shape_error);
    CHECK_THROWS_WITH_AS(lens.add(0, two.view(), {}, {}, 3),
                         "talpa::router_lens: 'sequence_length' is 3, expected a divisor of 2 = "
                         "tokens, or 0",
                         value_error);
    CHECK(lens.tokens(0) == 0);
    lens.add(0, two.view());
    lens.add(1, one.view());
    CHECK_THROWS_WITH_AS(lens.gate_scores(),
                         "talpa::router_lens: 'tokens of a layer' is 1, expected 2..2 = tokens of "
                         "the first layer",
                         value_error);
    lens.add(1, one.view());
    CHECK_THROWS_WITH_AS(lens.gate_scores(),
                         "talpa::router_lens: 'samples of a layer' is 2, expected 1..1 = samples "
                         "of the first layer",
                         value_error);
  }

  TEST_CASE("shares and scores out of range are refused, an empty selection too") {
    const auto scores = scores_of(1, {1.0, 2.0});
    CHECK_THROWS_WITH_AS(cumulative_experts{.p = 1.5}(scores),
                         "talpa::cumulative_experts: 'p' is 1.5, expected above 0, up to 1 = share "
                         "of the scores",
                         value_error);
    CHECK_THROWS_WITH_AS(cumulative_experts{.p = std::nan("")}(scores),
                         "talpa::cumulative_experts: 'p' is nan, expected above 0, up to 1 = share "
                         "of the scores",
                         value_error);
    CHECK_THROWS_WITH_AS(cumulative_experts{.p = 0.0}(scores),
                         "talpa::cumulative_experts: 'p' is 0, expected above 0, since 0 is an "
                         "empty selection",
                         value_error);
    CHECK_THROWS_WITH_AS(cumulative_experts{.decimals = 16}(scores),
                         "talpa::cumulative_experts: 'decimals' is 16, expected -1..15 = decimals "
                         "of a score, or -1",
                         value_error);
    CHECK_THROWS_WITH_AS(top_experts(scores_of(1, {1.0, -2.0}), 1),
                         "talpa::top_experts: 'scores' is -2, expected finite numbers >= 0",
                         value_error);
    CHECK_THROWS_WITH_AS(scale_scores(scores_of(1, {1.0, std::nan("")}), score_scale::none),
                         "talpa::scale_scores: 'scores' is nan, expected finite numbers >= 0",
                         value_error);
    CHECK_THROWS_WITH_AS(top_experts({}, 1),
                         "talpa::top_experts: 'layers' is 0, expected >= 1 = rows of scores",
                         value_error);
  }
}

}  // namespace talpa::router_lens_test
