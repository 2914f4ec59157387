// SPDX-License-Identifier: Apache-2.0
#include "support/padded.hpp"
#include "support/random.hpp"
#include "support/scalars.hpp"
#include "support/tolerance.hpp"

#include <talpa/cpu/noise.hpp>

#include <doctest/doctest.h>

#include <cmath>
#include <limits>

namespace talpa::noise_test {

namespace {
constexpr random_stream stream{42, 7};
constexpr index rows = 300, cols = 71;
std::uint64_t at(index n, index d) { return static_cast<std::uint64_t>(n * cols + d); }
}  // namespace

TEST_SUITE("ops/noise") {
  TEST_CASE_TEMPLATE("noise is the stream's, whatever the stride and the threads", T,
                     TALPA_SCALARS) {
    support::test_random random(15);
    const auto x = support::random_matrix<T>(random, rows, cols);
    const auto raw = support::random_matrix<T>(random, rows, cols, 3.0);
    const auto direct = support::random_matrix<T>(random, rows, cols);
    support::table plain(rows, cols), learned(rows, cols), sizes(rows, cols), draws(rows, cols),
        moved(rows, cols), bounds(rows, cols);
    for (index n = 0; n < rows; ++n) {
      for (index d = 0; d < cols; ++d) {
        const double z = double(normal<T>(stream, at(n, d))), r = double(raw(n, d));
        plain(n, d) = double(x(n, d)) + 0.5 * z;
        sizes(n, d) = std::log1p(std::exp(r)) + 0.25;
        learned(n, d) = double(x(n, d)) + sizes(n, d) * z;
        draws(n, d) = (double(x(n, d)) * z + double(direct(n, d))) / (1.0 + std::exp(-r));
        moved(n, d) =
            double(x(n, d)) * (1.0 + 0.125 * (2.0 * double(uniform<T>(stream, at(n, d))) - 1.0));
        // softplus and sigmoid within 8 ulps, products and sums.
        bounds(n, d) = support::rounding_bound<T>(
            24, std::abs(double(x(n, d))) * (1.0 + std::abs(z)) +
                    (sizes(n, d) + 1.0) * (1.0 + std::abs(z)) + std::abs(double(direct(n, d))));
      }
    }
    for (const int threads : {1, 3}) {
      context<cpu> ctx(threads);
      support::padded<T> y(rows, cols), deviation(rows, cols);
      ops::add_noise(ctx, stream, 0.5, x, y.view());
      CHECK(y.intact());
      CHECK(support::difference(y.view(), plain, bounds) == "");
      ops::add_learned_noise(ctx, stream, 0.25, x, raw, deviation.view(), y.view());
      CHECK(y.intact());
      CHECK(deviation.intact());
      CHECK(support::difference(y.view(), learned, bounds) == "");
      CHECK(support::difference(deviation.view(), sizes, bounds) == "");
      ops::add_learned_noise_backward(ctx, stream, raw, x, direct, y.view());
      CHECK(y.intact());
      CHECK(support::difference(y.view(), draws, bounds) == "");
      ops::jitter(ctx, stream, 0.125, x, y.view());
      CHECK(y.intact());
      CHECK(support::difference(y.view(), moved, bounds) == "");
      matrix<T, cpu> once(rows, cols), twice(rows, cols);
      ops::jitter_backward(ctx, stream, 0.125, x, once.view(), grad_mode::overwrite);
      CHECK(support::same_bits(once.view(), y.view()));
      ops::jitter_backward(ctx, stream, 0.125, x, twice.view(), grad_mode::overwrite);
      ops::jitter_backward(ctx, stream, 0.125, x, twice.view(), grad_mode::accumulate);
      CHECK(twice(3, 4) == T{2} * once(3, 4));
      ops::jitter_backward(ctx, stream, 0.125, x, matrix_view<T, cpu>(), grad_mode::ignore);
    }
  }

  TEST_CASE("no noise is none") {
    support::test_random random(1);
    const auto x = support::random_matrix<float>(random, 5, cols);
    matrix<float, cpu> y(5, cols);
    context<cpu> ctx(1);
    ops::add_noise(ctx, stream, 0.0, x, y.view());
    CHECK(support::same_bits(y.view(), x.view()));
    ops::jitter(ctx, stream, 0.0, x, y.view());
    CHECK(support::same_bits(y.view(), x.view()));
  }

  TEST_CASE("noise names what does not fit") {
    context<cpu> ctx(1);
    matrix<float, cpu> x(2, 3), y(3, 2);
    CHECK_THROWS_WITH_AS(ops::add_noise(ctx, stream, -1.0, x, x.view()),
                         "talpa::ops::add_noise: 'deviation' is -1, expected >= 0", value_error);
    CHECK_THROWS_WITH_AS(
        ops::add_noise(ctx, stream, 1.0, x, y.view()),
        "talpa::ops::add_noise: 'y' has shape [3, 2], expected [2, 3] = shape of x", shape_error);
    CHECK_THROWS_WITH_AS(ops::add_learned_noise(ctx, stream, -1.0, x, x, x.view(), x.view()),
                         "talpa::ops::add_learned_noise: 'floor' is -1, expected >= 0",
                         value_error);
    CHECK_THROWS_AS(ops::add_learned_noise(ctx, stream, 1.0, x, y, x.view(), x.view()),
                    shape_error);
    CHECK_THROWS_AS(ops::add_learned_noise_backward(ctx, stream, x, y, {}, x.view()), shape_error);
    CHECK_THROWS_WITH_AS(ops::jitter(ctx, stream, 1.0, x, x.view()),
                         "talpa::ops::jitter: 'width' is 1, expected a number in [0, 1)",
                         value_error);
    CHECK_THROWS_AS(ops::jitter_backward(ctx, stream, 0.1, x, y.view(), grad_mode::overwrite),
                    shape_error);
  }
}

}  // namespace talpa::noise_test
