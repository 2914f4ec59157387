// SPDX-License-Identifier: Apache-2.0
#include "products.hpp"
#include "support/parity.hpp"
#include "support/scalars.hpp"

#include <talpa/ops/gemm.hpp>

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

namespace talpa::cuda_gemm_test {
using support::device;
using support::on_device;
using support::table;

namespace {

template <class T>
void multiply(context<device>& ctx, T alpha, on_device<T>& a, transpose ta, on_device<T>& b,
              transpose tb, T beta, on_device<T>& c) {
  ops::gemm(ctx, alpha, a.view(), ta, b.view(), tb, beta, c.view());
  ctx.synchronise();
}

/// Of a product [rows, inner] [inner, cols] with plain loops in double; beta == 0 meets NaN.
template <class T>
std::string product_difference(index rows, index inner, index cols, transpose ta, transpose tb,
                               T beta) {
  support::test_random random(41);
  on_device<T> a(ta == transpose::no ? support::random_matrix<T>(random, rows, inner)
                                     : support::random_matrix<T>(random, inner, rows));
  on_device<T> b(tb == transpose::no ? support::random_matrix<T>(random, inner, cols)
                                     : support::random_matrix<T>(random, cols, inner));
  matrix<T, cpu> before = support::random_matrix<T>(random, rows, cols);
  if (beta == T{0}) {
    std::fill_n(before.data(), before.size(), std::numeric_limits<T>::quiet_NaN());
  }
  on_device<T> c(before);
  const T alpha = T{-0.75f};
  context<device> ctx;
  multiply(ctx, alpha, a, ta, b, tb, beta, c);

  const auto table_of = [](const matrix<T, cpu>& m, transpose t) {
    const table all = support::to_table(m.view());
    return t == transpose::no ? all : support::transposed(all);
  };
  const table left = table_of(a.host(), ta), right = table_of(b.host(), tb);
  table expected = support::matmul(left, right);
  table bounds = support::matmul(support::absolute(left), support::absolute(right));
  for (index r = 0; r < rows; ++r) {
    for (index n = 0; n < cols; ++n) {
      const double kept =
          beta == T{0} ? 0.0 : static_cast<double>(beta) * static_cast<double>(before(r, n));
      expected(r, n) = static_cast<double>(alpha) * expected(r, n) + kept;
      // The sum, its product with alpha and the addition of beta c.
      bounds(r, n) = support::sum_bound<T>(
          inner + 2, std::abs(static_cast<double>(alpha)) * bounds(r, n) + std::abs(kept));
    }
  }
  return support::difference(c.now().view(), expected, bounds) +
         (c.intact() ? "" : "something else was written");
}

}  // namespace

TEST_SUITE("cuda/gemm") {
  TEST_CASE_TEMPLATE("gemm agrees with plain loops in double", T, TALPA_SCALARS) {
    const index many = support::device_size(129, 1003);
    for (const transpose ta : {transpose::no, transpose::yes}) {
      for (const transpose tb : {transpose::no, transpose::yes}) {
        CAPTURE(static_cast<int>(ta));
        CAPTURE(static_cast<int>(tb));
        // A tile and a part of one, narrow and wide; whole tiles; one element.
        CHECK(product_difference<T>(many, 37, 70, ta, tb, T{0}) == "");
        CHECK(product_difference<T>(67, many, 5, ta, tb, T{0.5f}) == "");
        CHECK(product_difference<T>(64, 32, 64, ta, tb, T{1}) == "");
        CHECK(product_difference<T>(1, 1, 1, ta, tb, T{0}) == "");
      }
    }
  }

  TEST_CASE_TEMPLATE("equal inputs give equal bits", T, TALPA_SCALARS) {
    support::test_random random(42);
    context<device> ctx;
    on_device<T> a(support::random_matrix<T>(random, 70, 99));
    on_device<T> b(support::random_matrix<T>(random, 99, 9));
    on_device<T> c(matrix<T, cpu>(70, 9)), again(matrix<T, cpu>(70, 9));
    multiply(ctx, T{1}, a, transpose::no, b, transpose::no, T{0}, c);
    multiply(ctx, T{1}, a, transpose::no, b, transpose::no, T{0}, again);
    CHECK(support::bit_difference(again.now(), c.now()) == "");
  }

  TEST_CASE_TEMPLATE("no terms leave beta c, and nothing to write is legal", T, TALPA_SCALARS) {
    support::test_random random(43);
    context<device> ctx;
    on_device<T> a(matrix<T, cpu>(5, 0)), b(matrix<T, cpu>(0, 7));
    matrix<T, cpu> expected = support::random_matrix<T>(random, 5, 7);
    on_device<T> c(expected);
    for (index i = 0; i < expected.size(); ++i) expected.data()[i] *= T{0.5f};
    multiply(ctx, T{1}, a, transpose::no, b, transpose::no, T{0.5f}, c);
    CHECK(support::bit_difference(c.now(), expected) == "");
    CHECK(c.intact());

    matrix<T, cpu> nan(5, 7);
    std::fill_n(nan.data(), nan.size(), std::numeric_limits<T>::quiet_NaN());
    on_device<T> forgets(nan);
    multiply(ctx, T{1}, a, transpose::no, b, transpose::no, T{0}, forgets);
    CHECK(support::bit_difference(forgets.now(), matrix<T, cpu>(5, 7)) == "");
    CHECK(forgets.intact());

    on_device<T> rows(matrix<T, cpu>(0, 3)), cols(matrix<T, cpu>(3, 7)), none(matrix<T, cpu>(0, 7));
    multiply(ctx, T{1}, rows, transpose::no, cols, transpose::no, T{0}, none);
    CHECK(none.intact());
  }
}

}  // namespace talpa::cuda_gemm_test
