// SPDX-License-Identifier: Apache-2.0
#include "support/cpu_products.hpp"
#include "support/laws.hpp"
#include "support/random.hpp"
#include "support/scalars.hpp"
#include "support/tolerance.hpp"

#include <talpa/cpu/bias.hpp>
#include <talpa/cpu/reduce.hpp>
#include <talpa/scorers/linear_scorer.hpp>
#include <talpa/testing/scorer_laws.hpp>

#include <doctest/doctest.h>

#include <cmath>
#include <string>

namespace talpa::linear_scorer_test {

TEST_SUITE("scorers/linear_scorer") {
  TEST_CASE("two tokens and two experts, by hand") {
    const linear_scorer scorer{.bias = true};
    generator random(1);
    auto p = scorer.init<float, cpu>(2, 2, random, "router.");
    // W = [[1, 2], [3, 4]], b = [10, 20].
    for (index i = 0; i < 4; ++i) p.weight.value().data[i] = static_cast<float>(i + 1);
    p.bias.value()(0, 0) = 10.0f;
    p.bias.value()(0, 1) = 20.0f;
    matrix<float, cpu> x(2, 2), logits(2, 2), dlogits(2, 2), dx(2, 2);
    x(0, 0) = 1.0f;
    x(1, 1) = 2.0f;
    context<cpu> ctx(1);
    const auto kept = scorer.forward(ctx, p, x, logits.view(), mode::inference, {});
    CHECK(logits(0, 0) == 11.0f);
    CHECK(logits(0, 1) == 23.0f);
    CHECK(logits(1, 0) == 14.0f);
    CHECK(logits(1, 1) == 28.0f);
    dlogits(0, 0) = 1.0f;
    dlogits(1, 1) = -1.0f;
    scorer.backward(ctx, p, kept, x, dlogits, dx.view(), grad_mode::overwrite);
    CHECK(dx(0, 0) == 1.0f);  // row 0 of W
    CHECK(dx(0, 1) == 2.0f);
    CHECK(dx(1, 0) == -3.0f);  // minus row 1 of W
    CHECK(dx(1, 1) == -4.0f);
    CHECK(p.weight.grad()(0, 0) == 1.0f);  // token 0 to expert 0
    CHECK(p.weight.grad()(0, 1) == 0.0f);
    CHECK(p.weight.grad()(1, 1) == -2.0f);  // minus token 1 to expert 1
    CHECK(p.bias.grad()(0, 0) == 1.0f);
    CHECK(p.bias.grad()(0, 1) == -1.0f);
  }

  TEST_CASE_TEMPLATE("laws of linear_scorer", T, TALPA_SCALARS) {
    for (const bool bias : {false, true}) {
      CAPTURE(bias);
      const linear_scorer scorer{.bias = bias};
      support::obeys(testing::scorer_laws<T>(scorer));
      support::obeys(testing::scorer_laws<T>(scorer, {}, {.tokens = 1, .inputs = 1, .experts = 1}));
      support::obeys(
          testing::scorer_laws<T>(scorer, {}, {.tokens = 21, .inputs = 33, .experts = 65}));
    }
  }

  TEST_CASE("weights begin uniform in +-1 / sqrt D, the bias at zero") {
    const index inputs = 64, experts = 500;
    generator random(8);
    const auto p = linear_scorer{.bias = true}.init<double, cpu>(inputs, experts, random, "r.");
    CHECK(p.weight.name() == "r.weight");
    CHECK(p.bias.name() == "r.bias");
    const double bound = 1.0 / 8.0;
    double sum = 0.0, squares = 0.0;
    for (index i = 0; i < p.weight.size(); ++i) {
      const double w = p.weight.value().data[i];
      CHECK(std::abs(w) <= bound);
      sum += w;
      squares += w * w;
    }
    // Mean 0 with deviation a / sqrt(3 n); mean square a^2 / 3 with deviation a^2 sqrt(4 / 45 n):
    // five of each leave a wrong verdict once in millions of seeds.
    const double n = static_cast<double>(p.weight.size());
    CHECK(std::abs(sum / n) <= 5.0 * bound / std::sqrt(3.0 * n));
    CHECK(std::abs(squares / n - bound * bound / 3.0) <=
          5.0 * bound * bound * std::sqrt(4.0 / (45.0 * n)));
    for (index e = 0; e < experts; ++e) CHECK(p.bias.value()(0, e) == 0.0);
  }

  TEST_CASE("without a bias there is none") {
    generator random(8);
    auto p = linear_scorer{}.init<float, cpu>(3, 2, random, "");
    CHECK_FALSE(p.bias.exists());
    int visited = 0;
    p.visit([&](parameter<float, cpu>& q) {
      CHECK(q.name() == "weight");
      ++visited;
    });
    CHECK(visited == 1);
  }

  TEST_CASE("inputs of another width are refused") {
    generator random(8);
    auto p = linear_scorer{}.init<float, cpu>(3, 2, random, "");
    context<cpu> ctx(1);
    const matrix<float, cpu> x(4, 5);
    matrix<float, cpu> logits(4, 2), wrong(4, 3);
    CHECK_THROWS_WITH_AS(
        linear_scorer{}.forward(ctx, p, x, logits.view(), mode::training, {}),
        "talpa::ops::gemm: 'b' has shape [2, 3], expected [..., 5] = inner size of a", shape_error);
    CHECK_THROWS_WITH_AS(
        linear_scorer{}.forward(ctx, p, matrix<float, cpu>(4, 3), wrong.view(), mode::training, {}),
        "talpa::ops::gemm: 'c' has shape [4, 3], expected [4, 2] = rows of op(a), "
        "columns of op(b)",
        shape_error);
  }
}

}  // namespace talpa::linear_scorer_test
