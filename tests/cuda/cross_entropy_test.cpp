// SPDX-License-Identifier: Apache-2.0
#include "support/parity.hpp"
#include "support/scalars.hpp"

#include <talpa/cuda/cross_entropy.hpp>

#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <vector>

namespace talpa::cuda_cross_entropy_test {
using support::device;
using support::each;
using support::gamma_bound;
using support::on_device;
using support::rounding_bound;
using support::table;
using support::to_table;

namespace {

// Error of exp(x - max) relative to itself, and of a sum of C of them.
template <class T>
double mass_bound(const table& x) {
  return gamma_bound<T>(2.0 * (2.0 * support::largest(x) + 2.0) + static_cast<double>(x.cols));
}

vector<std::int32_t, device> labels_on_device(const std::vector<std::int32_t>& labels) {
  const index size = static_cast<index>(labels.size());
  vector<std::int32_t, cpu> host(size);
  for (index n = 0; n < size; ++n) host[n] = labels[static_cast<std::size_t>(n)];
  vector<std::int32_t, device> there(size);
  to_device<std::int32_t, device>(as_column(host.view()), as_column(there.view()));
  return there;
}

template <class T>
matrix<T, cpu> number(double value) {
  matrix<T, cpu> m(1, 1);
  m(0, 0) = static_cast<T>(value);
  return m;
}

}  // namespace

TEST_SUITE("cuda/cross_entropy") {
  TEST_CASE_TEMPLATE("cross_entropy agrees with the reference", T, TALPA_SCALARS) {
    context<device> ctx;
    support::test_random random(11);
    for (const index rows : {index{1}, support::device_size(129, 3001)}) {
      for (const index classes : {index{2}, index{70}}) {
        CAPTURE(rows);
        CAPTURE(classes);
        const typename workspace<device>::scope scope(ctx.memory);
        on_device<T> x(support::random_matrix<T>(random, rows, classes, 3.0));
        on_device<T> dx(matrix<T, cpu>(rows, classes));
        on_device<T> more(support::random_matrix<T>(random, rows, classes));
        on_device<T> value(number<T>(7.0)), dvalue(number<T>(3.0));
        std::vector<std::int32_t> labels;
        double counted = 0.0;
        for (index n = 0; n < rows; ++n) {
          const bool out = n % 7 == 3;
          labels.push_back(out ? ignore_label : static_cast<std::int32_t>(random.below(classes)));
          counted += out ? 0.0 : 1.0;
        }
        const vector<std::int32_t, device> there = labels_on_device(labels);
        const auto saved = ops::cross_entropy(ctx, x.view(), there.view(), value.view());
        ops::cross_entropy_backward(ctx, saved, x.view(), there.view(), dvalue.view(), dx.view(),
                                    grad_mode::overwrite);
        ops::cross_entropy_backward(ctx, saved, x.view(), there.view(), dvalue.view(), more.view(),
                                    grad_mode::accumulate);
        ctx.synchronise();

        const table xt = to_table(x.host().view());
        const support::scalar_and_gradient expected = support::cross_entropy(xt, labels);
        // A row's loss is log(mass) + (max - x[label]), both terms >= 0: the error of the mass, and
        // the roundings of log, difference and sum; then a mean of `counted` positive terms.
        CHECK(
            support::within(static_cast<double>(value.now()(0, 0)), expected.value,
                            mass_bound<T>(xt) + rounding_bound<T>(4.0 + counted, expected.value)));
        CHECK(static_cast<double>(to_host(as_column(saved.counted))(0, 0)) == counted);
        // weight (p - hit): the error of p, of the division, difference and product.
        const double weight = 3.0 / counted;
        const double relative = mass_bound<T>(xt) * 2.0 + gamma_bound<T>(6);
        table gradient(rows, classes), bounds(rows, classes);
        for (index n = 0; n < rows; ++n) {
          for (index c = 0; c < classes; ++c) {
            gradient(n, c) = 3.0 * expected.gradient(n, c);
            const std::int32_t label = labels[static_cast<std::size_t>(n)];
            const bool hit = label == c;
            const double p = label < 0 ? 0.0 : gradient(n, c) / weight + (hit ? 1.0 : 0.0);
            bounds(n, c) = weight * (relative * p + (hit ? gamma_bound<T>(4) : 0.0));
          }
        }
        CHECK(support::difference(dx.now().view(), gradient, bounds) == "");
        const table added =
            each(gradient, to_table(more.host().view()), [](double a, double b) { return a + b; });
        CHECK(support::difference(more.now().view(), added,
                                  each(bounds, added, [](double b, double v) {
                                    return b + rounding_bound<T>(1, v);
                                  })) == "");
        CHECK(value.intact());
        CHECK(dx.intact());
        CHECK(more.intact());
        CHECK(ctx.scratch.used() == 0);
      }
    }
  }

  TEST_CASE("cross_entropy without counted rows is zero with a zero gradient") {
    context<device> ctx;
    matrix<float, cpu> values(2, 3);
    values(0, 0) = std::numeric_limits<float>::quiet_NaN();
    on_device<float> x(values), dx(values), none(matrix<float, cpu>(0, 3));
    on_device<float> value(number<float>(7.0)), one(number<float>(1.0));
    const auto labels = labels_on_device({ignore_label, ignore_label});
    const auto saved = ops::cross_entropy(ctx, x.view(), labels.view(), value.view());
    ops::cross_entropy_backward(ctx, saved, x.view(), labels.view(), one.view(), dx.view(),
                                grad_mode::overwrite);
    ctx.synchronise();
    CHECK(support::bit_difference(value.now(), number<float>(0.0)) == "");
    CHECK(support::bit_difference(dx.now(), matrix<float, cpu>(2, 3)) == "");

    on_device<float> again(number<float>(7.0));
    const vector<std::int32_t, device> nothing;
    const auto empty = ops::cross_entropy(ctx, none.view(), nothing.view(), again.view());
    ops::cross_entropy_backward(ctx, empty, none.view(), nothing.view(), one.view(), none.view(),
                                grad_mode::overwrite);
    ctx.synchronise();
    CHECK(support::bit_difference(again.now(), number<float>(0.0)) == "");
    CHECK(none.intact());
  }

  TEST_CASE("cross_entropy shows NaN, and an impossible label as infinity") {
    context<device> ctx;
    matrix<float, cpu> values(2, 2);
    values(0, 0) = -std::numeric_limits<float>::infinity();
    values(1, 1) = std::numeric_limits<float>::quiet_NaN();
    on_device<float> x(values), value(number<float>(7.0));
    const auto first = labels_on_device({0, ignore_label}), both = labels_on_device({1, 0});
    ops::cross_entropy(ctx, x.view(), first.view(), value.view());
    ctx.synchronise();
    CHECK(value.now()(0, 0) == std::numeric_limits<float>::infinity());
    ops::cross_entropy(ctx, x.view(), both.view(), value.view());
    ctx.synchronise();
    CHECK(std::isnan(value.now()(0, 0)));
  }

  TEST_CASE("a label outside its range is no number in a context that does not look") {
    context<device> ctx;
    on_device<float> x(matrix<float, cpu>(1, 2)), value(number<float>(7.0));
    const auto labels = labels_on_device({2});
    ops::cross_entropy(ctx, x.view(), labels.view(), value.view());
    ctx.synchronise();
    CHECK(std::isnan(value.now()(0, 0)));
  }

  TEST_CASE("a checked context names a label outside its range before any work") {
    context<device> ctx;
    ctx.checked = true;
    on_device<float> x(matrix<float, cpu>(2, 3)), value(number<float>(7.0));
    const auto good = labels_on_device({ignore_label, 2}), high = labels_on_device({0, 3}),
               low = labels_on_device({-2, 0});
    CHECK_THROWS_WITH_AS(ops::cross_entropy(ctx, x.view(), high.view(), value.view()),
                         "talpa::ops::cross_entropy: 'labels' is 3 in row 1, expected 0..2 = "
                         "classes, or -1 to leave the row out",
                         value_error);
    CHECK_THROWS_WITH_AS(ops::cross_entropy(ctx, x.view(), low.view(), value.view()),
                         "talpa::ops::cross_entropy: 'labels' is -2 in row 0, expected 0..2 = "
                         "classes, or -1 to leave the row out",
                         value_error);
    CHECK(ctx.memory.used() == 0);
    CHECK(value.now()(0, 0) == 7.0f);
    ops::cross_entropy(ctx, x.view(), good.view(), value.view());
    ctx.synchronise();
    CHECK(value.now()(0, 0) != 7.0f);
  }
}

}  // namespace talpa::cuda_cross_entropy_test
