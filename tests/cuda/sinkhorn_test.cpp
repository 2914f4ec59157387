// SPDX-License-Identifier: Apache-2.0
#include "support/parity.hpp"
#include "support/scalars.hpp"

#include <talpa/cpu/sinkhorn.hpp>
#include <talpa/cuda/sinkhorn.hpp>

#include <doctest/doctest.h>

#include <limits>
#include <type_traits>

namespace talpa::cuda_sinkhorn_test {
using support::device;
using support::on_device;

namespace {

template <class T>
struct scales {
  matrix<T, cpu> row, column;
};

template <class T>
scales<T> on_host(const matrix<T, cpu>& u, const vector<std::uint8_t, cpu>& real, double tolerance,
                  index iterations) {
  context<cpu> ctx(1);
  scales<T> s{matrix<T, cpu>(1, u.rows()), matrix<T, cpu>(1, u.cols())};
  ops::sinkhorn(ctx, u.view(), real.view(), tolerance, iterations,
                vector_view<T, cpu>(s.row.data(), u.rows()), s.column.view());
  return s;
}

/// NaN everywhere when something beside the scales was written.
template <class T>
scales<T> on_the_device(const matrix<T, cpu>& u, const vector<std::uint8_t, cpu>& real,
                        double tolerance, index iterations) {
  context<device> ctx;
  on_device<T> logits(u);
  on_device<T> column(matrix<T, cpu>(1, u.cols()));
  matrix<T, device> row(1, u.rows());
  const auto flags = to_device<device>(as_column(real.view()));
  ops::sinkhorn(ctx, matrix_view<const T, device>(logits.view()),
                vector_view<const std::uint8_t, device>(flags.data(), real.size()), tolerance,
                iterations, vector_view<T, device>(row.data(), u.rows()), column.view());
  ctx.synchronise();
  scales<T> s{to_host(row.view()), column.now()};
  if (!column.intact()) {
    std::fill_n(s.column.data(), s.column.size(), std::numeric_limits<T>::quiet_NaN());
  }
  return s;
}

/// Logits with what takes no part in between: infinities, NaN and padding.
template <class T>
void make_batch(index tokens, index experts, matrix<T, cpu>& u, vector<std::uint8_t, cpu>& real) {
  support::test_random random(71);
  u = support::random_matrix<T>(random, tokens, experts, 2.0);
  real = vector<std::uint8_t, cpu>(tokens);
  constexpr T infinity = std::numeric_limits<T>::infinity();
  for (index n = 0; n < tokens; ++n) {
    real[n] = n == 0 || random.below(6) != 0 ? 1 : 0;
    if (n % 9 == 4) u(n, n % experts) = infinity;
    if (n % 9 == 6) u(n, n % experts) = std::numeric_limits<T>::quiet_NaN();
    if (n % 9 == 7) u(n, n % experts) = -infinity;
    if (n % 23 == 8) std::fill_n(u.data() + n * experts, experts, -infinity);
  }
}

}  // namespace

TEST_SUITE("cuda/sinkhorn") {
  // Up to 256 tokens the same additions run in the same order.
  TEST_CASE_TEMPLATE("sinkhorn has the bits of the host", T, TALPA_SCALARS) {
    for (const index experts : {index{1}, index{33}}) {
      for (const index tokens : {index{0}, index{1}, support::device_size(45, 250)}) {
        CAPTURE(experts);
        CAPTURE(tokens);
        matrix<T, cpu> u;
        vector<std::uint8_t, cpu> real;
        make_batch<T>(tokens, experts, u, real);
        const auto expected = on_host(u, real, 1e-2, 3);
        const auto found = on_the_device(u, real, 1e-2, 3);
        CHECK(support::bit_difference(found.row, expected.row) == "");
        CHECK(support::bit_difference(found.column, expected.column) == "");
      }
    }
  }

  TEST_CASE("sinkhorn stops where the host does, and with no iteration at the start") {
    matrix<float, cpu> u;
    vector<std::uint8_t, cpu> real;
    make_batch<float>(20, 5, u, real);
    const auto few = on_the_device(u, real, 0.2, 8), expected = on_host(u, real, 0.2, 8);
    CHECK(support::bit_difference(few.column, expected.column) == "");
    CHECK(support::bit_difference(few.column, on_host(u, real, 0.0, 8).column) != "");
    const auto none = on_the_device(u, real, 0.0, 0);
    CHECK(support::bit_difference(none.column, matrix<float, cpu>(1, 5)) == "");
    CHECK(support::bit_difference(none.row, on_host(u, real, 0.0, 0).row) == "");
  }

  TEST_CASE("large logits, experts that nobody may use, and nobody who takes part") {
    matrix<float, cpu> u(3, 3);
    for (index n = 0; n < 3; ++n) u(n, 2) = -std::numeric_limits<float>::infinity();
    u(0, 0) = 1000.0f;
    u(1, 1) = 3e38f;
    u(2, 0) = -3e38f;
    const auto found = on_the_device(u, {}, 1e-4, 3), expected = on_host(u, {}, 1e-4, 3);
    CHECK(support::bit_difference(found.row, expected.row) == "");
    CHECK(support::bit_difference(found.column, expected.column) == "");
    for (index n = 0; n < 3; ++n) u(n, 1) = std::numeric_limits<float>::quiet_NaN();
    const auto nobody = on_the_device(u, {}, 0.0, 2);
    CHECK(support::bit_difference(nobody.row, matrix<float, cpu>(1, 3)) == "");
    CHECK(support::bit_difference(nobody.column, matrix<float, cpu>(1, 3)) == "");
  }

  // More than 2^18 logits: each iteration is a launch of its own.
  TEST_CASE("sinkhorn of many tokens") {
    const index experts = 1024, tokens = support::device_size(260, 5003);
    matrix<float, cpu> u;
    vector<std::uint8_t, cpu> real;
    make_batch<float>(tokens, experts, u, real);
    // Errors of log-sum-exp do not grow, those of the steps add up: in each, two sums of E and N
    // terms, and exponents below 2 * 8 + |c| + log N < 32 in size.
    const index most = 6;
    const double bound = support::rounding_bound<float>(
        static_cast<double>(most * (experts + tokens + 2 * 32 + 16)), 1.0);
    const auto compare = [&](double tolerance, index iterations) {
      const auto expected = on_host(support::in_double(u), real, tolerance, iterations);
      const auto found = on_the_device(u, real, tolerance, iterations);
      CHECK(support::difference(found.column.view(), support::to_table(expected.column.view()),
                                bound) == "");
      CHECK(support::difference(found.row.view(), support::to_table(expected.row.view()), bound) ==
            "");
      return found;
    };
    const auto all = compare(0.0, 3);
    // The first change is far above this tolerance, the second below it.
    const auto stopped = compare(0.5, most);
    CHECK(support::bit_difference(stopped.column, all.column) != "");
  }
}

}  // namespace talpa::cuda_sinkhorn_test
