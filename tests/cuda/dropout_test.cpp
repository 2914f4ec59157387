// SPDX-License-Identifier: Apache-2.0
#include "support/parity.hpp"
#include "support/scalars.hpp"

#include <talpa/cpu/dropout.hpp>
#include <talpa/cuda/dropout.hpp>

#include <doctest/doctest.h>

#include <cmath>
#include <limits>

namespace talpa::cuda_dropout_test {
using support::device;
using support::on_device;

TEST_SUITE("cuda/dropout") {
  TEST_CASE_TEMPLATE("dropout and its gradient drop what they drop on the host", T, TALPA_SCALARS) {
    context<device> ctx;
    context<cpu> host(1);
    support::test_random random(21);
    constexpr random_stream stream{9, 4};
    for (const index rows : {index{0}, index{1}, support::device_size(129, 5003)}) {
      // The columns share no divisor with the four words of a block, nor with a warp.
      on_device<T> x(support::random_matrix<T>(random, rows, 37));
      on_device<T> y(support::random_matrix<T>(random, rows, 37));
      for (const float probability : {1e-9f, 0.3f, 1.0f}) {
        CAPTURE(rows);
        CAPTURE(probability);
        matrix<T, cpu> expected(rows, 37);
        ops::dropout_backward(host, stream, probability, x.host(), expected.view(),
                              grad_mode::overwrite);
        ops::dropout_backward(ctx, stream, probability, x.view(), y.view(), grad_mode::overwrite);
        ops::dropout_backward(ctx, stream, probability, x.view(), y.view(), grad_mode::ignore);
        ctx.synchronise();
        CHECK(support::bit_difference(y.now(), expected) == "");
        CHECK(y.intact());
      }
      // A half: the product with 2 is exact, so that the sum takes one rounding however it is
      // contracted.
      matrix<T, cpu> expected = y.now();
      ops::dropout_backward(host, stream, 0.5f, x.host(), expected.view(), grad_mode::accumulate);
      ops::dropout_backward(ctx, stream, 0.5f, x.view(), y.view(), grad_mode::accumulate);
      ops::dropout(ctx, stream, 0.5f, x.view(), x.view());
      ctx.synchronise();
      CHECK(support::bit_difference(y.now(), expected) == "");
      matrix<T, cpu> in_place = x.host();
      ops::dropout(host, stream, 0.5f, in_place, in_place.view());
      CHECK(support::bit_difference(x.now(), in_place) == "");
      CHECK(x.intact());
    }
  }

  TEST_CASE("what is dropped is zero even where it was NaN") {
    context<device> ctx;
    matrix<float, cpu> nan(5, 33);
    for (index i = 0; i < nan.size(); ++i) nan.data()[i] = std::numeric_limits<float>::quiet_NaN();
    on_device<float> x(nan);
    ops::dropout(ctx, {1, 2}, 0.5f, x.view(), x.view());
    ctx.synchronise();
    const matrix<float, cpu> now = x.now();
    index zeros = 0, kept = 0;
    for (index i = 0; i < now.size(); ++i) {
      zeros += now.data()[i] == 0.0f ? 1 : 0;
      kept += std::isnan(now.data()[i]) ? 1 : 0;
    }
    CHECK(zeros + kept == now.size());
    CHECK(zeros > 0);
    CHECK(kept > 0);
  }
}

}  // namespace talpa::cuda_dropout_test
