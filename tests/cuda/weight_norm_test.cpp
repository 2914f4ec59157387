// SPDX-License-Identifier: Apache-2.0
#include "support/parity.hpp"
#include "support/scalars.hpp"

#include <talpa/cpu/weight_norm.hpp>
#include <talpa/cuda/weight_norm.hpp>

#include <doctest/doctest.h>

#include <cmath>
#include <limits>

namespace talpa::cuda_weight_norm_test {
using support::device;
using support::each;
using support::in_double;
using support::on_device;
using support::rounding_bound;
using support::table;
using support::to_table;

TEST_SUITE("cuda/weight_norm") {
  TEST_CASE_TEMPLATE("weight_norm and its gradients agree with those in double", T, TALPA_SCALARS) {
    context<device> ctx;
    context<cpu> host(1);
    support::test_random random(3);
    for (const index rows : {index{0}, index{1}, support::device_size(129, 5001)}) {
      for (const index cols : {index{3}, index{70}}) {
        CAPTURE(rows);
        CAPTURE(cols);
        on_device<T> v(support::random_matrix<T>(random, rows, cols));
        on_device<T> m(support::random_matrix<T>(random, 1, rows));
        on_device<T> norm(matrix<T, cpu>(1, rows)), ratio(matrix<T, cpu>(1, rows));
        on_device<T> shift(matrix<T, cpu>(1, rows)), dv(matrix<T, cpu>(rows, cols));
        on_device<T> dratio(support::random_matrix<T>(random, 1, rows));
        on_device<T> dm(support::random_matrix<T>(random, 1, rows));
        ops::weight_norm(ctx, v.view(), m.view(), norm.view(), ratio.view(), shift.view());
        ops::weight_norm_backward(ctx, v.view(), norm.view(), ratio.view(), dratio.view(),
                                  dm.view(), dv.view());
        ctx.synchronise();

        matrix<double, cpu> length(1, rows), c(1, rows), off(1, rows), dlength(rows, cols);
        ops::weight_norm(host, in_double(v.host()), in_double(m.host()), length.view(), c.view(),
                         off.view());
        // Squares and sums, halved by the root, the root, a difference and a quotient.
        const auto bound = [&](double x) {
          return rounding_bound<T>(static_cast<double>(cols) + 4.0, x);
        };
        const auto bound_shift = [&](double x) { return bound(std::abs(x) + 1.0); };
        const table ct = to_table(c.view()), lengths = to_table(length.view());
        CHECK(support::difference(norm.now().view(), lengths, each(lengths, bound)) == "");
        CHECK(support::difference(ratio.now().view(), ct, each(ct, bound)) == "");
        CHECK(support::difference(shift.now().view(), to_table(off.view()),
                                  each(ct, bound_shift)) == "");
        // From the same norm and ratio: dratio / norm, added; its product, quotient and product.
        matrix<double, cpu> more = in_double(dm.host());
        ops::weight_norm_backward(host, in_double(v.host()), in_double(norm.now()),
                                  in_double(ratio.now()), in_double(dratio.host()), more.view(),
                                  dlength.view());
        const table added = to_table(more.view()), start = to_table(dm.host().view());
        CHECK(
            support::difference(dm.now().view(), added, each(added, start, [](double a, double b) {
                                  return rounding_bound<T>(2, std::abs(a) + 2.0 * std::abs(b));
                                })) == "");
        const table dlengths = to_table(dlength.view());
        CHECK(support::difference(dv.now().view(), dlengths, each(dlengths, [](double x) {
                                    return rounding_bound<T>(4, x);
                                  })) == "");

        // Magnitudes that are the lengths change nothing, exactly; dv may be v.
        const matrix<T, cpu> apart = dv.now(), once = dm.now();
        ops::weight_norm_backward(ctx, v.view(), norm.view(), ratio.view(), dratio.view(),
                                  dm.view(), v.view());
        CHECK(support::bit_difference(v.now(), apart) == "");
        on_device<T> again(v.host());
        ops::weight_norm(ctx, again.view(), norm.view(), m.view(), ratio.view(), shift.view());
        ctx.synchronise();
        const matrix<T, cpu> ones = ratio.now(), zeros = shift.now();
        for (index o = 0; o < rows; ++o) {
          CHECK(ones(0, o) == T{1});
          CHECK(zeros(0, o) == T{0});
        }
        CHECK(v.intact());
        CHECK(norm.intact());
        CHECK(ratio.intact());
        CHECK(shift.intact());
        CHECK(dm.intact());
        CHECK(dv.intact());
      }
    }
  }

  TEST_CASE("a row of zeros keeps ratio 1 and gets no gradient, NaN stays, dv may be left out") {
    context<device> ctx;
    matrix<double, cpu> values(2, 2), magnitudes(1, 2), up(1, 2);
    magnitudes(0, 0) = 3.0;
    up(0, 0) = 1.0;
    values(1, 0) = std::numeric_limits<double>::quiet_NaN();
    on_device<double> v(values), m(magnitudes), dratio(up), dm(matrix<double, cpu>(1, 2));
    on_device<double> norm(matrix<double, cpu>(1, 2)), ratio(matrix<double, cpu>(1, 2)),
        shift(matrix<double, cpu>(1, 2));
    ops::weight_norm(ctx, v.view(), m.view(), norm.view(), ratio.view(), shift.view());
    ops::weight_norm_backward(ctx, v.view(), norm.view(), ratio.view(), dratio.view(), dm.view(),
                              {});
    ctx.synchronise();
    CHECK(ratio.now()(0, 0) == 1.0);
    CHECK(shift.now()(0, 0) == 0.0);
    CHECK(std::isnan(ratio.now()(0, 1)));
    CHECK(dm.now()(0, 0) == 0.0);
    CHECK(std::isnan(dm.now()(0, 1)));
  }
}

}  // namespace talpa::cuda_weight_norm_test
