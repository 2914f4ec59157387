// SPDX-License-Identifier: Apache-2.0
#include "support/padded.hpp"
#include "support/random.hpp"
#include "support/routed.hpp"
#include "support/scalars.hpp"
#include "support/tolerance.hpp"

#include <talpa/cpu/segments.hpp>
#include <talpa/cpu/slot_dropout.hpp>
#include <talpa/testing/bounds.hpp>

#include <doctest/doctest.h>

namespace talpa::slot_dropout_test {

namespace {

constexpr random_stream stream{42, 7};
constexpr float keep_half = 0.5f;

/// The slots of a routing of 300 tokens to 5 experts, of which expert 2 has none.
struct routed_slots {
  context<cpu> ctx{1};
  segments<cpu> s;

  routed_slots() {
    support::routed_layer<double> layer(300, 5);
    for (index n = 0; n < 300; ++n) {
      for (index e = 0; e < 5; ++e) {
        if (e != 2 && (n * 7 + e * 3) % 4 == 0) layer.turn_on(n, e, 1.0);
      }
    }
    const index slots = ops::count_slots(ctx, layer.mask.view(), 5);
    s = make_segments(ctx.memory, 300, 5, slots);
    const auto gates = ctx.memory.take<double>(slots);
    ops::build_segments(ctx, layer.mask.view(), layer.gates.view(), s, gates);
  }
};

}  // namespace

TEST_SUITE("ops/slot_dropout") {
  TEST_CASE_TEMPLATE("a slot drops what dropout of all tokens and experts drops", T,
                     TALPA_SCALARS) {
    const routed_slots routed;
    const segments<cpu>& s = routed.s;
    support::test_random random(15);
    // Rows that begin anywhere in a block of four random words.
    for (const index ranks : {1, 3, 8, 71}) {
      CAPTURE(ranks);
      const matrix<T, cpu> x = support::random_matrix<T>(random, s.capacity(), ranks);
      // The same numbers as [N, E R], which dropout itself then drops.
      matrix<T, cpu> wide(300, 5 * ranks);
      const auto at = [&](index i, index r) {
        index e = 0;
        while (s.offsets[e + 1] <= i) ++e;
        return &wide(s.token_of_slot[i], e * ranks + r);
      };
      for (index i = 0; i < s.capacity(); ++i) {
        for (index r = 0; r < ranks; ++r) *at(i, r) = x(i, r);
      }
      context<cpu> one(1);
      ops::dropout(one, stream, keep_half, wide, wide.view());
      matrix<T, cpu> expected(s.capacity(), ranks);
      for (index i = 0; i < s.capacity(); ++i) {
        for (index r = 0; r < ranks; ++r) expected(i, r) = *at(i, r);
      }
      for (const int threads : {1, 2, 3}) {
        context<cpu> ctx(threads);
        support::padded<T> y(s.capacity(), ranks);
        ops::slot_dropout(ctx, s, stream, keep_half, x, y.view());
        CHECK(y.intact());
        CHECK(support::same_bits(y.view(), expected.view()));
        matrix<T, cpu> in_place = x;
        ops::slot_dropout(ctx, s, stream, keep_half, in_place, in_place.view());
        CHECK(support::same_bits(in_place.view(), expected.view()));
      }
    }
  }

  TEST_CASE("no slots are legal, and places behind the last slot are left alone") {
    context<cpu> ctx(1);
    segments<cpu> s = make_segments(ctx.memory, 0, 2, 3);
    s.offsets[0] = s.offsets[1] = s.offsets[2] = 0;
    matrix<float, cpu> y(3, 2);
    y(2, 1) = 5.0f;
    ops::slot_dropout(ctx, s, stream, keep_half, y, y.view());
    CHECK(y(2, 1) == 5.0f);
  }

  TEST_CASE("slot_dropout names what does not fit") {
    const routed_slots routed;
    context<cpu> ctx(1);
    matrix<float, cpu> x(4, 3), y(routed.s.capacity(), 3);
    CHECK_THROWS_AS(ops::slot_dropout(ctx, routed.s, stream, keep_half, x, y.view()), shape_error);
    CHECK_THROWS_AS(ops::slot_dropout(ctx, routed.s, stream, keep_half, y, x.view()), shape_error);
    CHECK_THROWS_WITH_AS(
        ops::slot_dropout(ctx, routed.s, stream, 0.0f, y, y.view()),
        "talpa::ops::slot_dropout: 'keep_probability' is 0, expected a number in (0, 1]",
        value_error);
  }
}

}  // namespace talpa::slot_dropout_test
