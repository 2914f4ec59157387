// SPDX-License-Identifier: Apache-2.0
#include "support/padded.hpp"
#include "support/random.hpp"
#include "support/scalars.hpp"
#include "support/tolerance.hpp"

#include <talpa/cpu/block_scale.hpp>
#include <talpa/testing/bounds.hpp>

#include <doctest/doctest.h>

#include <cmath>

namespace talpa::block_scale_test {

TEST_SUITE("ops/block_scale") {
  TEST_CASE_TEMPLATE("columns of each block are scaled, and gradients are theirs", T,
                     TALPA_SCALARS) {
    support::test_random random(3);
    constexpr index blocks = 5, rows = 3, cols = 70;
    const matrix<T, cpu> f = support::random_matrix<T>(random, blocks, cols);
    const matrix<T, cpu> x = support::random_matrix<T>(random, blocks * rows, cols);
    const matrix<T, cpu> dy = support::random_matrix<T>(random, blocks * rows, cols);
    for (const int threads : {1, 3}) {
      context<cpu> ctx(threads);
      support::padded<T> y(blocks * rows, cols), dx(blocks * rows, cols);
      matrix<T, cpu> df(blocks, cols);
      for (index i = 0; i < df.size(); ++i) df.data()[i] = T{1};
      ops::block_scale(ctx, f, x, y.view());
      ops::block_scale_backward(ctx, f, x, dy, dx.view(), df.view());
      CHECK(y.intact());
      CHECK(dx.intact());
      for (index e = 0; e < blocks; ++e) {
        for (index o = 0; o < cols; ++o) {
          double sum = 1.0, size = 1.0;
          for (index i = e * rows; i < (e + 1) * rows; ++i) {
            CHECK(y.view()(i, o) == f(e, o) * x(i, o));
            CHECK(dx.view()(i, o) == f(e, o) * dy(i, o));
            sum += double(dy(i, o)) * double(x(i, o));
            size += std::abs(double(dy(i, o)) * double(x(i, o)));
          }
          // Three products and sums.
          CHECK(std::abs(double(df(e, o)) - sum) <= testing::gamma<T>(6.0) * size);
        }
      }
    }
    context<cpu> ctx(1);
    matrix<T, cpu> in_place = dy, df(blocks, cols), expected(blocks * rows, cols);
    ops::block_scale(ctx, f, dy, expected.view());
    ops::block_scale_backward(ctx, f, x, in_place, in_place.view(), df.view());
    CHECK(support::same_bits(in_place.view(), expected.view()));
  }

  TEST_CASE("block_scale names what does not fit") {
    context<cpu> ctx(1);
    matrix<float, cpu> f(2, 3), x(5, 3), y(4, 3);
    CHECK_THROWS_WITH_AS(
        ops::block_scale(ctx, f, x, x.view()),
        "talpa::ops::block_scale: 'x' has shape [5, 3], expected [P * 2, 3] = rows of all blocks, "
        "columns of f",
        shape_error);
    CHECK_THROWS_AS(ops::block_scale(ctx, f, y, x.view()), shape_error);
    CHECK_THROWS_AS(ops::block_scale_backward(ctx, f, y, y, y.view(), x.view()), shape_error);
  }
}

}  // namespace talpa::block_scale_test
