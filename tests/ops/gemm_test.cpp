// SPDX-License-Identifier: Apache-2.0
#include "support/cpu_products.hpp"
#include "support/padded.hpp"
#include "support/random.hpp"
#include "support/scalars.hpp"
#include "support/tolerance.hpp"

#include <talpa/ops/gemm.hpp>
#include <talpa/testing/bounds.hpp>

#include <doctest/doctest.h>

#include <algorithm>
#include <cstddef>
#include <limits>
#include <vector>

namespace talpa::gemm_test {

namespace {

using support::table;

/// alpha op(a) op(b) + beta c by plain loops, and the sum of absolute terms of each element.
struct slow_product {
  table value, magnitude;
};
slow_product slow_gemm(double alpha, const table& a, transpose ta, const table& b, transpose tb,
                       double beta, const table& c) {
  const table left = ta == transpose::no ? a : support::transposed(a);
  const table right = tb == transpose::no ? b : support::transposed(b);
  slow_product p{support::matmul(left, right),
                 support::matmul(support::absolute(left), support::absolute(right))};
  for (std::size_t i = 0; i < p.value.values.size(); ++i) {
    const double before = beta == 0.0 ? 0.0 : beta * c.values[i];
    p.value.values[i] = alpha * p.value.values[i] + before;
    p.magnitude.values[i] = std::abs(alpha) * p.magnitude.values[i] + std::abs(before);
  }
  return p;
}
/// A sum of inner products, the factors alpha and beta, and the addition of the two.
template <class T>
table bounds(const slow_product& p, index inner) {
  return support::each(p.magnitude, [&](double m) { return support::sum_bound<T>(inner + 3, m); });
}

constexpr transpose both[] = {transpose::no, transpose::yes};

/// [rows, cols], or [cols, rows] to be read transposed.
template <class T>
support::padded<T> operand(support::test_random& random, index rows, index cols, transpose t) {
  return support::padded<T>(t == transpose::no ? support::random_matrix<T>(random, rows, cols)
                                               : support::random_matrix<T>(random, cols, rows));
}

template <class T>
void compare(index m, index n, index k, T alpha, T beta, std::uint64_t seed, int threads) {
  CAPTURE(m);
  CAPTURE(n);
  CAPTURE(k);
  support::test_random random(seed);
  context<cpu> ctx(threads);
  for (const transpose ta : both) {
    for (const transpose tb : both) {
      auto a = operand<T>(random, m, k, ta), b = operand<T>(random, k, n, tb);
      support::padded<T> c(support::random_matrix<T>(random, m, n));
      const auto expected = slow_gemm(static_cast<double>(alpha), support::to_table(a.view()), ta,
                                      support::to_table(b.view()), tb, static_cast<double>(beta),
                                      support::to_table(c.view()));
      ops::gemm(ctx, alpha, a.view(), ta, b.view(), tb, beta, c.view());
      if (expected.value.size() > 1) {
        CHECK(support::difference(c.view(), expected.value, bounds<T>(expected, k)) == "");
      } else if (expected.value.size() == 1) {
        CHECK(support::within(static_cast<double>(c.view()(0, 0)), expected.value(0, 0),
                              bounds<T>(expected, k)(0, 0)));
      }
      CHECK(a.intact());
      CHECK(b.intact());
      CHECK(c.intact());
    }
  }
}

}  // namespace

TEST_SUITE("ops/gemm") {
  TEST_CASE("a product of two matrices, by hand, in all four orders") {
    context<cpu> ctx(1);
    // a = [[1, 2], [3, 4]], b = [[5, 6], [7, 8]].
    matrix<float, cpu> a(2, 2), b(2, 2), c(2, 2);
    for (index i = 0; i < 4; ++i) {
      a.data()[i] = static_cast<float>(1 + i);
      b.data()[i] = static_cast<float>(5 + i);
    }
    const auto is = [&](float c00, float c01, float c10, float c11) {
      return c(0, 0) == c00 && c(0, 1) == c01 && c(1, 0) == c10 && c(1, 1) == c11;
    };
    ops::gemm(ctx, a, transpose::no, b, transpose::no, 0.0f, c.view());
    CHECK(is(19, 22, 43, 50));
    ops::gemm(ctx, a, transpose::yes, b, transpose::no, 0.0f, c.view());
    CHECK(is(26, 30, 38, 44));
    ops::gemm(ctx, a, transpose::no, b, transpose::yes, 0.0f, c.view());
    CHECK(is(17, 23, 39, 53));
    ops::gemm(ctx, a, transpose::yes, b, transpose::yes, 0.0f, c.view());
    CHECK(is(23, 31, 34, 46));
    ops::gemm(ctx, 2.0f, a, transpose::no, b, transpose::no, -1.0f, c.view());
    CHECK(is(15, 13, 52, 54));
  }

  TEST_CASE_TEMPLATE("gemm agrees with plain loops over random strided shapes", T, TALPA_SCALARS) {
    support::test_random random(21);
    for (int i = 0; i < 60; ++i) {
      const index m = 1 + random.below(40), n = 1 + random.below(40), k = 1 + random.below(60);
      const T alpha = static_cast<T>(random.uniform(-2.0, 2.0));
      const T betas[] = {T{0}, T{1}, static_cast<T>(random.uniform(-2.0, 2.0))};
      compare<T>(m, n, k, i % 4 == 0 ? T{1} : alpha, betas[i % 3], random.bits(), 1 + i % 3);
    }
  }

  TEST_CASE_TEMPLATE("gemm agrees with plain loops where work is cut into tasks", T,
                     TALPA_SCALARS) {
    const index rows = detail::gemm_task_rows, cols = detail::gemm_task_cols;
    compare<T>(2 * rows + 3, 5, 7, T{1}, T{1}, 1, 3);
    compare<T>(2 * rows, 3, 4, T{1}, T{0}, 2, 2);
    compare<T>(2 * rows - 1, 9, 3, T{1}, T{0}, 3, 2);
    compare<T>(4, cols + 5, 6, T{1}, T{1}, 4, 3);
    compare<T>(3, cols, 2, T{1}, T{0}, 5, 3);
    compare<T>(1, 2 * cols + 1, 300, T{1}, T{0}, 6, 2);
    compare<T>(2, 2, 3000, T{1}, T{1}, 7, 2);
  }

  TEST_CASE_TEMPLATE("gemm agrees with plain loops where register tiles take over", T,
                     TALPA_SCALARS) {
    const index rows = detail::tiled_rows, cols = detail::tiled_cols;
    const index inner = ceil_div(detail::tiled_work, rows * cols);
    CHECK(detail::tiles_pay(rows, cols, inner));
    compare<T>(rows, cols, inner, T{1}, T{0}, 8, 2);
    for (const index less : {inner - 1, detail::tiled_inner - 1}) {
      CHECK_FALSE(detail::tiles_pay(rows, cols, less));
    }
    compare<T>(rows, cols, inner - 1, T{2}, T{1}, 9, 2);
    compare<T>(5 * rows + 3, 5 * cols + 7, detail::tiled_inner + 30, T{-1}, T{2}, 10, 3);
    CHECK_FALSE(detail::tiles_pay(rows - 1, 100 * cols, inner));
    CHECK_FALSE(detail::tiles_pay(100 * rows, cols - 1, inner));
  }

  TEST_CASE_TEMPLATE("gemm agrees with plain loops where one side is short", T, TALPA_SCALARS) {
    const index least = detail::skinny_least, most = detail::skinny_most;
    const index length = detail::skinny_length, few = detail::inner_rows;
    const index many = detail::outer_rows;
    for (const index side : {least, index{7}, most}) {
      CHECK(detail::inner_pays(few, side, length));
      compare<T>(few, side, length, T{1}, T{0}, 11, 2);
      compare<T>(133, side, length + 9, T{2}, T{-1}, 12, 3);
      CHECK(detail::outer_pays(side, length, many));
      compare<T>(side, length, many, T{1}, T{1}, 13, 2);
      compare<T>(side, 5 * length + 3, many + 1, T{-1}, T{0.5}, 14, 3);
    }
    // Several chunks of columns.
    compare<T>(most, detail::outer_sum_bytes / most / static_cast<index>(sizeof(T)) + 21, many,
               T{1}, T{0}, 15, 2);
    CHECK_FALSE(detail::inner_pays(few - 1, most, length));
    CHECK_FALSE(detail::inner_pays(few, most + 1, length));
    CHECK_FALSE(detail::inner_pays(few, least - 1, length));
    CHECK_FALSE(detail::inner_pays(few, most, length - 1));
    CHECK_FALSE(detail::outer_pays(most + 1, length, many));
    CHECK_FALSE(detail::outer_pays(least - 1, length, many));
    CHECK_FALSE(detail::outer_pays(most, length - 1, many));
    CHECK_FALSE(detail::outer_pays(most, length, many - 1));
  }

  TEST_CASE_TEMPLATE("any number of threads gives the same bits", T, TALPA_SCALARS) {
    support::test_random random(22);
    struct shape {
      index m, n, k;
    };
    for (const shape s : {shape{700, 33, 17}, shape{5, 1200, 64}, shape{513, 1, 100},
                          shape{333, 90, 70}, shape{150, 8, 90}, shape{8, 1100, 300}}) {
      for (const transpose ta : both) {
        for (const transpose tb : both) {
          auto a = operand<T>(random, s.m, s.k, ta), b = operand<T>(random, s.k, s.n, tb);
          const matrix<T, cpu> start = support::random_matrix<T>(random, s.m, s.n);
          matrix<T, cpu> one = start;
          context<cpu> serial(1);
          ops::gemm(serial, a.view(), ta, b.view(), tb, T{1}, one.view());
          for (const int threads : {2, 3}) {
            matrix<T, cpu> many = start;
            context<cpu> ctx(threads);
            ops::gemm(ctx, a.view(), ta, b.view(), tb, T{1}, many.view());
            CHECK(testing::first_difference(many, one) == "");
          }
        }
      }
    }
  }

  TEST_CASE_TEMPLATE("the address of a matrix changes no bit", T, TALPA_SCALARS) {
    support::test_random random(23);
    struct shape {
      index m, n, k;
    };
    for (const shape s : {shape{1, 1, 37}, shape{1, 19, 23}, shape{21, 1, 45}, shape{2, 2, 3},
                          shape{12, 31, 29}, shape{64, 48, 80}}) {
      const matrix<T, cpu> a = support::random_matrix<T>(random, s.m, s.k);
      const matrix<T, cpu> b = support::random_matrix<T>(random, s.k, s.n);
      const matrix<T, cpu> bt = support::random_matrix<T>(random, s.n, s.k);
      for (const transpose tb : both) {
        const matrix<T, cpu>& right = tb == transpose::no ? b : bt;
        context<cpu> ctx(1);
        matrix<T, cpu> aligned(s.m, s.n);
        ops::gemm(ctx, a, transpose::no, right, tb, T{0}, aligned.view());
        for (const index offset : {1, 2, 3, 5}) {
          const auto moved = [&](const matrix<T, cpu>& from, std::vector<T>& storage) {
            storage.assign(static_cast<std::size_t>(from.size() + offset), T{0});
            std::copy_n(from.data(), from.size(), storage.data() + offset);
            return matrix_view<T, cpu>(storage.data() + offset, from.rows(), from.cols());
          };
          std::vector<T> sa, sb, sc;
          const auto c = moved(matrix<T, cpu>(s.m, s.n), sc);
          ops::gemm(ctx, moved(a, sa), transpose::no, moved(right, sb), tb, T{0}, c);
          CHECK(testing::first_difference<T>(c, aligned.view()) == "");
        }
      }
    }
  }

  TEST_CASE("beta 0 forgets what c held, NaN included") {
    context<cpu> ctx(1);
    matrix<double, cpu> a(2, 3), b(3, 4), c(2, 4);
    for (index i = 0; i < c.size(); ++i) c.data()[i] = std::numeric_limits<double>::quiet_NaN();
    ops::gemm(ctx, a, transpose::no, b, transpose::no, 0.0, c.view());
    for (index i = 0; i < c.size(); ++i) CHECK(c.data()[i] == 0.0);
  }

  TEST_CASE("an inner size of zero leaves beta c, and empty results are legal") {
    context<cpu> ctx(2);
    matrix<float, cpu> a(2, 0), b(0, 3), c(2, 3);
    for (index i = 0; i < c.size(); ++i) c.data()[i] = 3.0f;
    ops::gemm(ctx, a, transpose::no, b, transpose::no, 1.0f, c.view());
    for (index i = 0; i < c.size(); ++i) CHECK(c.data()[i] == 3.0f);
    ops::gemm(ctx, a, transpose::no, b, transpose::no, 0.5f, c.view());
    for (index i = 0; i < c.size(); ++i) CHECK(c.data()[i] == 1.5f);
    ops::gemm(ctx, a, transpose::no, b, transpose::no, 0.0f, c.view());
    for (index i = 0; i < c.size(); ++i) CHECK(c.data()[i] == 0.0f);
    matrix<float, cpu> none(0, 5), right(5, 3), result(0, 3), narrow(5, 0), thin(4, 0), left(4, 5);
    CHECK_NOTHROW(ops::gemm(ctx, none, transpose::no, right, transpose::no, 0.0f, result.view()));
    CHECK_NOTHROW(ops::gemm(ctx, left, transpose::no, narrow, transpose::no, 0.0f, thin.view()));
  }

  TEST_CASE("shapes that do not fit are refused with both of them") {
    context<cpu> ctx(1);
    const matrix<float, cpu> a(2, 3), b(4, 5);
    matrix<float, cpu> c(2, 5);
    CHECK_THROWS_WITH_AS(
        ops::gemm(ctx, a, transpose::no, b, transpose::no, 0.0f, c.view()),
        "talpa::ops::gemm: 'b' has shape [4, 5], expected [3, ...] = inner size of a", shape_error);
    CHECK_THROWS_WITH_AS(
        ops::gemm(ctx, a, transpose::yes, b, transpose::yes, 0.0f, c.view()),
        "talpa::ops::gemm: 'b' has shape [4, 5], expected [..., 2] = inner size of a", shape_error);
    const matrix<float, cpu> right(3, 5);
    matrix<float, cpu> wrong(5, 2);
    CHECK_THROWS_WITH_AS(
        ops::gemm(ctx, a, transpose::no, right, transpose::no, 0.0f, wrong.view()),
        "talpa::ops::gemm: 'c' has shape [5, 2], expected [2, 5] = rows of op(a), columns of op(b)",
        shape_error);
  }
}

}  // namespace talpa::gemm_test
