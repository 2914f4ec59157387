// SPDX-License-Identifier: Apache-2.0
#include "layers/slow_mole.hpp"
#include "support/scalars.hpp"

#include <talpa/cpu/svd.hpp>
#include <talpa/layers/svd_segments.hpp>

#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <utility>

namespace talpa::svd_segments_test {

namespace {

constexpr index outputs = 9, inputs = 12, experts = 3;

template <class T>
struct begun {
  lora expert;
  parameter<T, cpu> base;
  matrix<T, cpu> before;
  lora::params<T, cpu> p;

  begun(const lora& how, const svd_segments& segments) : expert(how), base("W", {outputs, inputs}) {
    generator random(5);
    fill_normal(base.value(), 1.0, random);
    before = matrix<T, cpu>(base.value());
    p = expert.init<T, cpu>(inputs, outputs, experts, random, "");
    context<cpu> ctx(1);
    begin_as_segments(ctx, expert, p, base, segments);
  }
  /// s sum_e B_e A_e at (o, d), and the sum of its absolute terms.
  std::pair<double, double> update(index o, index d) const {
    double sum = 0.0, size = 0.0;
    for (index k = 0; k < p.a.rows(); ++k) {
      const double term = expert.scale() * static_cast<double>(p.b.value()(k, o)) *
                          static_cast<double>(p.a.value()(k, d));
      sum += term;
      size += std::abs(term);
    }
    return {sum, size};
  }
};

}  // namespace

TEST_SUITE("layers/svd_segments") {
  TEST_CASE("a diagonal base by hand") {
    // Values 8, 6, 4, 2, two segments of two, rank 1, s = 2, rho = 1: expert 0 gets 8, expert 1 the
    // first of the second segment, 4. A = B = sqrt(8 / 2) e_0 = 2 e_0 and sqrt(4 / 2) e_2.
    parameter<double, cpu> base("W", {4, 4});
    for (index i = 0; i < 4; ++i) base.value()(i, i) = 8.0 - 2.0 * static_cast<double>(i);
    generator random(1);
    const lora expert{.rank = 1, .alpha = 2.0};
    auto p = expert.init<double, cpu>(4, 4, 2, random, "");
    context<cpu> ctx(1);
    begin_as_segments(ctx, expert, p, base, {.rho = 1.0, .correction = 1.0});
    for (auto* q : {&p.a, &p.b}) {
      CHECK(q->value()(0, 0) == 2.0);
      CHECK(q->value()(1, 2) == std::sqrt(2.0));
      CHECK(q->value()(0, 1) == 0.0);
      CHECK(q->value()(1, 0) == 0.0);
    }
    // The base gives up half of both: 8 - 4 and 4 - 2.
    CHECK(base.value()(0, 0) == 4.0);
    CHECK(std::abs(base.value()(2, 2) - 2.0) <= testing::gamma<double>(8.0) * 8.0);
    CHECK(base.value()(1, 1) == 6.0);
    CHECK(base.value()(3, 3) == 2.0);
  }

  TEST_CASE_TEMPLATE("segments of full length, undivided, are the whole base", T, TALPA_SCALARS) {
    const begun<T> all({.rank = 3, .alpha = 1.5}, {.rho = 1.0, .correction = experts});
    for (index o = 0; o < outputs; ++o) {
      for (index d = 0; d < inputs; ++d) {
        const auto [sum, size] = all.update(o, d);
        const double w = static_cast<double>(all.before(o, d));
        // The decomposition of a matrix of 9 x 12 standard normal numbers, of norm below 12:
        // fifteen sweeps of nine turns of four roundings; then its roundings to T and those of
        // the roots.
        const double bound =
            testing::gamma<double>(540.0) * 12.0 + testing::gamma<T>(8.0 + outputs) * size;
        CHECK(std::abs(sum - w) <= bound);
        CHECK(std::abs(static_cast<double>(all.base.value()(o, d))) <=
              bound + testing::gamma<T>(4.0 + outputs) * (size + std::abs(w)));
      }
    }
  }

  TEST_CASE_TEMPLATE("base and mean of the experts are the base as it was", T, TALPA_SCALARS) {
    const begun<T> some({.rank = 2, .alpha = 3.0}, {});
    for (index o = 0; o < outputs; ++o) {
      for (index d = 0; d < inputs; ++d) {
        const auto [sum, size] = some.update(o, d);
        const double w = static_cast<double>(some.before(o, d));
        const double now = static_cast<double>(some.base.value()(o, d)) + sum / experts;
        CHECK(std::abs(now - w) <= testing::gamma<T>(6.0 + 4.0) * (std::abs(w) + size));
      }
    }
  }

  TEST_CASE("a layer whose gates are all 1 / E begins as its base was") {
    const support::mole<dense> layer{.expert = {.rank = 2, .alpha = 3.0}, .experts = experts};
    generator random(6);
    auto base = linear{}.init<double, cpu>(inputs, outputs, random, "base.");
    base.freeze();
    auto p = layer.init<double, cpu>(std::move(base), random);
    for (index i = 0; i < p.router.scorer.weight.size(); ++i) {
      p.router.scorer.weight.value().data[i] = 0.0;
    }
    constexpr index tokens = 8;
    matrix<double, cpu> x(tokens, inputs), before(tokens, outputs), after(tokens, outputs);
    fill_normal(x.view(), 1.0, random);
    context<cpu> ctx(1);
    affine_forward(ctx, p.base, x, before.view());
    double most = 0.0;
    for (const double w : support::to_table(p.base.weight.value()).values) {
      most = std::fmax(most, std::abs(w));
    }
    begin_as_segments(ctx, layer.expert, p.expert, p.base.weight);
    layer.forward(ctx, p, x, after.view(), mode::inference);
    // D terms of the base and E R of the experts; no element of any part of W, the parts of an
    // orthogonal sum, is larger than the norm of W.
    const double norm = most * std::sqrt(static_cast<double>(inputs * outputs));
    const double size = inputs * 2.0 * norm * testing::largest(x.view()) + 1.0;
    CHECK(testing::first_excess(after.view(), before.view(), [&](index, index) {
            return testing::gamma<double>(2.0 * inputs + 6.0 + 16.0) * size;
          }) == "");
    CHECK(testing::largest(p.expert.b.value()) > 0.0);
  }

  TEST_CASE("what does not fit is refused, and nothing is changed") {
    parameter<double, cpu> base("W", {outputs, inputs});
    generator random(5);
    fill_normal(base.value(), 1.0, random);
    const matrix<double, cpu> before(base.value());
    const lora expert{.rank = 4};
    auto p = expert.init<double, cpu>(inputs, outputs, experts, random, "");
    auto of_three = lora{.rank = 3}.init<double, cpu>(inputs, outputs, experts, random, "");
    const matrix<double, cpu> a_before(of_three.a.value());
    context<cpu> ctx(1);
    CHECK_THROWS_WITH_AS(begin_as_segments(ctx, expert, p, base),
                         "talpa::begin_as_segments: 'rank' is 4, expected 1..3 = singular values "
                         "of a segment",
                         value_error);
    CHECK_THROWS_WITH_AS(begin_as_segments(ctx, lora{.rank = 3, .alpha = -1.0}, of_three, base),
                         "talpa::begin_as_segments: 'alpha' is -1, expected > 0, for roots of "
                         "singular values",
                         value_error);
    CHECK_THROWS_WITH_AS(begin_as_segments(ctx, lora{.rank = 5}, p, base),
                         "talpa::begin_as_segments: 'A' is 12, expected rows that are a multiple "
                         "of the rank, at least one",
                         value_error);
    CHECK_THROWS_WITH_AS(begin_as_segments(ctx, lora{.rank = 3}, of_three, base, {.rho = 0.0}),
                         "talpa::begin_as_segments: 'rho' is 0, expected a finite number > 0",
                         value_error);
    CHECK_THROWS_WITH_AS(begin_as_segments(ctx, lora{.rank = 3}, of_three, base,
                                           {.correction = std::numeric_limits<double>::infinity()}),
                         "talpa::begin_as_segments: 'correction' is inf, expected a finite number",
                         value_error);
    parameter<double, cpu> other("W", {outputs, inputs + 1});
    CHECK_THROWS_AS(begin_as_segments(ctx, lora{.rank = 3}, of_three, other), shape_error);
    CHECK(testing::first_difference<double>(base.value(), before.view()) == "");
    CHECK(testing::first_difference<double>(of_three.a.value(), a_before.view()) == "");
  }
}

}  // namespace talpa::svd_segments_test
