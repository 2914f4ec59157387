// SPDX-License-Identifier: Apache-2.0
#include "support/random.hpp"

#include <talpa/core/matrix.hpp>
#include <talpa/cpu/overlay_rows.hpp>
#include <talpa/testing/bounds.hpp>

#include <doctest/doctest.h>

#include <cstdint>

namespace talpa::overlay_rows_test {

TEST_SUITE("ops/overlay_rows") {
  TEST_CASE("the first rows with a bit replace those of the mask, for any threads") {
    support::test_random random(5);
    const index tokens = 360;
    for (const index words : {1, 2, 3}) {
      for (const index length : {0, 1, 40, 360}) {
        for (const index most : {0, 1, 3, 1000}) {
          CAPTURE(words);
          CAPTURE(length);
          CAPTURE(most);
          matrix<std::uint32_t, cpu> overlay(tokens, words), mask(tokens, words);
          for (index i = 0; i < overlay.size(); ++i) {
            mask.data()[i] = static_cast<std::uint32_t>(random.bits());
            // One bit in one word is enough.
            overlay.data()[i] = random.below(4) == 0 ? 1u << random.below(32) : 0u;
          }
          matrix<std::uint32_t, cpu> expected = mask;
          index used = 0;
          for (index n = 0; n < tokens; ++n) {
            if (n % (length == 0 ? tokens : length) == 0) used = 0;
            bool some = false;
            for (index w = 0; w < words; ++w) some = some || overlay(n, w) != 0;
            if (!some || used == most) continue;
            ++used;
            for (index w = 0; w < words; ++w) expected(n, w) = overlay(n, w);
          }
          for (const int threads : {1, 3}) {
            context<cpu> ctx(threads);
            matrix<std::uint32_t, cpu> found = mask;
            ops::overlay_rows(ctx, overlay, length, most, found.view());
            CHECK(testing::first_difference(found, expected) == "");
          }
        }
      }
    }
  }

  TEST_CASE("wrong shapes and numbers are refused, and no rows are legal") {
    context<cpu> ctx(1);
    matrix<std::uint32_t, cpu> overlay(6, 2), mask(6, 2), narrow(6, 1), none(0, 2);
    CHECK_THROWS_AS(ops::overlay_rows(ctx, overlay, 0, 1, narrow.view()), shape_error);
    CHECK_THROWS_WITH_AS(
        ops::overlay_rows(ctx, overlay, 4, 1, mask.view()),
        "talpa::ops::overlay_rows: 'sequence_length' is 4, expected a divisor of 6 = tokens, or 0",
        value_error);
    CHECK_THROWS_WITH_AS(
        ops::overlay_rows(ctx, overlay, 0, -1, mask.view()),
        "talpa::ops::overlay_rows: 'most' is -1, expected >= 0 = rows of a sequence", value_error);
    CHECK_NOTHROW(ops::overlay_rows(ctx, none, 0, 1, none.view()));
  }
}

}  // namespace talpa::overlay_rows_test
