// SPDX-License-Identifier: Apache-2.0
#include "support/parity.hpp"
#include "support/scalars.hpp"

#include <talpa/cuda/kl_divergence.hpp>

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <limits>

namespace talpa::cuda_kl_divergence_test {
using support::device;
using support::each;
using support::on_device;
using support::rounding_bound;
using support::table;
using support::to_table;

namespace {

// Exact in float, so that the clipped elements are those of the reference.
constexpr double clip = 0x1p-10;

/// Positive rows, one element in eight outside [clip, 1 - clip].
template <class T>
matrix<T, cpu> shares(support::test_random& random, index rows, index cols) {
  matrix<T, cpu> p(rows, cols);
  for (index i = 0; i < p.size(); ++i) {
    const index odd = random.below(16);
    p.data()[i] = odd == 0 ? T{0} : (odd == 1 ? T{1} : static_cast<T>(random.uniform(0.01, 0.99)));
  }
  return p;
}

}  // namespace

TEST_SUITE("cuda/kl_divergence") {
  TEST_CASE_TEMPLATE("kl_divergence and its gradient agree with loops in double", T,
                     TALPA_SCALARS) {
    context<device> ctx;
    support::test_random random(17);
    for (const index rows : {index{0}, index{1}, support::device_size(129, 3001)}) {
      constexpr index cols = 37;
      CAPTURE(rows);
      on_device<T> p(shares<T>(random, rows, cols)), q(shares<T>(random, rows, cols));
      on_device<T> more(support::random_matrix<T>(random, rows, cols));
      on_device<T> value(support::random_matrix<T>(random, 1, 1));
      matrix<T, cpu> slope(1, 1);
      slope(0, 0) = T{-2};
      on_device<T> dvalue(slope);
      const auto clipped = [](double v) { return std::min(std::max(v, clip), 1.0 - clip); };
      const double count = static_cast<double>(rows);
      double expected = 0.0, size = 0.0;
      table gradient(rows, cols);
      for (index n = 0; n < rows; ++n) {
        for (index c = 0; c < cols; ++c) {
          const double a = static_cast<double>(p.host()(n, c));
          const double b = static_cast<double>(q.host()(n, c));
          const double fall = std::log(clipped(a)) - std::log(clipped(b));
          expected += clipped(a) * fall / count;
          size += clipped(a) * (-std::log(clipped(a)) - std::log(clipped(b))) / count;
          gradient(n, c) = a < clip || a > 1.0 - clip ? 0.0 : -2.0 / count * (fall + 1.0);
        }
      }
      const table added =
          each(gradient, to_table(more.host().view()), [](double a, double b) { return a + b; });
      ops::kl_divergence(ctx, p.view(), q.view(), clip, value.view());
      ops::kl_divergence_backward(ctx, p.view(), q.view(), clip, dvalue.view(), more.view(),
                                  grad_mode::accumulate);
      ops::kl_divergence_backward(ctx, p.view(), q.view(), clip, dvalue.view(), q.view(),
                                  grad_mode::overwrite);
      ctx.synchronise();
      // A sum of N C terms, each of two logarithms (2 roundings each), a difference and a product,
      // and a division; `size` sums the absolute values of the terms.
      CHECK(support::within(static_cast<double>(value.now()(0, 0)), expected,
                            rounding_bound<T>(static_cast<double>(rows * cols) + 10.0, size)));
      // ln(1 / clip) < 7 for either logarithm, ten roundings, weight 2 / N.
      const double bound = rounding_bound<T>(10.0, 2.0 / std::max(1.0, count) * 15.0);
      CHECK(support::difference(q.now().view(), gradient, bound) == "");
      CHECK(support::difference(more.now().view(), added, each(added, [&](double v) {
                                  return bound + rounding_bound<T>(1.0, v);
                                })) == "");
      CHECK(q.intact());
      CHECK(more.intact());
      CHECK(value.intact());
      CHECK(ctx.scratch.used() == 0);
    }
  }

  TEST_CASE("kl_divergence keeps NaN") {
    context<device> ctx;
    matrix<float, cpu> values(2, 3), one(1, 1);
    one(0, 0) = 1.0f;
    values(1, 2) = std::numeric_limits<float>::quiet_NaN();
    on_device<float> p(values), q(matrix<float, cpu>(2, 3)), dp(values), value(one);
    ops::kl_divergence_backward(ctx, p.view(), q.view(), clip, value.view(), dp.view(),
                                grad_mode::overwrite);
    ops::kl_divergence(ctx, p.view(), q.view(), clip, value.view());
    ctx.synchronise();
    CHECK(std::isnan(value.now()(0, 0)));
    CHECK(std::isnan(dp.now()(1, 2)));
    CHECK(dp.now()(0, 0) == 0.0f);
  }
}

}  // namespace talpa::cuda_kl_divergence_test
