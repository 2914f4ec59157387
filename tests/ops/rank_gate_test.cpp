// SPDX-License-Identifier: Apache-2.0
#include "support/laws.hpp"
#include "support/padded.hpp"
#include "support/random.hpp"
#include "support/scalars.hpp"
#include "support/tolerance.hpp"

#include <talpa/cpu/rank_gate.hpp>
#include <talpa/ops/rank_gate.hpp>
#include <talpa/testing/bounds.hpp>
#include <talpa/testing/gradient_check.hpp>

#include <doctest/doctest.h>

namespace talpa::rank_gate_test {

namespace {

using support::table;

}  // namespace

TEST_SUITE("ops/rank_gate") {
  TEST_CASE("two experts of rank 2, by hand") {
    context<cpu> ctx(1);
    matrix<float, cpu> gates(1, 2), u(1, 4), z(1, 4), dz(1, 4), dgates(1, 2);
    gates(0, 0) = 0.5f;
    gates(0, 1) = 2.0f;
    for (index i = 0; i < 4; ++i) u(0, i) = static_cast<float>(i + 1);
    ops::rank_gate(ctx, 3.0f, gates, u, z.view());
    CHECK(z(0, 0) == 1.5f);   // 3 0.5 1
    CHECK(z(0, 1) == 3.0f);   // 3 0.5 2
    CHECK(z(0, 2) == 18.0f);  // 3 2 3
    CHECK(z(0, 3) == 24.0f);  // 3 2 4
    for (index i = 0; i < 4; ++i) dz(0, i) = static_cast<float>(10 - i);
    ops::rank_gate_backward(ctx, 3.0f, gates, u, dz, dz.view(), dgates.view());
    CHECK(dgates(0, 0) == 84.0f);   // 3 (10 1 + 9 2)
    CHECK(dgates(0, 1) == 156.0f);  // 3 (8 3 + 7 4)
    CHECK(dz(0, 0) == 15.0f);       // 3 0.5 10
    CHECK(dz(0, 1) == 13.5f);
    CHECK(dz(0, 2) == 48.0f);  // 3 2 8
    CHECK(dz(0, 3) == 42.0f);
  }

  TEST_CASE_TEMPLATE("rank_gate agrees with plain loops over strided shapes", T, TALPA_SCALARS) {
    support::test_random random(41);
    for (int i = 0; i < 20; ++i) {
      const index tokens = 1 + random.below(300), experts = 1 + random.below(9);
      const index ranks = 1 + random.below(12);
      CAPTURE(tokens);
      CAPTURE(experts);
      CAPTURE(ranks);
      const double scale = random.uniform(0.5, 4.0);
      const T s = static_cast<T>(scale);
      support::padded<T> gates(support::random_matrix<T>(random, tokens, experts));
      support::padded<T> u(support::random_matrix<T>(random, tokens, experts * ranks));
      support::padded<T> dz(support::random_matrix<T>(random, tokens, experts * ranks));
      support::padded<T> z(tokens, experts * ranks), du(tokens, experts * ranks);
      support::padded<T> dgates(tokens, experts);
      context<cpu> ctx(1 + i % 3);
      ops::rank_gate(ctx, s, gates.view(), u.view(), z.view());
      ops::rank_gate_backward(ctx, s, gates.view(), u.view(), dz.view(), du.view(), dgates.view());
      table z_expected(tokens, experts * ranks), du_expected(tokens, experts * ranks);
      table dg_expected(tokens, experts), dg_size(tokens, experts);
      for (index n = 0; n < tokens; ++n) {
        for (index c = 0; c < experts * ranks; ++c) {
          const double g = static_cast<double>(gates.view()(n, c / ranks));
          const double value = static_cast<double>(u.view()(n, c));
          const double upstream = static_cast<double>(dz.view()(n, c));
          z_expected(n, c) = static_cast<double>(s) * g * value;
          du_expected(n, c) = static_cast<double>(s) * g * upstream;
          dg_expected(n, c / ranks) += static_cast<double>(s) * upstream * value;
          dg_size(n, c / ranks) += std::abs(static_cast<double>(s) * upstream * value);
        }
      }
      // Two products forward; a sum of products and a factor for the gates.
      const auto two = [](double v) { return support::rounding_bound<T>(2.0, v); };
      const auto sum = [&](double v) { return support::sum_bound<T>(ranks + 1, v); };
      const auto equal = [](const auto& found, const table& expected, const table& bounds) {
        return expected.size() == 1
                   ? support::within(static_cast<double>(found(0, 0)), expected(0, 0), bounds(0, 0))
                   : support::difference(found, expected, bounds).empty();
      };
      CHECK(equal(z.view(), z_expected, support::each(z_expected, two)));
      CHECK(equal(du.view(), du_expected, support::each(du_expected, two)));
      CHECK(equal(dgates.view(), dg_expected, support::each(dg_size, sum)));
      CHECK(z.intact());
      CHECK(du.intact());
      CHECK(dgates.intact());
    }
  }

  TEST_CASE("the gradients of gates and u equal differences") {
    support::test_random random(42);
    const index tokens = 5, experts = 3, ranks = 4;
    const double scale = 1.75;
    matrix<double, cpu> gates = support::random_matrix<double>(random, tokens, experts);
    matrix<double, cpu> u = support::random_matrix<double>(random, tokens, experts * ranks);
    const matrix<double, cpu> dz = testing::cotangent(tokens, experts * ranks, 6);
    matrix<double, cpu> z(tokens, experts * ranks), du(tokens, experts * ranks);
    matrix<double, cpu> dgates(tokens, experts);
    context<cpu> ctx(1);
    ops::rank_gate_backward(ctx, scale, gates, u, dz, du.view(), dgates.view());
    const double magnitude = scale * static_cast<double>(z.size()) *
                             testing::largest(gates.view()) * testing::largest(u.view());
    support::obeys(testing::gradient_check(
        "rank_gate", {{"gates", gates.view(), dgates.view()}, {"u", u.view(), du.view()}}, dz,
        {.roundings = 2.0, .magnitude = magnitude},
        [&] {
          ops::rank_gate(ctx, scale, gates, u, z.view());
          return z.view();
        },
        [] { return 0; }));
  }

  TEST_CASE_TEMPLATE("in place and with any number of threads the bits are the same", T,
                     TALPA_SCALARS) {
    support::test_random random(43);
    const index tokens = 700, experts = 3, ranks = 5;
    const matrix<T, cpu> gates = support::random_matrix<T>(random, tokens, experts);
    const matrix<T, cpu> u = support::random_matrix<T>(random, tokens, experts * ranks);
    const matrix<T, cpu> dz = support::random_matrix<T>(random, tokens, experts * ranks);
    context<cpu> one(1);
    matrix<T, cpu> z(tokens, experts * ranks), du(tokens, experts * ranks), dg(tokens, experts);
    ops::rank_gate(one, T{2}, gates, u, z.view());
    ops::rank_gate_backward(one, T{2}, gates, u, dz, du.view(), dg.view());
    for (const int threads : {1, 2, 3}) {
      context<cpu> ctx(threads);
      matrix<T, cpu> z2 = u, du2 = dz, dg2(tokens, experts);
      ops::rank_gate(ctx, T{2}, gates, z2, z2.view());
      ops::rank_gate_backward(ctx, T{2}, gates, u, du2, du2.view(), dg2.view());
      CHECK(testing::first_difference(z2, z) == "");
      CHECK(testing::first_difference(du2, du) == "");
      CHECK(testing::first_difference(dg2, dg) == "");
    }
  }

  TEST_CASE("no tokens is legal") {
    context<cpu> ctx(1);
    const matrix<float, cpu> gates(0, 3), u(0, 6);
    matrix<float, cpu> z(0, 6), dg(0, 3);
    CHECK_NOTHROW(ops::rank_gate(ctx, 1.0f, gates, u, z.view()));
    CHECK_NOTHROW(ops::rank_gate_backward(ctx, 1.0f, gates, u, u, z.view(), dg.view()));
  }

  TEST_CASE("shapes that do not fit are refused") {
    context<cpu> ctx(1);
    const matrix<float, cpu> gates(2, 3), u(2, 7), right(2, 6), none(2, 0);
    matrix<float, cpu> z(2, 6), wrong(3, 6), dg(2, 2);
    CHECK_THROWS_WITH_AS(ops::rank_gate(ctx, 1.0f, gates, u, z.view()),
                         "talpa::ops::rank_gate: 'u' has shape [2, 7], expected [2, R * 3] = "
                         "tokens, ranks of all experts",
                         shape_error);
    CHECK_THROWS_WITH_AS(ops::rank_gate(ctx, 1.0f, none, u, z.view()),
                         "talpa::ops::rank_gate: 'u' has shape [2, 7], expected [2, R * 0] = "
                         "tokens, ranks of all experts",
                         shape_error);
    CHECK_THROWS_WITH_AS(
        ops::rank_gate(ctx, 1.0f, gates, right, wrong.view()),
        "talpa::ops::rank_gate: 'z' has shape [3, 6], expected [2, 6] = shape of u", shape_error);
    CHECK_THROWS_WITH_AS(
        ops::rank_gate_backward(ctx, 1.0f, gates, right, right, z.view(), dg.view()),
        "talpa::ops::rank_gate_backward: 'dgates' has shape [2, 2], expected [2, 3] = shape of "
        "gates",
        shape_error);
    matrix<float, cpu> dgates(2, 3);
    CHECK_THROWS_WITH_AS(
        ops::rank_gate_backward(ctx, 1.0f, gates, right, u, z.view(), dgates.view()),
        "talpa::ops::rank_gate_backward: 'dz' has shape [2, 7], expected [2, 6] = shape of u",
        shape_error);
    CHECK_THROWS_WITH_AS(
        ops::rank_gate_backward(ctx, 1.0f, gates, right, right, wrong.view(), dgates.view()),
        "talpa::ops::rank_gate_backward: 'du' has shape [3, 6], expected [2, 6] = shape of u",
        shape_error);
    // Ranks of another number of experts: shapes of u and gates disagree.
    CHECK_THROWS_WITH_AS(
        ops::rank_gate_backward(ctx, 1.0f, gates, u, u, matrix<float, cpu>(2, 7).view(),
                                dgates.view()),
        "talpa::ops::rank_gate_backward: 'u' has shape [2, 7], expected [2, R * 3] = tokens, ranks "
        "of all experts",
        shape_error);
  }
}

}  // namespace talpa::rank_gate_test
