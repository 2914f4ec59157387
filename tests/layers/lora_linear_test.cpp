// SPDX-License-Identifier: Apache-2.0
#include "support/count_allocations.hpp"
#include "support/cpu_products.hpp"
#include "support/laws.hpp"
#include "support/random.hpp"
#include "support/scalars.hpp"
#include "support/tolerance.hpp"

#include <talpa/cpu/bias.hpp>
#include <talpa/cpu/dropout.hpp>
#include <talpa/cpu/fill.hpp>
#include <talpa/cpu/grouped_gemm.hpp>
#include <talpa/cpu/rank_gate.hpp>
#include <talpa/cpu/reduce.hpp>
#include <talpa/layers/lora_linear.hpp>
#include <talpa/testing/gradient_check.hpp>
#include <talpa/testing/parameters.hpp>

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <utility>
#include <vector>

namespace talpa::lora_linear_test {

namespace {

using support::table;
using support::to_table;

template <class T>
lora_linear::params<T, cpu> make_params(const lora_linear& layer, index inputs, index outputs,
                                        std::uint64_t seed, bool frozen_base = true) {
  generator g(seed);
  auto base = linear{}.init<T, cpu>(inputs, outputs, g, "");
  if (frozen_base) base.freeze();
  auto p = layer.init<T, cpu>(std::move(base), g);
  testing::detail::shake<T>(p, g, 0.5);
  return p;
}

}  // namespace

TEST_SUITE("layers/lora_linear") {
  TEST_CASE("one token, rank 1, by hand") {
    // W = [1 1], b = 0, A = [0 2], B = [3], s = 4: y = (1 + 2) + 4 * 3 * 4 for x = (1, 2).
    const lora_linear layer{.adapter = {.rank = 1, .alpha = 4.0}};
    auto p = make_params<float>(layer, 2, 1, 1, false);
    const auto set = [](parameter<float, cpu>& q, std::vector<float> values) {
      std::copy(values.begin(), values.end(), q.value().data);
    };
    set(p.base.weight, {1, 1});
    set(p.base.bias, {0});
    set(p.adapter.a, {0, 2});
    set(p.adapter.b, {3});
    matrix<float, cpu> x(1, 2), y(1, 1), dy(1, 1), dx(1, 2);
    x(0, 0) = 1.0f;
    x(0, 1) = 2.0f;
    dy(0, 0) = 1.0f;
    context<cpu> ctx(1);
    const auto kept = layer.forward(ctx, p, x, y.view(), mode::training);
    CHECK(y(0, 0) == 51.0f);
    layer.backward(ctx, p, kept, x, dy, dx.view(), grad_mode::overwrite);
    CHECK(dx(0, 0) == 1.0f);                   // W
    CHECK(dx(0, 1) == 25.0f);                  // W + s B A
    CHECK(p.adapter.a.grad()(0, 0) == 12.0f);  // s B x
    CHECK(p.adapter.a.grad()(0, 1) == 24.0f);
    CHECK(p.adapter.b.grad()(0, 0) == 16.0f);  // s A x
    CHECK(p.base.weight.grad()(0, 1) == 2.0f);
    CHECK(p.base.bias.grad()(0, 0) == 1.0f);
  }

  TEST_CASE_TEMPLATE("lora_linear agrees with plain loops over random shapes", T, TALPA_SCALARS) {
    support::test_random random(80);
    for (int i = 0; i < 10; ++i) {
      const index tokens = 1 + random.below(30), inputs = 1 + random.below(20);
      const index outputs = 2 + random.below(20), rank = 1 + random.below(8);
      CAPTURE(tokens);
      CAPTURE(inputs);
      CAPTURE(rank);
      const lora_linear layer{.adapter = {.rank = rank, .alpha = random.uniform(0.5, 8.0)}};
      auto p = make_params<T>(layer, inputs, outputs, static_cast<std::uint64_t>(i));
      const matrix<T, cpu> x = support::random_matrix<T>(random, tokens, inputs);
      matrix<T, cpu> y(tokens, outputs);
      testing::poison<T>(y.view());
      context<cpu> ctx(1 + i % 3);
      layer.forward(ctx, p, x, y.view(), mode::training);
      const table xt = to_table(x.view()), w = to_table(p.base.weight.value());
      const table a = to_table(p.adapter.a.value()), b = to_table(p.adapter.b.value());
      const double s = layer.adapter.scale();
      const auto add = [&](const table& base, const table& update, const table& bias) {
        table sum = base;
        for (index n = 0; n < sum.rows; ++n) {
          for (index o = 0; o < sum.cols; ++o) sum(n, o) += s * update(n, o) + bias(0, o);
        }
        return sum;
      };
      const auto product = [](const table& m, const table& factors) {
        return support::matmul(m, support::transposed(factors));
      };
      const table bias = to_table(p.base.bias.value());
      const table expected = add(product(xt, w), support::matmul(product(xt, a), b), bias);
      const table ax = support::absolute(xt);
      const table terms =
          add(product(ax, support::absolute(w)),
              support::matmul(product(ax, support::absolute(a)), support::absolute(b)),
              support::absolute(bias));
      const table bounds = support::each(terms, [&](double m) {
        return support::rounding_bound<T>(static_cast<double>(inputs + rank) + 8.0, m);
      });
      CHECK(support::difference(y.view(), expected, bounds) == "");
    }
  }

  TEST_CASE("gradients equal differences, with and without dropout") {
    support::test_random random(81);
    const index tokens = 7, inputs = 6, outputs = 4, rank = 3;
    for (const double dropout : {0.0, 0.4}) {
      for (const bool frozen_base : {true, false}) {
        const lora_linear layer{.adapter = {.rank = rank, .alpha = 4.0, .dropout = dropout}};
        auto p = make_params<double>(layer, inputs, outputs, 2, frozen_base);
        matrix<double, cpu> x = support::random_matrix<double>(random, tokens, inputs);
        matrix<double, cpu> y(tokens, outputs), dx(tokens, inputs);
        const matrix<double, cpu> dy = testing::cotangent(tokens, outputs, 1);
        context<cpu> ctx(1);
        const auto forward = [&] {
          generator same(5);
          return layer.forward(ctx, p, x, y.view(), mode::training, {.random = &same});
        };
        const auto kept = forward();
        testing::detail::fill_gradients<double>(p, 0.0);
        layer.backward(ctx, p, kept, x, dy, dx.view(), grad_mode::overwrite);
        std::vector<testing::gradient_probe> probes{{"x", x.view(), dx.view()}};
        p.visit([&](parameter<double, cpu>& q) {
          if (q.trainable()) probes.push_back({q.name(), q.value(), q.grad()});
        });
        const double weight = std::max(1.0, testing::detail::largest_weight<double>(p));
        const double scale = layer.adapter.scale() / (1.0 - dropout);
        const double terms = static_cast<double>(inputs) * weight *
                             (1.0 + static_cast<double>(rank) * weight * scale);
        support::obeys(testing::gradient_check(
            "lora_linear", probes, dy,
            {.roundings = static_cast<double>(inputs + rank) + 8.0,
             .magnitude = static_cast<double>(y.size()) * terms * testing::largest(x.view())},
            [&] {
              const workspace<cpu>::scope scope(ctx.memory);
              forward();
              return y.view();
            },
            [] { return 0; }));
      }
    }
  }

  TEST_CASE("a fresh adapter leaves the base as it is, bit for bit") {
    support::test_random random(82);
    const matrix<float, cpu> x = support::random_matrix<float>(random, 9, 6);
    generator g(1);
    auto base = linear{}.init<float, cpu>(6, 5, g, "");
    const auto alone = base;
    const lora_linear layer{};
    auto p = layer.init<float, cpu>(std::move(base), g, "here.");
    CHECK(p.adapter.a.name() == "here.adapter.A");
    CHECK(p.adapter.b.name() == "here.adapter.B");
    CHECK(p.adapter.a.rows() == 8);
    CHECK(layer.output_width(p) == 5);
    context<cpu> ctx(1);
    matrix<float, cpu> y(9, 5), expected(9, 5);
    layer.forward(ctx, p, x, y.view(), mode::training);
    linear{}.forward(ctx, alone, x, expected.view(), mode::training);
    CHECK(testing::first_difference(y, expected) == "");
  }

  TEST_CASE_TEMPLATE("any number of threads and any repetition gives the same bits", T,
                     TALPA_SCALARS) {
    support::test_random random(83);
    const index tokens = 1100, inputs = 10, outputs = 9;
    const lora_linear layer{.adapter = {.rank = 4, .dropout = 0.2}};
    auto p = make_params<T>(layer, inputs, outputs, 3, false);
    const matrix<T, cpu> x = support::random_matrix<T>(random, tokens, inputs);
    const matrix<T, cpu> dy = support::random_matrix<T>(random, tokens, outputs);
    matrix<T, cpu> first_y, first_dx;
    std::vector<matrix<T, cpu>> first;
    for (const int threads : {1, 1, 2, 3}) {
      context<cpu> ctx(threads);
      generator same(9);
      matrix<T, cpu> y(tokens, outputs), dx(tokens, inputs);
      testing::detail::fill_gradients<T>(p, T{0});
      const auto kept = layer.forward(ctx, p, x, y.view(), mode::training, {.random = &same});
      layer.backward(ctx, p, kept, x, dy, dx.view(), grad_mode::overwrite);
      const auto gradients = testing::detail::gradients_of<T>(p);
      if (first.empty()) {
        first_y = y;
        first_dx = dx;
        first = gradients;
      }
      CHECK(testing::first_difference(y, first_y) == "");
      CHECK(testing::first_difference(dx, first_dx) == "");
      CHECK(testing::detail::first_difference(gradients, first) == "");
    }
  }

  TEST_CASE("dropout needs a generator in training only, and spares the base") {
    support::test_random random(84);
    const lora_linear layer{.adapter = {.rank = 2, .dropout = 0.5}};
    auto p = make_params<double>(layer, 6, 4, 4);
    const matrix<double, cpu> x = support::random_matrix<double>(random, 20, 6);
    matrix<double, cpu> y(20, 4), base(20, 4);
    context<cpu> ctx(1);
    CHECK_THROWS_WITH_AS(
        layer.forward(ctx, p, x, y.view(), mode::training),
        "talpa::lora_linear: 'batch.random' is null, expected a generator = source "
        "of the dropout mask in training",
        value_error);
    CHECK_NOTHROW(layer.forward(ctx, p, x, y.view(), mode::inference));
    // Without its second factor the adapter is silent, and what is left saw all of x.
    std::fill_n(p.adapter.b.value().data, p.adapter.b.size(), 0.0);
    generator g(1);
    layer.forward(ctx, p, x, y.view(), mode::training, {.random = &g});
    linear{}.forward(ctx, p.base, x, base.view(), mode::training);
    CHECK(testing::first_difference(y, base) == "");
  }

  TEST_CASE("dx can be left out or added to, and no tokens is legal") {
    support::test_random random(85);
    for (const double dropout : {0.0, 0.5}) {
      const lora_linear layer{.adapter = {.rank = 2, .dropout = dropout}};
      auto p = make_params<double>(layer, 6, 4, 5, false);
      const matrix<double, cpu> x = support::random_matrix<double>(random, 8, 6);
      const matrix<double, cpu> dy = support::random_matrix<double>(random, 8, 4);
      matrix<double, cpu> y(8, 4), over(8, 6), added(8, 6);
      context<cpu> ctx(1);
      generator g(1);
      const auto kept = layer.forward(ctx, p, x, y.view(), mode::training, {.random = &g});
      testing::detail::fill_gradients<double>(p, 0.0);
      layer.backward(ctx, p, kept, x, dy, over.view(), grad_mode::overwrite);
      const auto gradients = testing::detail::gradients_of<double>(p);
      testing::detail::fill_gradients<double>(p, 0.0);
      layer.backward(ctx, p, kept, x, dy, {}, grad_mode::ignore);
      CHECK(testing::detail::first_difference(testing::detail::gradients_of<double>(p),
                                              gradients) == "");
      std::fill_n(added.data(), added.size(), 3.0);
      layer.backward(ctx, p, kept, x, dy, added.view(), grad_mode::accumulate);
      const double bound =
          testing::gamma<double>(32.0) * (3.0 + 32.0 * testing::largest(over.view()));
      for (index i = 0; i < over.size(); ++i) {
        CHECK(std::abs(added.data()[i] - (3.0 + over.data()[i])) <= bound);
      }
      const matrix<double, cpu> none(0, 6), no_dy(0, 4);
      matrix<double, cpu> no_y(0, 4), no_dx(0, 6);
      testing::detail::fill_gradients<double>(p, 0.0);
      const auto empty = layer.forward(ctx, p, none, no_y.view(), mode::training, {.random = &g});
      layer.backward(ctx, p, empty, none, no_dy, no_dx.view(), grad_mode::overwrite);
      CHECK(testing::largest(p.adapter.a.grad()) == 0.0);
    }
  }

  TEST_CASE("the second and later steps of training allocate nothing") {
    support::test_random random(86);
    const lora_linear layer{.adapter = {.rank = 4, .dropout = 0.1}};
    auto p = make_params<float>(layer, 12, 10, 6, false);
    const matrix<float, cpu> x = support::random_matrix<float>(random, 50, 12);
    const matrix<float, cpu> dy = support::random_matrix<float>(random, 50, 10);
    matrix<float, cpu> y(50, 10), dx(50, 12);
    context<cpu> ctx(1);
    generator g(1);
    for (int step = 0; step < 3; ++step) {
      const long allocated = support::allocations_of([&] {
        const workspace<cpu>::scope scope(ctx.memory);
        const auto kept = layer.forward(ctx, p, x, y.view(), mode::training, {.random = &g});
        layer.backward(ctx, p, kept, x, dy, dx.view(), grad_mode::overwrite);
      });
      if (step > 0) CHECK(allocated == 0);
      if (step == 0 && support::allocations_are_counted()) CHECK(allocated > 0);
    }
    CHECK(ctx.memory.used() == 0);
    CHECK(ctx.scratch.used() == 0);
  }

  TEST_CASE("arguments that do not fit are refused") {
    lora_linear layer{.adapter = {.rank = 2}};
    auto p = make_params<float>(layer, 3, 2, 7);
    context<cpu> ctx(1);
    const matrix<float, cpu> x(4, 3), dy(4, 2);
    matrix<float, cpu> y(4, 2), dx(4, 3);
    CHECK_THROWS_WITH_AS(layer.forward(ctx, p, dy, y.view(), mode::training),
                         "talpa::lora_linear: 'x' has shape [4, 2], expected [4, 3] = tokens, "
                         "input width of the base",
                         shape_error);
    CHECK_THROWS_WITH_AS(
        layer.forward(ctx, p, x, dx.view(), mode::training),
        "talpa::lora_linear: 'y' has shape [4, 3], expected [4, 2] = tokens, output "
        "width of the base",
        shape_error);
    const auto kept = layer.forward(ctx, p, x, y.view(), mode::training);
    CHECK_THROWS_WITH_AS(
        layer.backward(ctx, p, kept, matrix<float, cpu>(5, 3), dy, dx.view(), grad_mode::overwrite),
        "talpa::lora_linear: 'x' has shape [5, 3], expected [4, 3] = tokens of forward, input "
        "width "
        "of the base",
        shape_error);
    CHECK_THROWS_WITH_AS(layer.backward(ctx, p, kept, x, x, dx.view(), grad_mode::overwrite),
                         "talpa::lora_linear: 'dy' has shape [4, 3], expected [4, 2] = tokens, "
                         "output width of the base",
                         shape_error);
    CHECK_THROWS_WITH_AS(layer.backward(ctx, p, kept, x, dy, y.view(), grad_mode::overwrite),
                         "talpa::lora_linear: 'dx' has shape [4, 2], expected [4, 3] = shape of x",
                         shape_error);
    layer.adapter.rank = 0;
    CHECK_THROWS_WITH_AS(layer.forward(ctx, p, x, y.view(), mode::training),
                         "talpa::lora: 'rank' is 0, expected >= 1 = width of the adapter",
                         value_error);
  }
}

}  // namespace talpa::lora_linear_test
