// SPDX-License-Identifier: Apache-2.0
#include "support/parity.hpp"
#include "support/scalars.hpp"

#include <talpa/cpu/sequence_rows.hpp>
#include <talpa/cuda/sequence_rows.hpp>

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace talpa::cuda_sequence_rows_test {
using support::device;
using support::each;
using support::in_double;
using support::on_device;
using support::rounding_bound;
using support::table;
using support::to_table;

namespace {

template <class T>
vector<T, device> vector_on_device(const vector<T, cpu>& host) {
  vector<T, device> there(host.size());
  to_device<T, device>(as_column(host.view()), as_column(there.view()));
  return there;
}

vector<std::int32_t, cpu> labels_of(const std::vector<std::int32_t>& values) {
  vector<std::int32_t, cpu> labels(static_cast<index>(values.size()));
  for (index s = 0; s < labels.size(); ++s) labels[s] = values[static_cast<std::size_t>(s)];
  return labels;
}

/// |scale| sum_d |x(i, d) h(j, d)|.
template <class T>
double product_size(double scale, const matrix<T, cpu>& x, index i, const matrix<T, cpu>& h,
                    index j) {
  double size = 0.0;
  for (index d = 0; d < x.cols(); ++d) {
    size += std::abs(scale * static_cast<double>(x(i, d)) * static_cast<double>(h(j, d)));
  }
  return size;
}

/// Bounds on the gradients of attention from given weights: with R_sj >= |r_sj| and M_s = sum_j
/// a_sj R_sj, t_sj is a sum of products of size a_sj (R_sj + M_s) with C + L + 5 roundings.
template <class T>
struct attention_bounds {
  table dq, dh;

  attention_bounds(double scale, const matrix<T, cpu>& q, const matrix<T, cpu>& h,
                   const matrix<T, cpu>& a, const matrix<T, cpu>& du)
      : dq(q.rows(), q.cols()), dh(h.rows(), h.cols()) {
    const index length = a.cols(), cols = q.cols();
    const double roundings = static_cast<double>(cols + 2 * length) + 9.0;
    for (index s = 0; s < q.rows(); ++s) {
      double mean = 0.0;
      for (index j = 0; j < length; ++j) {
        const double weight = static_cast<double>(a(s, j));
        if (weight != 0.0) mean += weight * product_size(1.0, du, s, h, s * length + j);
      }
      for (index j = 0; j < length; ++j) {
        const index row = s * length + j;
        const double weight = static_cast<double>(a(s, j));
        if (weight == 0.0) continue;
        const double slope = scale * weight * (product_size(1.0, du, s, h, row) + mean);
        for (index d = 0; d < cols; ++d) {
          dq(s, d) += rounding_bound<T>(roundings, slope * static_cast<double>(h(row, d)));
          dh(row, d) =
              rounding_bound<T>(roundings, std::abs(weight * static_cast<double>(du(s, d))) +
                                               std::abs(slope * static_cast<double>(q(s, d))));
        }
      }
    }
  }
};

}  // namespace

TEST_SUITE("cuda/sequence_rows") {
  // Copies, and additions in the same order: the same bits as the host.
  TEST_CASE_TEMPLATE("rows are repeated, added up and looked up as on the host", T, TALPA_SCALARS) {
    context<device> ctx;
    context<cpu> host(1);
    support::test_random random(3);
    for (const index sequences : {index{0}, index{1}, support::device_size(43, 1001)}) {
      for (const index length : {index{0}, index{1}, index{3}}) {
        constexpr index cols = 37, labels = 5, first = 2;
        CAPTURE(sequences);
        CAPTURE(length);
        on_device<T> x(support::random_matrix<T>(random, sequences, cols));
        on_device<T> dy(support::random_matrix<T>(random, sequences * length, cols));
        on_device<T> y(dy.host()), dx(x.host()), rows(x.host());
        on_device<T> values(support::random_matrix<T>(random, labels, cols));
        on_device<T> dtable(support::random_matrix<T>(random, 2, cols));
        vector<std::int32_t, cpu> chosen(sequences);
        for (index s = 0; s < sequences; ++s) {
          chosen[s] = static_cast<std::int32_t>(random.below(labels));
        }
        const vector<std::int32_t, device> there = vector_on_device(chosen);
        matrix<T, cpu> repeated(sequences * length, cols), sums(sequences, cols),
            taken(sequences, cols), gradient = dtable.host();
        ops::repeat_rows(host, x.host(), repeated.view());
        ops::sum_rows(host, dy.host(), sums.view());
        ops::lookup_rows(host, "test", chosen.view(), values.host(), taken.view());
        ops::lookup_rows_backward(host, chosen.view(), x.host(), first, gradient.view());
        ops::repeat_rows(ctx, x.view(), y.view());
        ops::sum_rows(ctx, dy.view(), dx.view());
        ops::lookup_rows(ctx, "test", there.view(), values.view(), rows.view());
        ops::lookup_rows_backward(ctx, there.view(), x.view(), first, dtable.view());
        ctx.synchronise();
        CHECK(support::bit_difference(y.now(), repeated) == "");
        CHECK(support::bit_difference(dx.now(), sums) == "");
        CHECK(support::bit_difference(rows.now(), taken) == "");
        CHECK(support::bit_difference(dtable.now(), gradient) == "");
        CHECK(y.intact());
        CHECK(dx.intact());
        CHECK(rows.intact());
        CHECK(dtable.intact());
      }
    }
  }

  TEST_CASE("a label outside the table is named in a checked context, else its row is NaN") {
    context<device> ctx;
    matrix<float, cpu> sevens(2, 2);
    for (index i = 0; i < 4; ++i) sevens.data()[i] = 7.0f;
    on_device<float> values(sevens), y(matrix<float, cpu>(3, 2));
    const auto labels = vector_on_device(labels_of({1, 2, -1}));
    ops::lookup_rows(ctx, "test", labels.view(), values.view(), y.view());
    ctx.synchronise();
    CHECK(y.now()(0, 1) == 7.0f);
    CHECK(std::isnan(y.now()(1, 0)));
    CHECK(std::isnan(y.now()(2, 1)));
    ctx.checked = true;
    CHECK_THROWS_WITH_AS(ops::lookup_rows(ctx, "test", labels.view(), values.view(), y.view()),
                         "talpa::test: 'labels' is 2 at 1, expected 0..1 = rows of the table",
                         value_error);
    const auto good = vector_on_device(labels_of({1, 0, 1}));
    ops::lookup_rows(ctx, "test", good.view(), values.view(), y.view());
    ctx.synchronise();
    CHECK(y.now()(2, 1) == 7.0f);
  }

  TEST_CASE_TEMPLATE("attention and its gradients agree with those in double", T, TALPA_SCALARS) {
    context<device> ctx;
    context<cpu> host(1);
    support::test_random random(8);
    const auto compare = [&](index sequences, index length, index cols, bool some_absent) {
      CAPTURE(sequences);
      CAPTURE(length);
      CAPTURE(cols);
      const T scale = T{0.25};
      matrix<T, cpu> rows = support::random_matrix<T>(random, sequences * length, cols);
      vector<std::uint8_t, cpu> flags(some_absent ? sequences * length : 0);
      for (index i = 0; i < flags.size(); ++i) {
        flags[i] = random.below(3) != 0 && i / length != 2 ? 1 : 0;
        if (flags[i] == 0) rows(i, 0) = std::numeric_limits<T>::quiet_NaN();
      }
      const vector<std::uint8_t, device> present = vector_on_device(flags);
      on_device<T> q(support::random_matrix<T>(random, sequences, cols)), h(rows);
      on_device<T> a(support::random_matrix<T>(random, sequences, length));
      on_device<T> u(support::random_matrix<T>(random, sequences, cols));
      matrix<double, cpu> weights(sequences, length), sums(sequences, cols);
      ops::attend_rows(host, static_cast<double>(scale), in_double(q.host()), in_double(rows),
                       flags.view(), weights.view(), sums.view());
      ops::attend_rows(ctx, scale, q.view(), h.view(), present.view(), a.view(), u.view());
      ctx.synchronise();
      // Scores with C + 2 roundings each, in an exponent, exponentials, and sums of L terms.
      table weight_bounds(sequences, length), sum_bounds(sequences, cols);
      for (index s = 0; s < sequences; ++s) {
        double size = 0.0;
        const auto on = [&](index j) { return flags.size() == 0 || flags[s * length + j] != 0; };
        for (index j = 0; j < length; ++j) {
          if (!on(j)) continue;
          size = std::max(
              size, product_size(static_cast<double>(scale), q.host(), s, rows, s * length + j));
        }
        const double roundings = 2.0 * (static_cast<double>(cols) + 4.0) * size +
                                 2.0 * static_cast<double>(length) + 12.0;
        for (index j = 0; j < length; ++j) {
          weight_bounds(s, j) = rounding_bound<T>(roundings, weights(s, j));
          for (index d = 0; d < cols && on(j); ++d) {
            sum_bounds(s, d) += rounding_bound<T>(
                roundings, weights(s, j) * static_cast<double>(rows(s * length + j, d)));
          }
        }
      }
      CHECK(support::difference(a.now().view(), to_table(weights.view()), weight_bounds) == "");
      CHECK(support::difference(u.now().view(), to_table(sums.view()), sum_bounds) == "");
      CHECK(a.intact());
      CHECK(u.intact());

      const matrix<T, cpu> given = a.now();
      on_device<T> du(support::random_matrix<T>(random, sequences, cols));
      on_device<T> dq(support::random_matrix<T>(random, sequences, cols));
      on_device<T> more(support::random_matrix<T>(random, sequences, cols));
      on_device<T> dh(support::random_matrix<T>(random, sequences * length, cols));
      matrix<double, cpu> dquery(sequences, cols), dmore = in_double(more.host()),
                                                   drows = in_double(dh.host());
      const auto on_host = [&](matrix<double, cpu>& out, grad_mode mode,
                               matrix_view<double, cpu> into) {
        ops::attend_rows_backward(host, static_cast<double>(scale), in_double(q.host()),
                                  in_double(rows), in_double(given), in_double(du.host()),
                                  out.view(), mode, into);
      };
      on_host(dquery, grad_mode::overwrite, drows.view());
      on_host(dmore, grad_mode::accumulate, {});
      ops::attend_rows_backward(ctx, scale, q.view(), h.view(), a.view(), du.view(), dq.view(),
                                grad_mode::overwrite, dh.view());
      ops::attend_rows_backward(ctx, scale, q.view(), h.view(), a.view(), du.view(), more.view(),
                                grad_mode::accumulate, {});
      ctx.synchronise();
      const attention_bounds<T> bounds(static_cast<double>(scale), q.host(), rows, given,
                                       du.host());
      const auto with_start = [](const table& b, const matrix<T, cpu>& start) {
        return each(b, to_table(start.view()),
                    [](double x, double v) { return x + rounding_bound<T>(2, v) + x; });
      };
      CHECK(support::difference(dq.now().view(), to_table(dquery.view()), bounds.dq) == "");
      CHECK(support::difference(more.now().view(), to_table(dmore.view()),
                                with_start(bounds.dq, more.host())) == "");
      CHECK(support::difference(dh.now().view(), to_table(drows.view()),
                                with_start(bounds.dh, dh.host())) == "");
      CHECK(dq.intact());
      CHECK(more.intact());
      CHECK(dh.intact());
      CHECK(ctx.scratch.used() == 0);
    };
    compare(0, 3, 5, false);
    compare(1, 2, 7, false);
    compare(3, 5, 37, false);
    compare(support::device_size(7, 301), 9, 33, true);
    compare(2, support::device_size(35, 601), 3, true);
  }

  TEST_CASE("large scores saturate and nothing to attend to gives zero") {
    context<device> ctx;
    matrix<float, cpu> query(1, 1), rows(2, 1), seven(1, 1);
    query(0, 0) = 1e20f;
    rows(0, 0) = 1.0f;
    rows(1, 0) = 2.0f;
    seven(0, 0) = 7.0f;
    on_device<float> q(query), h(rows), a(matrix<float, cpu>(1, 2)), u(seven);
    on_device<float> none(matrix<float, cpu>(0, 1)), flat(matrix<float, cpu>(1, 0)), zero(seven);
    ops::attend_rows(ctx, 1.0f, q.view(), h.view(), {}, a.view(), u.view());
    ops::attend_rows(ctx, 1.0f, q.view(), none.view(), {}, flat.view(), zero.view());
    ctx.synchronise();
    CHECK(u.now()(0, 0) == 2.0f);
    CHECK(zero.now()(0, 0) == 0.0f);
  }
}

}  // namespace talpa::cuda_sequence_rows_test
