// SPDX-License-Identifier: Apache-2.0
#include "support/padded.hpp"
#include "support/random.hpp"
#include "support/scalars.hpp"
#include "support/tolerance.hpp"

#include <talpa/cpu/scale.hpp>

#include <doctest/doctest.h>

namespace talpa::scale_test {

TEST_SUITE("ops/scale") {
  TEST_CASE_TEMPLATE("scale multiplies every element, in place too", T, TALPA_SCALARS) {
    support::test_random random(4);
    const matrix<T, cpu> x = support::random_matrix<T>(random, 700, 70);
    const T alpha = T{0.3f};
    const support::table expected = support::each(
        support::to_table(x.view()), [&](double v) { return static_cast<double>(alpha) * v; });
    const support::table bounds =
        support::each(expected, [](double v) { return support::rounding_bound<T>(1, v); });
    for (const int threads : {1, 2, 3}) {
      context<cpu> ctx(threads);
      support::padded<T> y(700, 70);
      ops::scale(ctx, alpha, x, y.view());
      CHECK(y.intact());
      CHECK(support::difference(y.view(), expected, bounds) == "");
      matrix<T, cpu> in_place = x;
      ops::scale(ctx, alpha, in_place, in_place.view());
      CHECK(support::same_bits(in_place.view(), y.view()));
    }
  }

  TEST_CASE("scale names the shapes that differ") {
    context<cpu> ctx(1);
    matrix<float, cpu> x(2, 3), y(2, 2);
    CHECK_THROWS_WITH_AS(ops::scale(ctx, 1.0f, x, y.view()),
                         "talpa::ops::scale: 'y' has shape [2, 2], expected [2, 3] = shape of x",
                         shape_error);
  }
}

}  // namespace talpa::scale_test
