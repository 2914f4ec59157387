// SPDX-License-Identifier: Apache-2.0
#include "support/padded.hpp"
#include "support/random.hpp"
#include "support/scalars.hpp"
#include "support/tolerance.hpp"

#include <talpa/cpu/sgd.hpp>

#include <doctest/doctest.h>

namespace talpa::sgd_test {
using support::each;
using support::rounding_bound;
using support::table;
using support::to_table;

TEST_SUITE("ops/sgd") {
  TEST_CASE("sgd_update of one weight worked by hand") {
    context<cpu> ctx(1);
    matrix<double, cpu> g(1, 1), v(1, 1), w(1, 1);
    g(0, 0) = 1.0;
    v(0, 0) = 4.0;
    w(0, 0) = 8.0;
    // slope = 1 + 0.25 * 8 = 3; v = 0.5 * 4 + 3 = 5; w = 8 - 0.5 * 5.
    ops::sgd_update(ctx, {.learning_rate = 0.5, .momentum = 0.5, .weight_decay = 0.25}, g, v,
                    w.view());
    CHECK(v(0, 0) == 5.0);
    CHECK(w(0, 0) == 5.5);
    // v = 0.5 * 5 + 1 = 3.5; w = 5.5 - 0.5 (1 + 0.5 * 3.5).
    ops::sgd_update(ctx, {.learning_rate = 0.5, .momentum = 0.5, .nesterov = true}, g, v, w.view());
    CHECK(v(0, 0) == 3.5);
    CHECK(w(0, 0) == 4.125);
    ops::sgd_update(ctx, {.learning_rate = 0.5}, g, matrix_view<double, cpu>(), w.view());
    CHECK(w(0, 0) == 3.625);
  }

  TEST_CASE_TEMPLATE("sgd_update agrees with the reference for strided views and any threads", T,
                     TALPA_SCALARS) {
    support::test_random random(16);
    constexpr index rows = 300, cols = 70;
    const matrix<T, cpu> g = support::random_matrix<T>(random, rows, cols);
    const matrix<T, cpu> v0 = support::random_matrix<T>(random, rows, cols);
    const matrix<T, cpu> w0 = support::random_matrix<T>(random, rows, cols);
    for (const double momentum : {0.0, 0.875}) {
      for (const bool nesterov : {false, true}) {
        CAPTURE(momentum);
        CAPTURE(nesterov);
        const sgd_numbers numbers{.learning_rate = 0.0625,
                                  .momentum = momentum,
                                  .weight_decay = 0.125,
                                  .nesterov = nesterov};
        support::sgd_reference reference{numbers.learning_rate, numbers.momentum,
                                         numbers.weight_decay, numbers.nesterov,
                                         to_table(v0.view())};
        table expected = to_table(w0.view());
        reference.step(expected, to_table(g.view()));
        // At most six operations on terms that add up to no more than this.
        const double size =
            support::largest(to_table(w0.view())) +
            2.0 * (support::largest(to_table(g.view())) + support::largest(to_table(w0.view())) +
                   support::largest(to_table(v0.view())));
        const double bound = rounding_bound<T>(7, size);
        for (const int threads : {1, 2, 3}) {
          context<cpu> ctx(threads);
          support::padded<T> v(v0), w(w0);
          ops::sgd_update(ctx, numbers, g, v.view(), w.view());
          CHECK(v.intact());
          CHECK(w.intact());
          CHECK(support::difference(w.view(), expected, bound) == "");
          if (momentum == 0.0) {
            CHECK(support::same_bits(v.view(), v0.view()));
          } else {
            CHECK(support::difference(v.view(), reference.velocity, bound) == "");
          }
        }
      }
    }
  }

  TEST_CASE("sgd_update names the argument that does not fit") {
    context<cpu> ctx(1);
    matrix<float, cpu> w(2, 3), bad(3, 2);
    CHECK_THROWS_WITH_AS(
        ops::sgd_update(ctx, {}, bad, w, w.view()),
        "talpa::ops::sgd_update: 'dvalue' has shape [3, 2], expected [2, 3] = shape of value",
        shape_error);
    CHECK_THROWS_WITH_AS(
        ops::sgd_update(ctx, {.momentum = 0.9}, w, bad, w.view()),
        "talpa::ops::sgd_update: 'velocity' has shape [3, 2], expected [2, 3] = shape of value",
        shape_error);
  }
}

}  // namespace talpa::sgd_test
