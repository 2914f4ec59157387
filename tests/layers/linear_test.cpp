// SPDX-License-Identifier: Apache-2.0
#include "support/cpu_products.hpp"
#include "support/laws.hpp"
#include "support/random.hpp"
#include "support/scalars.hpp"
#include "support/tolerance.hpp"

#include <talpa/cpu/bias.hpp>
#include <talpa/cpu/reduce.hpp>
#include <talpa/layers/linear.hpp>
#include <talpa/testing/gradient_check.hpp>
#include <talpa/testing/parameters.hpp>

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

namespace talpa::linear_test {

namespace {

using support::table;
using support::to_table;

}  // namespace

TEST_SUITE("layers/linear") {
  TEST_CASE("one token, two features, two outputs, by hand") {
    generator random(1);
    auto p = linear{}.init<float, cpu>(2, 2, random, "");
    // W = [[1, 2], [3, 4]], b = [5, 6], x = (1, -1).
    for (index i = 0; i < 4; ++i) p.weight.value().data[i] = static_cast<float>(i + 1);
    p.bias.value()(0, 0) = 5.0f;
    p.bias.value()(0, 1) = 6.0f;
    matrix<float, cpu> x(1, 2), y(1, 2), dy(1, 2), dx(1, 2);
    x(0, 0) = 1.0f;
    x(0, 1) = -1.0f;
    context<cpu> ctx(1);
    const auto kept = linear{}.forward(ctx, p, x, y.view(), mode::inference);
    CHECK(y(0, 0) == 4.0f);
    CHECK(y(0, 1) == 5.0f);
    dy(0, 0) = 1.0f;
    dy(0, 1) = 2.0f;
    linear{}.backward(ctx, p, kept, x, dy, dx.view(), grad_mode::overwrite);
    CHECK(dx(0, 0) == 7.0f);   // 1 1 + 2 3
    CHECK(dx(0, 1) == 10.0f);  // 1 2 + 2 4
    CHECK(p.weight.grad()(1, 0) == 2.0f);
    CHECK(p.weight.grad()(1, 1) == -2.0f);
    CHECK(p.bias.grad()(0, 1) == 2.0f);
  }

  TEST_CASE_TEMPLATE("linear agrees with plain loops over random shapes", T, TALPA_SCALARS) {
    support::test_random random(70);
    for (int i = 0; i < 12; ++i) {
      const index tokens = 1 + random.below(40), inputs = 1 + random.below(30);
      const index outputs = 2 + random.below(30);
      CAPTURE(tokens);
      CAPTURE(inputs);
      CAPTURE(outputs);
      const linear layer{.bias = i % 2 == 0};
      generator g(static_cast<std::uint64_t>(i));
      auto p = layer.init<T, cpu>(inputs, outputs, g, "");
      const matrix<T, cpu> x = support::random_matrix<T>(random, tokens, inputs);
      matrix<T, cpu> y(tokens, outputs);
      testing::poison<T>(y.view());
      context<cpu> ctx(1 + i % 3);
      layer.forward(ctx, p, x, y.view(), mode::training);
      const table w = to_table(p.weight.value());
      table expected = support::matmul(to_table(x.view()), support::transposed(w));
      table terms = support::matmul(support::absolute(to_table(x.view())),
                                    support::absolute(support::transposed(w)));
      for (index n = 0; layer.bias && n < tokens; ++n) {
        for (index o = 0; o < outputs; ++o) {
          expected(n, o) += static_cast<double>(p.bias.value()(0, o));
          terms(n, o) += std::abs(static_cast<double>(p.bias.value()(0, o)));
        }
      }
      const table bounds =
          support::each(terms, [&](double m) { return support::sum_bound<T>(inputs + 1, m); });
      CHECK(support::difference(y.view(), expected, bounds) == "");
      // The packed copy alone is read: what it was made of may go.
      const matrix_view<T, cpu> weight = p.weight.value();
      p.freeze();
      p.pack(ctx, i % 3 == 0 ? packing::forward : packing::both);
      testing::poison<T>(weight);
      testing::poison<T>(y.view());
      layer.forward(ctx, p, x, y.view(), mode::training);
      CHECK(support::difference(y.view(), expected, bounds) == "");
    }
  }

  TEST_CASE_TEMPLATE("the input gradient of a packed weight agrees with plain loops", T,
                     TALPA_SCALARS) {
    support::test_random random(73);
    for (int i = 0; i < 8; ++i) {
      const index tokens = 1 + random.below(40), inputs = 2 + random.below(30);
      const index outputs = 1 + random.below(30);
      generator g(static_cast<std::uint64_t>(i));
      auto p = linear{}.init<T, cpu>(inputs, outputs, g, "");
      const matrix_view<T, cpu> weight = p.weight.value();
      const table w = to_table(weight);
      const matrix<T, cpu> x = support::random_matrix<T>(random, tokens, inputs);
      const matrix<T, cpu> dy = support::random_matrix<T>(random, tokens, outputs);
      matrix<T, cpu> y(tokens, outputs), dx(tokens, inputs);
      context<cpu> ctx(1 + i % 3);
      p.freeze();
      p.pack(ctx);
      testing::poison<T>(weight);
      for (const bool accumulate : {false, true}) {
        if (accumulate) {
          std::fill_n(dx.data(), dx.size(), T{2});
        } else {
          testing::poison<T>(dx.view());
        }
        const double before = accumulate ? 2.0 : 0.0;
        const auto kept = linear{}.forward(ctx, p, x, y.view(), mode::training);
        linear{}.backward(ctx, p, kept, x, dy, dx.view(),
                          accumulate ? grad_mode::accumulate : grad_mode::overwrite);
        const auto add = [&](double v) { return v + before; };
        const table expected = support::each(support::matmul(to_table(dy.view()), w), add);
        const table bounds = support::each(
            support::matmul(support::absolute(to_table(dy.view())), support::absolute(w)),
            [&](double m) { return support::sum_bound<T>(outputs + 1, m + before); });
        CHECK(support::difference(dx.view(), expected, bounds) == "");
      }
    }
  }

  TEST_CASE("gradients equal differences, frozen parts get none") {
    support::test_random random(71);
    const index tokens = 6, inputs = 5, outputs = 4;
    for (const bool trained : {true, false}) {
      generator g(2);
      auto p = linear{}.init<double, cpu>(inputs, outputs, g, "");
      if (!trained) p.freeze();
      matrix<double, cpu> x = support::random_matrix<double>(random, tokens, inputs);
      matrix<double, cpu> y(tokens, outputs), dx(tokens, inputs);
      const matrix<double, cpu> dy = testing::cotangent(tokens, outputs, 1);
      context<cpu> ctx(1);
      const auto kept = linear{}.forward(ctx, p, x, y.view(), mode::training);
      linear{}.backward(ctx, p, kept, x, dy, dx.view(), grad_mode::overwrite);
      CHECK(p.weight.grad().size() == (trained ? inputs * outputs : 0));
      CHECK(p.trainable() == trained);
      std::vector<testing::gradient_probe> probes{{"x", x.view(), dx.view()}};
      if (trained) testing::detail::add_probes(p, probes);
      const double terms = static_cast<double>(y.size() * (inputs + 1));
      support::obeys(testing::gradient_check(
          "linear", probes, dy,
          {.roundings = static_cast<double>(inputs) + 2.0,
           .magnitude = terms * std::max(1.0, testing::largest(x.view()))},
          [&] {
            linear{}.forward(ctx, p, x, y.view(), mode::training);
            return y.view();
          },
          [] { return 0; }));
    }
  }

  TEST_CASE_TEMPLATE("any number of threads gives the same bits", T, TALPA_SCALARS) {
    support::test_random random(72);
    const index tokens = 1100, inputs = 9, outputs = 11;
    const matrix<T, cpu> x = support::random_matrix<T>(random, tokens, inputs);
    const matrix<T, cpu> dy = support::random_matrix<T>(random, tokens, outputs);
    generator g(3);
    auto p = linear{}.init<T, cpu>(inputs, outputs, g, "");
    matrix<T, cpu> first_y, first_dx, first_dw, first_db;
    for (const int threads : {1, 2, 3}) {
      context<cpu> ctx(threads);
      matrix<T, cpu> y(tokens, outputs), dx(tokens, inputs);
      testing::detail::fill_gradients<T>(p, T{0});
      const auto kept = linear{}.forward(ctx, p, x, y.view(), mode::training);
      linear{}.backward(ctx, p, kept, x, dy, dx.view(), grad_mode::overwrite);
      const matrix<T, cpu> dw(p.weight.grad()), db(p.bias.grad());
      if (threads == 1) {
        first_y = y;
        first_dx = dx;
        first_dw = dw;
        first_db = db;
      }
      CHECK(testing::first_difference(y, first_y) == "");
      CHECK(testing::first_difference(dx, first_dx) == "");
      CHECK(testing::first_difference(dw, first_dw) == "");
      CHECK(testing::first_difference(db, first_db) == "");
    }
  }

  TEST_CASE("no tokens is legal, and what is ignored needs no memory") {
    generator g(4);
    auto p = linear{}.init<float, cpu>(3, 2, g, "base.");
    CHECK(p.weight.name() == "base.weight");
    CHECK(p.bias.name() == "base.bias");
    CHECK(linear{}.output_width(p) == 2);
    context<cpu> ctx(1);
    const matrix<float, cpu> none(0, 3), no_dy(0, 2);
    matrix<float, cpu> y(0, 2), dx(0, 3);
    const auto kept = linear{}.forward(ctx, p, none, y.view(), mode::training);
    linear{}.backward(ctx, p, kept, none, no_dy, dx.view(), grad_mode::overwrite);
    CHECK(testing::largest(p.weight.grad()) == 0.0);
    const matrix<float, cpu> x(4, 3), dy(4, 2);
    matrix<float, cpu> out(4, 2);
    const auto again = linear{}.forward(ctx, p, x, out.view(), mode::training);
    CHECK_NOTHROW(linear{}.backward(ctx, p, again, x, dy, {}, grad_mode::ignore));
    CHECK(ctx.memory.used() == 0);
  }

  TEST_CASE("weights and bias begin uniform in +-1 / sqrt D") {
    generator g(5);
    const auto p = linear{}.init<double, cpu>(36, 400, g, "");
    const double bound = 1.0 / 6.0;
    for (const auto* q : {&p.weight, &p.bias}) {
      double mean = 0.0, square = 0.0;
      const double n = static_cast<double>(q->size());
      for (index i = 0; i < q->size(); ++i) {
        mean += q->value().data[i] / n;
        square += q->value().data[i] * q->value().data[i] / n;
      }
      CHECK(testing::largest(q->value()) <= bound);
      // Deviations of mean and mean square of n uniform numbers, five of each.
      CHECK(std::abs(mean) <= 5.0 * bound / std::sqrt(3.0 * n));
      CHECK(std::abs(square - bound * bound / 3.0) <=
            5.0 * bound * bound * std::sqrt(4.0 / (45.0 * n)));
    }
  }

  TEST_CASE("shapes that do not fit are refused") {
    generator g(6);
    auto p = linear{}.init<float, cpu>(3, 2, g, "");
    context<cpu> ctx(1);
    const matrix<float, cpu> x(4, 3), dy(4, 2);
    matrix<float, cpu> y(4, 2), dx(4, 3);
    CHECK_THROWS_WITH_AS(
        linear{}.forward(ctx, p, matrix<float, cpu>(4, 5), y.view(), mode::training),
        "talpa::linear: 'x' has shape [4, 5], expected [4, 3] = tokens, input width of the weight",
        shape_error);
    CHECK_THROWS_WITH_AS(
        linear{}.forward(ctx, p, x, matrix<float, cpu>(3, 2).view(), mode::training),
        "talpa::linear: 'y' has shape [3, 2], expected [4, 2] = tokens, output width of the weight",
        shape_error);
    const auto kept = linear{}.forward(ctx, p, x, y.view(), mode::training);
    CHECK_THROWS_WITH_AS(linear{}.backward(ctx, p, kept, x, x, dx.view(), grad_mode::overwrite),
                         "talpa::linear: 'dy' has shape [4, 3], expected [4, 2] = tokens, output "
                         "width of the weight",
                         shape_error);
    CHECK_THROWS_WITH_AS(linear{}.backward(ctx, p, kept, x, dy, y.view(), grad_mode::overwrite),
                         "talpa::linear: 'dx' has shape [4, 2], expected [4, 3] = shape of x",
                         shape_error);
  }
}

}  // namespace talpa::linear_test
