// SPDX-License-Identifier: Apache-2.0
#include <talpa/core/error.hpp>
#include <talpa/core/matrix.hpp>
#include <talpa/cpu/update_bias.hpp>
#include <talpa/optim/expert_bias.hpp>

#include <doctest/doctest.h>

#include <limits>
#include <vector>

namespace talpa::update_bias_test {

namespace {

matrix<index, cpu> row(const std::vector<index>& values) {
  matrix<index, cpu> m(1, static_cast<index>(values.size()));
  for (index e = 0; e < m.cols(); ++e) m(0, e) = values[static_cast<std::size_t>(e)];
  return m;
}

}  // namespace

TEST_SUITE("ops/update_bias") {
  TEST_CASE("experts with less than the mean go up, at the mean they stay") {
    context<cpu> ctx(1);
    matrix<double, cpu> bias(1, 3);
    bias(0, 0) = 0.5;
    ops::update_bias(ctx, row({4, 1, 7}), 0.25, bias.view());
    CHECK(bias(0, 0) == 0.5);
    CHECK(bias(0, 1) == 0.25);
    CHECK(bias(0, 2) == -0.25);
    // A mean that is not whole: 2 is above 5 / 3.
    ops::update_bias(ctx, row({2, 1, 2}), 0.25, bias.view());
    CHECK(bias(0, 0) == 0.25);
    CHECK(bias(0, 1) == 0.5);
    CHECK(bias(0, 2) == -0.5);
    ops::update_bias(ctx, row({0, 0, 0}), 0.25, bias.view());
    CHECK(bias(0, 1) == 0.5);
    matrix<double, cpu> none(1, 0);
    ops::update_bias(ctx, row({}), 0.25, none.view());
  }

  TEST_CASE("it is the update of a report") {
    context<cpu> ctx(1);
    const std::vector<index> counts{3, 9, 0, 5, 5, 8};
    matrix<float, cpu> bias(1, 6), other(1, 6);
    for (index e = 0; e < 6; ++e) bias(0, e) = other(0, e) = 0.1f * static_cast<float>(e);
    ops::update_bias(ctx, row(counts), 1e-3, bias.view());
    update_bias(other.view(), counts, 1e-3);
    for (index e = 0; e < 6; ++e) CHECK(bias(0, e) == other(0, e));
  }

  TEST_CASE("what does not fit is refused, and the bias stays") {
    context<cpu> ctx(1);
    matrix<float, cpu> bias(1, 3);
    bias(0, 2) = 7.0f;
    CHECK_THROWS_WITH_AS(
        ops::update_bias(ctx, row({1, 2}), 0.1, bias.view()),
        "talpa::ops::update_bias: 'bias' has shape [1, 3], expected [1, 2] = shape "
        "of counts",
        shape_error);
    CHECK_THROWS_WITH_AS(
        ops::update_bias(ctx, matrix<index, cpu>(2, 3), 0.1, bias.view()),
        "talpa::ops::update_bias: 'counts' has shape [2, 3], expected [1, 3] = one "
        "number an expert",
        shape_error);
    for (const double rate : {-1.0, std::numeric_limits<double>::quiet_NaN()}) {
      CHECK_THROWS_AS(ops::update_bias(ctx, row({1, 2, 3}), rate, bias.view()), value_error);
    }
    CHECK_THROWS_WITH_AS(ops::update_bias(ctx, row({1, 2, 3}), -1.0, bias.view()),
                         "talpa::ops::update_bias: 'rate' is -1, expected >= 0", value_error);
    CHECK(bias(0, 2) == 7.0f);
  }
}

}  // namespace talpa::update_bias_test
