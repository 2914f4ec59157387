// SPDX-License-Identifier: Apache-2.0
#include "support/padded.hpp"
#include "support/random.hpp"
#include "support/scalars.hpp"
#include "support/tolerance.hpp"

#include <talpa/cpu/rank_share.hpp>

#include <doctest/doctest.h>

#include <cmath>

namespace talpa::rank_share_test {

using support::difference;
using support::rounding_bound;
using support::table;
using support::to_table;

TEST_SUITE("ops/rank_share") {
  TEST_CASE_TEMPLATE("spread, collapse and the gradient of gates are those of the formula", T,
                     TALPA_SCALARS) {
    constexpr index tokens = 700, experts = 5, ranks = 7;
    support::test_random random(6);
    const matrix<T, cpu> gates = support::random_matrix<T>(random, tokens, experts);
    const matrix<T, cpu> shared = support::random_matrix<T>(random, tokens, ranks);
    const matrix<T, cpu> each = support::random_matrix<T>(random, tokens, experts * ranks);
    const table g = to_table(gates.view()), s = to_table(shared.view()), m = to_table(each.view());
    table spread(tokens, experts * ranks), collapsed(tokens, ranks), dgates(tokens, experts);
    table spread_bound = spread, collapsed_bound = collapsed, dgates_bound = dgates;
    for (index n = 0; n < tokens; ++n) {
      for (index e = 0; e < experts; ++e) {
        for (index r = 0; r < ranks; ++r) {
          const index i = e * ranks + r;
          spread(n, i) = 0.5 * g(n, e) * s(n, r);
          spread_bound(n, i) = rounding_bound<T>(2, spread(n, i));
          collapsed(n, r) += 0.5 * g(n, e) * m(n, i);
          // Two products and at most E additions a term.
          collapsed_bound(n, r) +=
              rounding_bound<T>(2 + experts, std::abs(0.5 * g(n, e) * m(n, i)));
          dgates(n, e) += 0.5 * m(n, i) * s(n, r);
          dgates_bound(n, e) += rounding_bound<T>(2 + ranks, std::abs(0.5 * m(n, i) * s(n, r)));
        }
      }
    }
    for (const int threads : {1, 2, 3}) {
      context<cpu> ctx(threads);
      support::padded<T> a(tokens, experts * ranks), b(tokens, ranks), c(tokens, experts);
      ops::rank_spread(ctx, T{0.5}, gates, shared, a.view());
      ops::rank_collapse(ctx, T{0.5}, gates, each, b.view());
      ops::rank_share_gates(ctx, T{0.5}, each, shared, c.view());
      CHECK(a.intact());
      CHECK(b.intact());
      CHECK(c.intact());
      CHECK(difference(a.view(), spread, spread_bound) == "");
      CHECK(difference(b.view(), collapsed, collapsed_bound) == "");
      CHECK(difference(c.view(), dgates, dgates_bound) == "");
    }
  }

  TEST_CASE("shapes that do not fit are refused") {
    context<cpu> ctx(1);
    matrix<float, cpu> gates(3, 2), u(3, 4), z(3, 8), other(3, 5);
    CHECK_THROWS_WITH_AS(
        ops::rank_spread(ctx, 1.0F, gates, other, z.view()),
        "talpa::ops::rank_spread: 'u' has shape [3, 5], expected [3, 4] = tokens, ranks",
        shape_error);
    CHECK_THROWS_WITH_AS(
        ops::rank_collapse(ctx, 1.0F, gates, z, other.view()),
        "talpa::ops::rank_collapse: 'z' has shape [3, 5], expected [3, 4] = tokens, ranks",
        shape_error);
    CHECK_THROWS_WITH_AS(
        ops::rank_share_gates(ctx, 1.0F, z, other, gates.view()),
        "talpa::ops::rank_share_gates: 'shared' has shape [3, 5], expected [3, 4] = tokens, ranks",
        shape_error);
    CHECK_THROWS_WITH_AS(ops::rank_collapse(ctx, 1.0F, gates, other, u.view()),
                         "talpa::ops::rank_collapse: 'u' has shape [3, 5], expected [3, R * 2] = "
                         "tokens, ranks of all experts",
                         shape_error);
  }
}

}  // namespace talpa::rank_share_test
