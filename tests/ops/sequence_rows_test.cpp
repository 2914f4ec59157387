// SPDX-License-Identifier: Apache-2.0
#include "support/padded.hpp"
#include "support/random.hpp"
#include "support/scalars.hpp"
#include "support/tolerance.hpp"

#include <talpa/cpu/sequence_rows.hpp>
#include <talpa/testing/gradient_check.hpp>

#include <doctest/doctest.h>

#include <cmath>
#include <limits>

namespace talpa::sequence_rows_test {

TEST_SUITE("ops/sequence_rows") {
  TEST_CASE_TEMPLATE("rows are repeated and added up", T, TALPA_SCALARS) {
    support::test_random random(3);
    for (const index length : {1, 2, 33}) {
      const index sequences = 40, cols = 37;
      const auto x = support::random_matrix<T>(random, sequences, cols);
      const auto dy = support::random_matrix<T>(random, sequences * length, cols);
      support::table sum(sequences, cols), bounds(sequences, cols);
      for (index n = 0; n < dy.rows(); ++n) {
        for (index d = 0; d < cols; ++d) {
          sum(n / length, d) += double(dy(n, d));
          bounds(n / length, d) += std::abs(double(dy(n, d)));
        }
      }
      bounds = support::each(bounds, [&](double v) { return support::sum_bound<T>(length, v); });
      for (const int threads : {1, 3}) {
        context<cpu> ctx(threads);
        support::padded<T> y(sequences * length, cols), dx(sequences, cols);
        ops::repeat_rows(ctx, x, y.view());
        CHECK(y.intact());
        for (index n = 0; n < dy.rows(); ++n) {
          CHECK(support::same_bits(y.view().row_range(n, 1), x.view().row_range(n / length, 1)));
        }
        ops::sum_rows(ctx, dy, dx.view());
        CHECK(dx.intact());
        CHECK(support::difference(dx.view(), sum, bounds) == "");
      }
    }
  }

  TEST_CASE("rows of a table are looked up, gradients go to the part that trains") {
    context<cpu> ctx(1);
    matrix<double, cpu> table(4, 2), y(3, 2), dtable(2, 2);
    for (index i = 0; i < 8; ++i) table.data()[i] = static_cast<double>(i);
    vector<std::int32_t, cpu> labels(3);
    labels[0] = 3;
    labels[1] = 1;
    labels[2] = 3;
    ops::lookup_rows(ctx, "test", labels.view(), table, y.view());
    CHECK(y(0, 1) == 7.0);
    CHECK(y(1, 0) == 2.0);
    CHECK(y(2, 0) == 6.0);
    ops::lookup_rows_backward(ctx, labels.view(), y, 2, dtable.view());
    CHECK(dtable(0, 0) == 0.0);
    CHECK(dtable(1, 0) == 12.0);
    CHECK(dtable(1, 1) == 14.0);
  }

  TEST_CASE("attention equals plain loops; absent rows are not read") {
    support::test_random random(8);
    for (int trial = 0; trial < 100; ++trial) {
      const index s = 1 + random.below(9), l = 1 + random.below(9), c = 1 + random.below(20);
      const auto q = support::random_matrix<double>(random, s, c);
      auto h = support::random_matrix<double>(random, s * l, c);
      vector<std::uint8_t, cpu> present(s * l);
      for (index i = 0; i < s * l; ++i) {
        present[i] = random.below(3) != 0 ? 1 : 0;
        if (present[i] == 0) h(i, 0) = std::numeric_limits<double>::quiet_NaN();
      }
      matrix<double, cpu> a(s, l), u(s, c);
      context<cpu> ctx(2);
      ops::attend_rows(ctx, 0.5, q, h, present.view(), a.view(), u.view());
      for (index i = 0; i < s; ++i) {
        std::vector<double> weight(static_cast<std::size_t>(l)), mean(static_cast<std::size_t>(c));
        double sum = 0.0, size = 1.0, most = 1.0;
        for (index j = 0; j < l; ++j) {
          if (present[i * l + j] == 0) continue;
          double score = 0.0;
          for (index d = 0; d < c; ++d) {
            score += 0.5 * q(i, d) * h(i * l + j, d);
            size += std::abs(q(i, d) * h(i * l + j, d));
            most = std::max(most, std::abs(h(i * l + j, d)));
          }
          weight[static_cast<std::size_t>(j)] = std::exp(score);
          sum += weight[static_cast<std::size_t>(j)];
        }
        // Scores of size at most `size` with c + 2 roundings each, in an exponent; sums of l terms.
        const double bound = support::rounding_bound<double>(
            (double(c) + 4.0) * size + 2.0 * double(l) + 16.0, most);
        for (index j = 0; j < l; ++j) {
          const double p = sum > 0.0 ? weight[static_cast<std::size_t>(j)] / sum : 0.0;
          CHECK(support::within(a(i, j), p, bound));
          if (present[i * l + j] == 0) CHECK(a(i, j) == 0.0);
        }
        for (index d = 0; d < c; ++d) {
          double expected = 0.0;
          for (index j = 0; j < l && sum > 0.0; ++j) {
            if (present[i * l + j] == 0) continue;
            expected += weight[static_cast<std::size_t>(j)] / sum * h(i * l + j, d);
          }
          CHECK(support::within(u(i, d), expected, bound));
        }
      }
    }
  }

  TEST_CASE("gradients of attention equal differences") {
    support::test_random random(4);
    matrix<double, cpu> q = support::random_matrix<double>(random, 3, 4);
    matrix<double, cpu> h = support::random_matrix<double>(random, 15, 4);
    matrix<double, cpu> a(3, 5), u(3, 4), dq(3, 4), dh(15, 4);
    const auto du = testing::cotangent(3, 4, 2);
    context<cpu> ctx(1);
    ops::attend_rows(ctx, 0.5, q, h, {}, a.view(), u.view());
    ops::attend_rows_backward(ctx, 0.5, q, h, a, du, dq.view(), grad_mode::overwrite, dh.view());
    // Values below 4, exponents below 0.5 * 4 * 16.
    const auto found = testing::gradient_check(
        "attend_rows", {{"q", q.view(), dq.view()}, {"h", h.view(), dh.view()}}, du,
        {.roundings = 4.0 + 5.0 + 64.0, .magnitude = 12.0 * 4.0},
        [&] {
          ops::attend_rows(ctx, 0.5, q, h, {}, a.view(), u.view());
          return u.view();
        },
        [] { return 0; });
    CHECK_MESSAGE(found.passed(), found.text());
  }

  TEST_CASE("large scores saturate and nothing to attend to gives zero") {
    context<cpu> ctx(1);
    matrix<float, cpu> q(1, 1), h(2, 1), a(1, 2), u(1, 1), none(0, 1), flat(1, 0);
    q(0, 0) = 1e20f;
    h(0, 0) = 1.0f;
    h(1, 0) = 2.0f;
    ops::attend_rows(ctx, 1.0f, q, h, {}, a.view(), u.view());
    CHECK(u(0, 0) == 2.0f);
    ops::attend_rows(ctx, 1.0f, q, none, {}, flat.view(), u.view());
    CHECK(u(0, 0) == 0.0f);
    vector<std::uint8_t, cpu> absent(2);
    u(0, 0) = 1.0f;
    ops::attend_rows(ctx, 1.0f, q, h, absent.view(), a.view(), u.view());
    CHECK(u(0, 0) == 0.0f);
    CHECK(a(0, 0) == 0.0f);
    ops::attend_rows_backward(ctx, 1.0f, q, h, a, q, u.view(), grad_mode::overwrite, h.view());
    CHECK(u(0, 0) == 0.0f);
    CHECK(h(1, 0) == 2.0f);
  }

  TEST_CASE("what does not fit is named") {
    context<cpu> ctx(1);
    matrix<float, cpu> x(2, 3), y(5, 3), table(4, 3);
    vector<std::int32_t, cpu> labels(2);
    labels[1] = 4;
    CHECK_THROWS_WITH_AS(ops::repeat_rows(ctx, x, y.view()),
                         "talpa::ops::repeat_rows: 'y' has shape [5, 3], expected [4, 3] = a "
                         "multiple of the rows of x, columns of x",
                         shape_error);
    CHECK_THROWS_AS(ops::sum_rows(ctx, y, x.view()), shape_error);
    CHECK_THROWS_WITH_AS(ops::lookup_rows(ctx, "test", labels.view(), table, x.view()),
                         "talpa::test: 'labels' is 4 at 1, expected 0..3 = rows of the table",
                         value_error);
    CHECK_THROWS_AS(ops::lookup_rows(ctx, "test", labels.view(), table, y.view()), shape_error);
    matrix<float, cpu> a(2, 3), h(5, 3);
    CHECK_THROWS_WITH_AS(ops::attend_rows(ctx, 1.0f, x, h, {}, a.view(), x.view()),
                         "talpa::ops::attend_rows: 'h' has shape [5, 3], expected [6, 3] = rows of "
                         "a sequence, width of q",
                         shape_error);
    CHECK_THROWS_AS(
        ops::attend_rows_backward(ctx, 1.0f, x, h, a, x, x.view(), grad_mode::overwrite, {}),
        shape_error);
  }
}

}  // namespace talpa::sequence_rows_test
