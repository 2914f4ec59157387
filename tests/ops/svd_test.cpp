// SPDX-License-Identifier: Apache-2.0
#include "support/padded.hpp"
#include "support/random.hpp"
#include "support/scalars.hpp"
#include "support/tolerance.hpp"

#include <talpa/cpu/svd.hpp>
#include <talpa/testing/bounds.hpp>

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

namespace talpa::svd_test {

namespace {

template <class T>
struct decomposed {
  support::padded<T> u, s, v;

  decomposed(const matrix<T, cpu>& w, int threads)
      : u(std::min(w.rows(), w.cols()), w.rows()),
        s(1, std::min(w.rows(), w.cols())),
        v(std::min(w.rows(), w.cols()), w.cols()) {
    context<cpu> ctx(threads);
    ops::svd(ctx, w, u.view(), s.view(), v.view());
    CHECK(u.intact());
    CHECK(s.intact());
    CHECK(v.intact());
    CHECK(ctx.scratch.used() == 0);
  }
};

/// Everything that the contract promises of W = sum_k s_k u_k v_k^T.
template <class T>
void check_svd(const matrix<T, cpu>& w, index zeros = 0) {
  decomposed<T> d(w, 1);
  const auto u = d.u.view(), s = d.s.view(), v = d.v.view();
  const index rank = s.cols;
  double norm = 0.0;
  for (index i = 0; i < w.size(); ++i) norm += double(w.data()[i]) * double(w.data()[i]);
  norm = std::sqrt(norm);
  // At most fifteen sweeps, in each of which a row is turned once by every other, with four
  // roundings in double; then each result is rounded to T.
  const double turned = testing::gamma<double>(60.0 * static_cast<double>(rank) + 8.0);
  const double relative = turned + testing::gamma<T>(4.0);
  for (index o = 0; o < w.rows(); ++o) {
    for (index i = 0; i < w.cols(); ++i) {
      double sum = 0.0;
      for (index k = 0; k < rank; ++k) sum += double(s(0, k)) * double(u(k, o)) * double(v(k, i));
      CHECK(std::abs(sum - double(w(o, i))) <= relative * norm);
    }
  }
  const auto orthonormal = [&](matrix_view<T, cpu> rows, index count) {
    for (index a = 0; a < count; ++a) {
      for (index b = 0; b <= a; ++b) {
        double sum = 0.0;
        for (index i = 0; i < rows.cols; ++i) sum += double(rows(a, i)) * double(rows(b, i));
        // The roundings to T of both vectors, each of length one.
        CHECK(std::abs(sum - (a == b ? 1.0 : 0.0)) <=
              2.0 * turned * std::sqrt(static_cast<double>(rows.cols)) + testing::gamma<T>(4.0));
      }
    }
  };
  orthonormal(u, w.rows() <= w.cols() ? rank : rank - zeros);
  orthonormal(v, w.rows() <= w.cols() ? rank - zeros : rank);
  for (index k = 0; k < rank; ++k) {
    CHECK(s(0, k) >= T{0});
    if (k > 0) CHECK(s(0, k) <= s(0, k - 1));
    index first = 0;
    for (index o = 1; o < u.cols; ++o) {
      if (std::abs(u(k, o)) > std::abs(u(k, first))) first = o;
    }
    CHECK(u(k, first) >= T{0});
  }
  for (const int threads : {2, 3}) {
    decomposed<T> again(w, threads);
    CHECK(support::same_bits(again.u.view(), u));
    CHECK(support::same_bits(again.s.view(), s));
    CHECK(support::same_bits(again.v.view(), v));
  }
}

}  // namespace

TEST_SUITE("ops/svd") {
  TEST_CASE_TEMPLATE("a weight is the sum of its singular triplets", T, TALPA_SCALARS) {
    support::test_random random(8);
    for (const auto& shape :
         {std::pair<index, index>{1, 1}, {1, 5}, {5, 1}, {4, 4}, {7, 12}, {12, 7}, {33, 20}}) {
      CAPTURE(shape.first);
      CAPTURE(shape.second);
      check_svd(support::random_matrix<T>(random, shape.first, shape.second));
    }
  }

  TEST_CASE("a weight by hand") {
    // [[0, -3], [2, 0]] = 3 e_1 (-e_2)^T + 2 e_2 e_1^T.
    matrix<float, cpu> w(2, 2);
    w(0, 1) = -3.0f;
    w(1, 0) = 2.0f;
    decomposed<float> d(w, 1);
    CHECK(d.s.view()(0, 0) == 3.0f);
    CHECK(d.s.view()(0, 1) == 2.0f);
    CHECK(d.u.view()(0, 0) == 1.0f);
    CHECK(d.v.view()(0, 1) == -1.0f);
    CHECK(d.u.view()(1, 1) == 1.0f);
    CHECK(d.v.view()(1, 0) == 1.0f);
  }

  TEST_CASE("equal and vanishing singular values") {
    matrix<double, cpu> eye(6, 6), zero(3, 5), low(5, 8);
    for (index i = 0; i < 6; ++i) eye(i, i) = -2.0;
    check_svd(eye);
    check_svd(zero, 3);
    // Rank 1 of exact numbers: rows that are multiples of one by powers of two.
    for (index o = 0; o < 5; ++o) {
      for (index i = 0; i < 8; ++i) low(o, i) = std::ldexp(static_cast<double>(i + 1), int(o) - 2);
    }
    decomposed<double> d(low, 1);
    CHECK(d.s.view()(0, 1) <= testing::gamma<double>(300.0) * d.s.view()(0, 0));
    CHECK(std::abs(d.s.view()(0, 0) - std::sqrt(204.0 * (341.0 / 16.0))) <=
          testing::gamma<double>(300.0) * d.s.view()(0, 0));
  }

  TEST_CASE("nothing, and what is not finite") {
    context<cpu> ctx(1);
    matrix<double, cpu> none(0, 3), u(0, 0), s(1, 0), v(0, 3);
    ops::svd(ctx, none, u.view(), s.view(), v.view());
    matrix<double, cpu> w(2, 2), left(2, 2), values(1, 2), right(2, 2);
    w(0, 0) = std::numeric_limits<double>::quiet_NaN();
    w(1, 1) = 1.0;
    ops::svd(ctx, w, left.view(), values.view(), right.view());
    for (index i = 0; i < 2; ++i) {
      CHECK(std::isnan(values(0, i)));
      CHECK(std::isnan(left(1, i)));
      CHECK(std::isnan(right(1, i)));
    }
    CHECK_THROWS_WITH_AS(ops::svd(ctx, w, left.view(), s.view(), right.view()),
                         "talpa::ops::svd: 's' has shape [1, 0], expected [1, 2] = singular values",
                         shape_error);
  }
}

}  // namespace talpa::svd_test
