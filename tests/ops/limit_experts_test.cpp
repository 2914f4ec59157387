// SPDX-License-Identifier: Apache-2.0
#include "support/random.hpp"
#include "support/sanitized.hpp"
#include "support/scalars.hpp"

#include <talpa/cpu/limit_experts.hpp>

#include <doctest/doctest.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

namespace talpa::limit_experts_test {

namespace {

struct at_most {
  index tokens;
  index operator()(index) const { return tokens; }
};

bool on(const matrix<std::uint32_t, cpu>& mask, index n, index e) {
  return ((mask(n, e / mask_word_bits) >> (e % mask_word_bits)) & 1u) != 0;
}

}  // namespace

TEST_SUITE("ops/limit_experts") {
  TEST_CASE_TEMPLATE("limit_experts agrees with sorting for any threads and strides", T,
                     TALPA_SCALARS) {
    support::test_random random(3);
    const index tokens = support::sanitized ? 128 : 640;
    for (const index experts : {1, 5, 32, 33, 70}) {
      for (const index length : {index{0}, index{64}, tokens, index{1}}) {
        for (const limit_order order : {limit_order::position, limit_order::score}) {
          CAPTURE(experts);
          CAPTURE(length);
          matrix<T, cpu> scores(tokens, experts);
          vector<std::uint8_t, cpu> real(tokens);
          matrix<std::uint32_t, cpu> asked(tokens, mask_words(experts));
          for (index n = 0; n < tokens; ++n) {
            real[n] = random.below(7) == 0 ? 0 : 1;
            for (index e = 0; e < experts; ++e) {
              // Few values, so that many are equal.
              scores(n, e) = static_cast<T>(random.below(6));
              if (random.below(2) == 0) asked(n, e / mask_word_bits) |= 1u << (e % mask_word_bits);
            }
            if (n % 11 == 3) scores(n, experts - 1) = std::numeric_limits<T>::quiet_NaN();
          }
          const auto takes_part = [&](index n) { return real[n] != 0 && n % 11 != 3; };
          // A third of those that take part, rounded down: zero for a sequence of one.
          const auto third = [](index count) { return count / 3; };

          matrix<std::uint32_t, cpu> expected = asked;
          const index whole = length == 0 ? tokens : length;
          for (index start = 0; start < tokens; start += whole) {
            index count = 0;
            for (index n = start; n < start + whole; ++n) count += takes_part(n) ? 1 : 0;
            for (index e = 0; e < experts; ++e) {
              std::vector<index> asking;
              for (index n = start; n < start + whole; ++n) {
                if (takes_part(n) && on(asked, n, e)) asking.push_back(n);
              }
              if (order == limit_order::score) {
                std::stable_sort(asking.begin(), asking.end(),
                                 [&](index a, index b) { return scores(a, e) > scores(b, e); });
              }
              for (std::size_t i = static_cast<std::size_t>(count / 3); i < asking.size(); ++i) {
                expected(asking[i], e / mask_word_bits) &= ~(1u << (e % mask_word_bits));
              }
            }
          }
          for (const int threads : {1, 2, 3}) {
            context<cpu> ctx(threads);
            matrix<std::uint32_t, cpu> wide(tokens, mask_words(experts) + 1);
            const auto mask = wide.view().col_range(0, mask_words(experts));
            for (index n = 0; n < tokens; ++n) {
              std::copy_n(asked.view().row(n), mask.cols, mask.row(n));
              wide(n, mask.cols) = 0xabcdef01u;
            }
            ops::limit_experts(ctx, matrix_view<const T, cpu>(scores), real.view(), length, third,
                               order, mask);
            bool same = true;
            for (index n = 0; n < tokens; ++n) {
              same = same &&
                     std::equal(mask.row(n), mask.row(n) + mask.cols, expected.view().row(n)) &&
                     wide(n, mask.cols) == 0xabcdef01u;
            }
            CHECK(same);
          }
        }
      }
    }
  }

  TEST_CASE("no tokens, and a limit of nothing") {
    context<cpu> ctx(1);
    matrix<float, cpu> none(0, 4), scores(3, 4);
    matrix<std::uint32_t, cpu> empty(0, 1), mask(3, 1);
    ops::limit_experts(ctx, matrix_view<const float, cpu>(none), {}, 0, at_most{1},
                       limit_order::score, empty.view());
    for (const limit_order order : {limit_order::position, limit_order::score}) {
      for (index n = 0; n < 3; ++n) mask(n, 0) = 15u;
      ops::limit_experts(ctx, matrix_view<const float, cpu>(scores), {}, 0, at_most{0}, order,
                         mask.view());
      for (index n = 0; n < 3; ++n) CHECK(mask(n, 0) == 0u);
    }
  }

  TEST_CASE("shapes that do not fit are refused") {
    context<cpu> ctx(1);
    matrix<float, cpu> scores(6, 4);
    matrix<std::uint32_t, cpu> mask(6, 1), wrong(6, 2);
    vector<std::uint8_t, cpu> real(5);
    const matrix_view<const float, cpu> s(scores);
    CHECK_THROWS_WITH_AS(
        ops::limit_experts(ctx, s, {}, 0, at_most{1}, limit_order::score, wrong.view()),
        "talpa::ops::limit_experts: 'mask' has shape [6, 2], expected [6, 1] = tokens, mask words "
        "of the experts",
        shape_error);
    CHECK_THROWS_WITH_AS(
        ops::limit_experts(ctx, s, real.view(), 0, at_most{1}, limit_order::score, mask.view()),
        "talpa::ops::limit_experts: 'padding_mask' has shape [5], expected [6] = one flag a token",
        shape_error);
    CHECK_THROWS_WITH_AS(
        ops::limit_experts(ctx, s, {}, 4, at_most{1}, limit_order::score, mask.view()),
        "talpa::ops::limit_experts: 'sequence_length' is 4, expected a divisor of 6 = tokens, or 0",
        value_error);
  }
}

}  // namespace talpa::limit_experts_test
