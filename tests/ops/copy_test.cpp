// SPDX-License-Identifier: Apache-2.0
#include "support/padded.hpp"
#include "support/random.hpp"
#include "support/scalars.hpp"
#include "support/tolerance.hpp"

#include <talpa/cpu/copy.hpp>

#include <doctest/doctest.h>

namespace talpa::copy_test {

TEST_SUITE("ops/copy") {
  TEST_CASE_TEMPLATE("copy moves a matrix between different strides without changing a bit", T,
                     TALPA_SCALARS) {
    support::test_random random(1);
    const matrix<T, cpu> x = support::random_matrix<T>(random, 700, 70);
    for (const int threads : {1, 2, 3}) {
      context<cpu> ctx(threads);
      support::padded<T> wide(700, 70);
      ops::copy(ctx, x, wide.view());
      CHECK(wide.intact());
      CHECK(support::same_bits(wide.view(), x.view()));
      matrix<T, cpu> back(700, 70);
      ops::copy(ctx, wide.view(), back.view());
      CHECK(support::same_bits(back.view(), x.view()));
    }
  }

  TEST_CASE("copy of a view to itself and of nothing is legal") {
    context<cpu> ctx(1);
    matrix<float, cpu> x(1, 2);
    x(0, 1) = 3.0f;
    ops::copy(ctx, x, x.view());
    CHECK(x(0, 1) == 3.0f);
    ops::copy(ctx, matrix_view<const float, cpu>(), matrix_view<float, cpu>());
  }

  TEST_CASE("copy names the shapes that differ") {
    context<cpu> ctx(1);
    matrix<float, cpu> x(2, 3), y(3, 2);
    CHECK_THROWS_WITH_AS(ops::copy(ctx, x, y.view()),
                         "talpa::ops::copy: 'y' has shape [3, 2], expected [2, 3] = shape of x",
                         shape_error);
  }
}

}  // namespace talpa::copy_test
