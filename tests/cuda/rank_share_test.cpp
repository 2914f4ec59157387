// SPDX-License-Identifier: Apache-2.0
#include "support/parity.hpp"
#include "support/scalars.hpp"

#include <talpa/cuda/rank_share.hpp>

#include <doctest/doctest.h>

#include <cmath>

namespace talpa::cuda_rank_share_test {
using support::device;
using support::on_device;
using support::rounding_bound;
using support::table;
using support::to_table;

TEST_SUITE("cuda/rank_share") {
  TEST_CASE_TEMPLATE("spread, collapse and the gradient of gates are those of the formula", T,
                     TALPA_SCALARS) {
    context<device> ctx;
    support::test_random random(6);
    for (const index tokens : {index{0}, index{1}, support::device_size(129, 7001)}) {
      constexpr index experts = 5, ranks = 7;
      CAPTURE(tokens);
      on_device<T> gates(support::random_matrix<T>(random, tokens, experts));
      on_device<T> shared(support::random_matrix<T>(random, tokens, ranks));
      on_device<T> each(support::random_matrix<T>(random, tokens, experts * ranks));
      const table g = to_table(gates.host().view()), s = to_table(shared.host().view());
      const table m = to_table(each.host().view());
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
      on_device<T> a(matrix<T, cpu>(tokens, experts * ranks)), b(matrix<T, cpu>(tokens, ranks)),
          c(matrix<T, cpu>(tokens, experts));
      ops::rank_spread(ctx, T{0.5}, gates.view(), shared.view(), a.view());
      ops::rank_collapse(ctx, T{0.5}, gates.view(), each.view(), b.view());
      ops::rank_share_gates(ctx, T{0.5}, each.view(), shared.view(), c.view());
      ctx.synchronise();
      CHECK(support::difference(a.now().view(), spread, spread_bound) == "");
      CHECK(support::difference(b.now().view(), collapsed, collapsed_bound) == "");
      CHECK(support::difference(c.now().view(), dgates, dgates_bound) == "");
      CHECK(a.intact());
      CHECK(b.intact());
      CHECK(c.intact());
    }
  }
}

}  // namespace talpa::cuda_rank_share_test
