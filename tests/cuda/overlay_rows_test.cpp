// SPDX-License-Identifier: Apache-2.0
#include "support/parity.hpp"

#include <talpa/cpu/overlay_rows.hpp>
#include <talpa/cuda/overlay_rows.hpp>

#include <doctest/doctest.h>

#include <cstdint>

namespace talpa::cuda_overlay_rows_test {
using support::device;
using support::on_device;

TEST_SUITE("cuda/overlay_rows") {
  TEST_CASE("the same rows as on the host, in every sequence") {
    context<device> ctx;
    context<cpu> host(1);
    support::test_random random(5);
    for (const index words : {1, 3}) {
      // More rows than a block has threads; sequences of no multiple of a warp.
      for (const index rows : {0, 1, 840}) {
        matrix<std::uint32_t, cpu> overlay(rows, words), mask(rows, words);
        for (index i = 0; i < overlay.size(); ++i) {
          mask.data()[i] = static_cast<std::uint32_t>(random.bits());
          // One bit in one word is enough.
          overlay.data()[i] = random.below(4) == 0 ? 1u << random.below(32) : 0u;
        }
        on_device<std::uint32_t> over(overlay);
        for (const index length : {0, 1, 40, 420}) {
          if (length != 0 && rows % length != 0) continue;
          for (const index most : {0, 1, 3, 300, 1000}) {
            CAPTURE(words);
            CAPTURE(rows);
            CAPTURE(length);
            CAPTURE(most);
            on_device<std::uint32_t> found(mask);
            matrix<std::uint32_t, cpu> expected = mask;
            ops::overlay_rows(host, overlay, length, most, expected.view());
            ops::overlay_rows(ctx, over.view(), length, most, found.view());
            ctx.synchronise();
            CHECK(support::bit_difference(found.now(), expected) == "");
            CHECK(found.intact());
          }
        }
      }
    }
  }
}

}  // namespace talpa::cuda_overlay_rows_test
