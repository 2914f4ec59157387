// SPDX-License-Identifier: Apache-2.0
#include "support/parity.hpp"
#include "support/scalars.hpp"

#include <talpa/cpu/add.hpp>
#include <talpa/cuda/add.hpp>

#include <doctest/doctest.h>

namespace talpa::cuda_add_test {
using support::device;
using support::on_device;

TEST_SUITE("cuda/add") {
  // One rounding each: the same bits on every backend.
  TEST_CASE_TEMPLATE("add and axpy by one have the bits of the host", T, TALPA_SCALARS) {
    context<device> ctx;
    context<cpu> host(1);
    support::test_random random(3);
    for (const index rows : {index{0}, index{1}, support::device_size(129, 5003)}) {
      on_device<T> a(support::random_matrix<T>(random, rows, 7));
      on_device<T> b(support::random_matrix<T>(random, rows, 7));
      on_device<T> c(matrix<T, cpu>(rows, 7));
      matrix<T, cpu> expected(rows, 7);
      ops::add(host, a.host(), b.host(), expected.view());
      ops::add(ctx, a.view(), b.view(), c.view());
      ctx.synchronise();
      CHECK(support::bit_difference(c.now(), expected) == "");
      CHECK(c.intact());
      ops::axpy(host, T{1}, a.host(), expected.view());
      ops::axpy(ctx, T{1}, a.view(), c.view());
      ctx.synchronise();
      CHECK(support::bit_difference(c.now(), expected) == "");
    }
  }

  TEST_CASE_TEMPLATE("axpy is within two roundings of the double reference", T, TALPA_SCALARS) {
    context<device> ctx;
    support::test_random random(4);
    on_device<T> x(support::random_matrix<T>(random, 33, 65));
    on_device<T> y(support::random_matrix<T>(random, 33, 65));
    const T alpha = T{0.3f};
    const auto expected =
        support::each(support::to_table(x.host().view()), support::to_table(y.host().view()),
                      [&](double a, double b) { return b + static_cast<double>(alpha) * a; });
    const auto bounds =
        support::each(support::to_table(x.host().view()), support::to_table(y.host().view()),
                      [&](double a, double b) {
                        return support::rounding_bound<T>(
                            2, std::abs(b) + std::abs(static_cast<double>(alpha) * a));
                      });
    ops::axpy(ctx, alpha, x.view(), y.view());
    ctx.synchronise();
    CHECK(support::difference(y.now().view(), expected, bounds) == "");
    CHECK(y.intact());
  }
}

}  // namespace talpa::cuda_add_test
