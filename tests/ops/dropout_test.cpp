// SPDX-License-Identifier: Apache-2.0
#include "support/padded.hpp"
#include "support/random.hpp"
#include "support/scalars.hpp"
#include "support/tolerance.hpp"

#include <talpa/cpu/dropout.hpp>

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

namespace talpa::dropout_test {
using support::each;
using support::rounding_bound;
using support::table;
using support::to_table;

namespace {
constexpr random_stream stream{42, 7};
// Rows that begin anywhere in a block of four random words, and take 32 blocks at once, then a few.
constexpr index rows = 350, cols = 151;
}  // namespace

TEST_SUITE("ops/dropout") {
  TEST_CASE_TEMPLATE("dropout keeps element (n, d) exactly where keep(stream, n D + d, p) says", T,
                     TALPA_SCALARS) {
    support::test_random random(15);
    const matrix<T, cpu> x = support::random_matrix<T>(random, rows, cols);
    const matrix<T, cpu> start = support::random_matrix<T>(random, rows, cols);
    for (const float p : {0.9f, 0.5f, 0.1f}) {
      CAPTURE(p);
      table expected(rows, cols), added(rows, cols);
      for (index n = 0; n < rows; ++n) {
        for (index d = 0; d < cols; ++d) {
          const bool on = keep(stream, static_cast<std::uint64_t>(n * cols + d), p);
          expected(n, d) = on ? static_cast<double>(x(n, d)) / static_cast<double>(p) : 0.0;
          added(n, d) = expected(n, d) + static_cast<double>(start(n, d));
        }
      }
      // The reciprocal of p, the product and the sum.
      const table bounds = each(expected, [](double v) { return rounding_bound<T>(2, v); });
      const table added_bounds =
          each(bounds, added, [](double b, double v) { return b + rounding_bound<T>(1, v); });
      for (const int threads : {1, 2, 3}) {
        context<cpu> ctx(threads);
        support::padded<T> y(rows, cols), dx(start);
        ops::dropout(ctx, stream, p, x, y.view());
        CHECK(y.intact());
        CHECK(support::difference(y.view(), expected, bounds) == "");
        ops::dropout_backward(ctx, stream, p, x, dx.view(), grad_mode::accumulate);
        CHECK(dx.intact());
        CHECK(support::difference(dx.view(), added, added_bounds) == "");
        matrix<T, cpu> in_place = x;
        ops::dropout_backward(ctx, stream, p, in_place, in_place.view(), grad_mode::overwrite);
        CHECK(support::same_bits(in_place.view(), y.view()));
        ops::dropout_backward(ctx, stream, p, x, matrix_view<T, cpu>(), grad_mode::ignore);
      }
    }
  }

  TEST_CASE_TEMPLATE("a mask that has been drawn does what the stream does", T, TALPA_SCALARS) {
    support::test_random random(16);
    const matrix<T, cpu> x = support::random_matrix<T>(random, rows, cols);
    const matrix<T, cpu> start = support::random_matrix<T>(random, rows, cols);
    // Shares that no element survives, and all.
    for (const float p : {1e-12f, 0.1f, 0.75f, 1.0f}) {
      CAPTURE(p);
      for (const int threads : {1, 3}) {
        context<cpu> ctx(threads);
        matrix<std::uint32_t, cpu> words(rows, mask_words(cols) + 2);
        for (index i = 0; i < words.size(); ++i) words.data()[i] = 0xdeadbeefu;
        const dropout_bits<cpu> bits{words.view().col_range(0, mask_words(cols)), p};
        ops::draw_dropout(ctx, stream, cols, bits);
        bool right = true;
        for (index n = 0; n < rows; ++n) {
          for (index d = 0; d < mask_words(cols) * mask_word_bits; ++d) {
            const bool on = (words(n, d / 32) >> (d % 32) & 1u) != 0;
            const auto element = static_cast<std::uint64_t>(n * cols + d);
            right = right && on == (d < cols && keep(stream, element, p));
          }
          right = right && words(n, mask_words(cols)) == 0xdeadbeefu;
        }
        CHECK(right);
        for (const grad_mode mode : {grad_mode::overwrite, grad_mode::accumulate}) {
          support::padded<T> by_bits(start), by_stream(start);
          ops::apply_dropout(ctx, bits, x, by_bits.view(), mode);
          ops::dropout_backward(ctx, stream, p, x, by_stream.view(), mode);
          CHECK(by_bits.intact());
          CHECK(support::same_bits(by_bits.view(), by_stream.view()));
        }
        matrix<T, cpu> in_place = x, apart(rows, cols);
        ops::apply_dropout(ctx, bits, x, apart.view(), grad_mode::overwrite);
        ops::apply_dropout(ctx, bits, in_place, in_place.view(), grad_mode::overwrite);
        CHECK(support::same_bits(in_place.view(), apart.view()));
        ops::apply_dropout(ctx, bits, x, matrix_view<T, cpu>(), grad_mode::ignore);
      }
    }
  }

  TEST_CASE_TEMPLATE("a mask and what it leaves have the same bits for vectors of every width", T,
                     TALPA_SCALARS) {
    support::test_random random(17);
    const matrix<T, cpu> x = support::random_matrix<T>(random, 1, 300);
    const detail::dropout_row mask(stream, 0.3f);
    const auto put = [](auto& to, const auto& value) { to = value; };
    for (const index first : {0, 3, 32, 77}) {
      for (const index count : {1, 31, 32, 130, 300}) {
        std::uint32_t expected[10] = {};
        for (index i = 0; i < count; ++i) {
          const bool on = keep(stream, static_cast<std::uint64_t>(first + i), 0.3f);
          expected[i / 32] |= (on ? 1u : 0u) << (i % 32);
        }
        const auto check = [&](auto bytes) {
          constexpr int width = decltype(bytes)::value;
          if constexpr (width <= detail::product_bytes) {
            std::uint32_t bits[10] = {};
            mask.draw<width>(first, count, bits);
            CHECK(std::equal(bits, bits + 10, expected));
          }
          if constexpr (width <= detail::register_bytes) {
            matrix<T, cpu> y(1, 300);
            detail::put_kept<T, width>(expected, T{4}, count, x.data(), y.data(), put);
            bool right = true;
            for (index i = 0; i < 300; ++i) {
              const bool on = i < count && (expected[i / 32] >> (i % 32) & 1u) != 0;
              right = right && y(0, i) == (on ? T{4} * x(0, i) : T{0});
            }
            CHECK(right);
          }
        };
        check(std::integral_constant<int, 16>{});
        check(std::integral_constant<int, 32>{});
        check(std::integral_constant<int, 64>{});
      }
    }
  }

  TEST_CASE("a mask that does not fit is refused, and nothing is written") {
    context<cpu> ctx(1);
    const matrix<float, cpu> x(2, 33);
    matrix<float, cpu> y(2, 33);
    matrix<std::uint32_t, cpu> words(2, 2), narrow(2, 1);
    words(0, 0) = 7u;
    y(1, 32) = 7.0f;
    CHECK_THROWS_WITH_AS(
        ops::draw_dropout(ctx, stream, 33, dropout_bits<cpu>{narrow.view(), 0.5f}),
        "talpa::ops::draw_dropout: 'words' has shape [2, 1], expected [2, 2] = rows, words of the "
        "columns",
        shape_error);
    CHECK_THROWS_WITH_AS(
        ops::draw_dropout(ctx, stream, 33, dropout_bits<cpu>{words.view(), 0.0f}),
        "talpa::ops::draw_dropout: 'keep_probability' is 0, expected a number in (0, 1]",
        value_error);
    CHECK(words(0, 0) == 7u);
    const auto apply = [&](const dropout_bits<cpu>& bits, matrix_view<float, cpu> out) {
      ops::apply_dropout(ctx, bits, x, out, grad_mode::overwrite);
    };
    CHECK_THROWS_WITH_AS(apply({narrow.view(), 0.5f}, y.view()),
                         "talpa::ops::apply_dropout: 'words' has shape [2, 1], expected [2, 2] = "
                         "rows, words of the columns",
                         shape_error);
    CHECK_THROWS_WITH_AS(apply({words.view(), 0.5f}, y.view().col_range(0, 32)),
                         "talpa::ops::apply_dropout: 'y' has shape [2, 32], expected [2, 33] = "
                         "shape of x",
                         shape_error);
    CHECK_THROWS_WITH_AS(
        apply({words.view(), 2.0f}, y.view()),
        "talpa::ops::apply_dropout: 'keep_probability' is 2, expected a number in (0, 1]",
        value_error);
    CHECK(y(1, 32) == 7.0f);
  }

  TEST_CASE("dropout keeps about the wanted share") {
    context<cpu> ctx(1);
    matrix<float, cpu> x(rows, cols), y(rows, cols);
    for (index i = 0; i < x.size(); ++i) x.data()[i] = 1.0f;
    for (const float p : {0.9f, 0.5f, 0.1f}) {
      ops::dropout(ctx, stream, p, x, y.view());
      double kept = 0.0;
      for (index i = 0; i < y.size(); ++i) kept += y.data()[i] != 0.0f ? 1.0 : 0.0;
      const double n = static_cast<double>(y.size()), q = static_cast<double>(p);
      // Five standard deviations of a binomial count.
      CHECK(support::within(kept, n * q, 5.0 * std::sqrt(n * q * (1.0 - q))));
    }
  }

  TEST_CASE("dropout with probability one is the identity, and what is dropped is zero") {
    context<cpu> ctx(1);
    matrix<double, cpu> x(4, 5), y(4, 5);
    for (index i = 0; i < x.size(); ++i) x.data()[i] = static_cast<double>(i) / 3.0;
    ops::dropout(ctx, stream, 1.0f, x, y.view());
    CHECK(support::same_bits(x.view(), y.view()));
    for (index i = 0; i < x.size(); ++i) {
      x.data()[i] = std::numeric_limits<double>::quiet_NaN();
    }
    ops::dropout(ctx, stream, 0.5f, x, y.view());
    for (index i = 0; i < x.size(); ++i) {
      const bool on = keep(stream, static_cast<std::uint64_t>(i), 0.5f);
      CHECK(std::isnan(y.data()[i]) == on);
    }
  }

  TEST_CASE("dropout names what does not fit") {
    context<cpu> ctx(1);
    matrix<float, cpu> x(2, 3), y(3, 2);
    CHECK_THROWS_WITH_AS(ops::dropout(ctx, stream, 0.5f, x, y.view()),
                         "talpa::ops::dropout: 'y' has shape [3, 2], expected [2, 3] = shape of x",
                         shape_error);
    CHECK_THROWS_WITH_AS(
        ops::dropout(ctx, stream, 0.0f, x, x.view()),
        "talpa::ops::dropout: 'keep_probability' is 0, expected a number in (0, 1]", value_error);
    CHECK_THROWS_WITH_AS(
        ops::dropout(ctx, stream, 1.5f, x, x.view()),
        "talpa::ops::dropout: 'keep_probability' is 1.5, expected a number in (0, 1]", value_error);
    CHECK_THROWS_AS(ops::dropout(ctx, stream, std::numeric_limits<float>::quiet_NaN(), x, x.view()),
                    value_error);
    CHECK_THROWS_WITH_AS(
        ops::dropout_backward(ctx, stream, 0.5f, x, y.view(), grad_mode::overwrite),
        "talpa::ops::dropout_backward: 'dx' has shape [3, 2], expected [2, 3] = shape of dy",
        shape_error);
    CHECK_THROWS_WITH_AS(
        ops::dropout_backward(ctx, stream, -1.0f, x, x.view(), grad_mode::overwrite),
        "talpa::ops::dropout_backward: 'keep_probability' is -1, expected a number in (0, 1]",
        value_error);
  }
}

}  // namespace talpa::dropout_test
