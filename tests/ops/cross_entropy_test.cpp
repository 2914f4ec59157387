// SPDX-License-Identifier: Apache-2.0
#include "support/padded.hpp"
#include "support/random.hpp"
#include "support/scalars.hpp"
#include "support/tolerance.hpp"

#include <talpa/cpu/cross_entropy.hpp>

#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <vector>

namespace talpa::cross_entropy_test {
using support::each;
using support::gamma_bound;
using support::rounding_bound;
using support::table;
using support::to_table;

namespace {

// Error of exp(x - max) relative to itself, and of a sum of C of them.
template <class T>
double mass_bound(const table& x) {
  return gamma_bound<T>(2.0 * (2.0 * support::largest(x) + 2.0) + static_cast<double>(x.cols));
}

template <class T>
void set(matrix<T, cpu>& m, std::initializer_list<double> values) {
  index i = 0;
  for (const double v : values) m.data()[i++] = static_cast<T>(v);
}

}  // namespace

TEST_SUITE("ops/cross_entropy") {
  TEST_CASE("cross_entropy of two rows worked by hand") {
    // Row 0: probabilities 1/4 and 3/4, label 1: ln(4/3). Row 1: equal, label 0: ln 2.
    context<cpu> ctx(1);
    matrix<double, cpu> x(2, 2), value(1, 1), dvalue(1, 1), dx(2, 2);
    set(x, {0.0, std::log(3.0), 5.0, 5.0});
    vector<std::int32_t, cpu> labels(2);
    labels[0] = 1;
    labels[1] = 0;
    const auto saved = ops::cross_entropy(ctx, x, labels, value.view());
    const double bound = mass_bound<double>(to_table(x.view()));
    CHECK(support::within(value(0, 0), 0.5 * (std::log(4.0 / 3.0) + std::log(2.0)), bound));
    dvalue(0, 0) = 2.0;
    ops::cross_entropy_backward(ctx, saved, x, labels, dvalue, dx.view(), grad_mode::overwrite);
    CHECK(support::difference(dx.view(), table(2, 2, {0.25, -0.25, -0.5, 0.5}), bound) == "");
  }

  TEST_CASE_TEMPLATE(
      "cross_entropy agrees with the reference and has the same bits for any threads", T,
      TALPA_SCALARS) {
    support::test_random random(11);
    for (const index classes : {index{2}, index{10}, index{70}}) {
      CAPTURE(classes);
      constexpr index rows = 3000;
      const matrix<T, cpu> x = support::random_matrix<T>(random, rows, classes, 3.0);
      const matrix<T, cpu> start = support::random_matrix<T>(random, rows, classes);
      vector<std::int32_t, cpu> labels(rows);
      std::vector<std::int32_t> reference_labels;
      for (index n = 0; n < rows; ++n) {
        labels[n] = n % 7 == 3 ? ignore_label : static_cast<std::int32_t>(random.below(classes));
        reference_labels.push_back(labels[n]);
      }
      const support::scalar_and_gradient expected =
          support::cross_entropy(to_table(x.view()), reference_labels);
      matrix<T, cpu> dvalue(1, 1);
      dvalue(0, 0) = T{3};
      const double counted = static_cast<double>(rows - rows / 7 - (rows % 7 > 3 ? 1 : 0));
      // A row's loss is log(mass) + (max - x[label]), both terms >= 0: the error of the mass, and
      // the roundings of log, difference and sum; then a mean of `counted` positive terms.
      const double value_bound =
          mass_bound<T>(to_table(x.view())) + rounding_bound<T>(4.0 + counted, expected.value);
      // weight (p - hit): the error of p, of the division, difference and product.
      const double weight = 3.0 / counted;
      const double relative = mass_bound<T>(to_table(x.view())) * 2.0 + gamma_bound<T>(6);
      table gradient(rows, classes), bounds(rows, classes), added(rows, classes),
          added_bounds(rows, classes);
      for (index n = 0; n < rows; ++n) {
        for (index c = 0; c < classes; ++c) {
          gradient(n, c) = 3.0 * expected.gradient(n, c);
          const bool hit = labels[n] == c;
          const double p = labels[n] < 0 ? 0.0 : gradient(n, c) / weight + (hit ? 1.0 : 0.0);
          bounds(n, c) = weight * (relative * p + (hit ? gamma_bound<T>(4) : 0.0));
          added(n, c) = gradient(n, c) + static_cast<double>(start(n, c));
          added_bounds(n, c) = bounds(n, c) + rounding_bound<T>(1, added(n, c));
        }
      }
      T first{0};
      for (const int threads : {1, 2, 3}) {
        context<cpu> ctx(threads);
        matrix<T, cpu> value(1, 1);
        support::padded<T> strided(x), dx(rows, classes), more(start);
        const auto saved = ops::cross_entropy(ctx, strided.view(), labels, value.view());
        CHECK(support::within(static_cast<double>(value(0, 0)), expected.value, value_bound));
        if (threads == 1) first = value(0, 0);
        CHECK(value(0, 0) == first);
        CHECK(static_cast<double>(saved.counted[0]) == counted);
        ops::cross_entropy_backward(ctx, saved, x, labels, dvalue, dx.view(), grad_mode::overwrite);
        CHECK(dx.intact());
        CHECK(support::difference(dx.view(), gradient, bounds) == "");
        ops::cross_entropy_backward(ctx, saved, x, labels, dvalue, more.view(),
                                    grad_mode::accumulate);
        CHECK(more.intact());
        CHECK(support::difference(more.view(), added, added_bounds) == "");
        ops::cross_entropy_backward(ctx, saved, x, labels, dvalue, matrix_view<T, cpu>(),
                                    grad_mode::ignore);
        CHECK(ctx.scratch.used() == 0);
      }
    }
  }

  TEST_CASE_TEMPLATE("cross_entropy of huge logits neither overflows nor loses the difference", T,
                     TALPA_SCALARS) {
    context<cpu> ctx(1);
    matrix<T, cpu> x(1, 2), value(1, 1), dvalue(1, 1), dx(1, 2);
    vector<std::int32_t, cpu> labels(1);
    labels[0] = 1;
    set(x, {30000.0, 29999.0});
    const auto saved = ops::cross_entropy(ctx, x, labels, value.view());
    // x - max is exact here.
    const double loss = std::log1p(std::exp(1.0));
    CHECK(support::within(static_cast<double>(value(0, 0)), loss, rounding_bound<T>(8, loss)));
    dvalue(0, 0) = T{1};
    ops::cross_entropy_backward(ctx, saved, x, labels, dvalue, dx.view(), grad_mode::overwrite);
    const double p = 1.0 / (1.0 + std::exp(-1.0));
    CHECK(support::difference(dx.view(), table(1, 2, {p, -p}), gamma_bound<T>(10)) == "");
  }

  TEST_CASE_TEMPLATE("cross_entropy without counted rows is zero with a zero gradient", T,
                     TALPA_SCALARS) {
    context<cpu> ctx(1);
    matrix<T, cpu> x(2, 3), value(1, 1), dvalue(1, 1), dx(2, 3);
    vector<std::int32_t, cpu> labels(2);
    labels[0] = labels[1] = ignore_label;
    x(0, 0) = std::numeric_limits<T>::quiet_NaN();
    for (index i = 0; i < 6; ++i) dx.data()[i] = T{7};
    dvalue(0, 0) = T{1};
    value(0, 0) = T{7};
    auto saved = ops::cross_entropy(ctx, x, labels, value.view());
    CHECK(value(0, 0) == T{0});
    ops::cross_entropy_backward(ctx, saved, x, labels, dvalue, dx.view(), grad_mode::overwrite);
    for (index i = 0; i < 6; ++i) CHECK(dx.data()[i] == T{0});

    value(0, 0) = T{7};
    ops::cross_entropy(ctx, matrix_view<const T, cpu>(nullptr, 0, 3), vector<std::int32_t, cpu>(),
                       value.view());
    CHECK(value(0, 0) == T{0});
  }

  TEST_CASE("cross_entropy shows NaN, and an impossible label as infinity") {
    context<cpu> ctx(1);
    matrix<float, cpu> x(1, 2), value(1, 1);
    vector<std::int32_t, cpu> labels(1);
    set(x, {-std::numeric_limits<double>::infinity(), 1.0});
    ops::cross_entropy(ctx, x, labels, value.view());
    CHECK(value(0, 0) == std::numeric_limits<float>::infinity());
    set(x, {std::numeric_limits<double>::quiet_NaN(), 1.0});
    ops::cross_entropy(ctx, x, labels, value.view());
    CHECK(std::isnan(value(0, 0)));
  }

  TEST_CASE("cross_entropy names a label outside its range and arguments that do not fit") {
    context<cpu> ctx(1);
    matrix<float, cpu> x(2, 3), value(1, 1), wide(1, 2);
    vector<std::int32_t, cpu> labels(2), few(1);
    labels[1] = 3;
    value(0, 0) = 7.0f;
    CHECK_THROWS_WITH_AS(ops::cross_entropy(ctx, x, labels, value.view()),
                         "talpa::ops::cross_entropy: 'labels' is 3 in row 1, expected 0..2 = "
                         "classes, or -1 to leave the row out",
                         value_error);
    labels[1] = -2;
    CHECK_THROWS_WITH_AS(ops::cross_entropy(ctx, x, labels, value.view()),
                         "talpa::ops::cross_entropy: 'labels' is -2 in row 1, expected 0..2 = "
                         "classes, or -1 to leave the row out",
                         value_error);
    CHECK(value(0, 0) == 7.0f);
    CHECK(ctx.memory.used() == 0);
    CHECK_THROWS_WITH_AS(
        ops::cross_entropy(ctx, x, few, value.view()),
        "talpa::ops::cross_entropy: 'labels' has shape [1], expected [2] = rows of logits",
        shape_error);
    CHECK_THROWS_WITH_AS(
        ops::cross_entropy(ctx, x, labels, wide.view()),
        "talpa::ops::cross_entropy: 'value' has shape [1, 2], expected [1, 1] = one number",
        shape_error);
    labels[1] = 0;
    const auto saved = ops::cross_entropy(ctx, x, labels, value.view());
    CHECK_THROWS_WITH_AS(ops::cross_entropy_backward(ctx, saved, x, labels, value, wide.view(),
                                                     grad_mode::overwrite),
                         "talpa::ops::cross_entropy_backward: 'dlogits' has shape [1, 2], expected "
                         "[2, 3] = shape of logits",
                         shape_error);
    CHECK_THROWS_WITH_AS(
        ops::cross_entropy_backward(ctx, saved, x, labels, wide, x.view(), grad_mode::overwrite),
        "talpa::ops::cross_entropy_backward: 'dvalue' has shape [1, 2], expected [1, 1] = one "
        "number",
        shape_error);
    CHECK_THROWS_WITH_AS(
        ops::cross_entropy_backward(ctx, saved, x, few, value, x.view(), grad_mode::overwrite),
        "talpa::ops::cross_entropy_backward: 'labels' has shape [1], expected [2] = rows of logits",
        shape_error);
    const cross_entropy_saved<float, cpu> none;
    CHECK_THROWS_WITH_AS(
        ops::cross_entropy_backward(ctx, none, x, labels, value, x.view(), grad_mode::overwrite),
        "talpa::ops::cross_entropy_backward: 'saved' has shape [0], expected [2] = rows of logits",
        shape_error);
  }
}

}  // namespace talpa::cross_entropy_test
