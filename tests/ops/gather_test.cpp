// SPDX-License-Identifier: Apache-2.0
#include "support/routed.hpp"
#include "support/scalars.hpp"
#include "support/segments.hpp"
#include "support/tolerance.hpp"

#include <talpa/cpu/gather.hpp>
#include <talpa/cpu/segments.hpp>
#include <talpa/ops/gather.hpp>

#include <doctest/doctest.h>

namespace talpa::gather_test {

using namespace support;

TEST_SUITE("ops/gather") {
  TEST_CASE("gather copies rows into slots and combine adds them up, worked by hand") {
    // token 0: experts 0, 1; token 1: none; token 2: expert 0. Slots: (0, 0), (2, 0), (0, 1).
    routed_layer<float> layer(3, 2);
    layer.turn_on(0, 0, 1.0);
    layer.turn_on(0, 1, 1.0);
    layer.turn_on(2, 0, 1.0);
    context<cpu> ctx(1);
    const segments<cpu> s = segments_of(ctx, layer);
    matrix<float, cpu> x(3, 2), slots(3, 2), y(3, 2);
    for (index i = 0; i < 6; ++i) x.data()[i] = static_cast<float>(i + 1);
    ops::gather(ctx, s, x, slots.view());
    CHECK(difference(slots.view(), table(3, 2, {1, 2, 5, 6, 1, 2}), 0.0) == "");

    slots(2, 0) = 10.0f;
    std::fill_n(y.data(), 6, 100.0f);
    ops::combine(ctx, s, slots, y.view(), grad_mode::overwrite);
    CHECK(difference(y.view(), table(3, 2, {11, 4, 0, 0, 5, 6}), 0.0) == "");
    ops::combine(ctx, s, slots, y.view(), grad_mode::accumulate);
    CHECK(difference(y.view(), table(3, 2, {22, 8, 0, 0, 10, 12}), 0.0) == "");
    ops::combine(ctx, s, slots, y.view(), grad_mode::ignore);
    CHECK(difference(y.view(), table(3, 2, {22, 8, 0, 0, 10, 12}), 0.0) == "");
  }

  TEST_CASE_TEMPLATE("combine is the transpose of gather", T, TALPA_SCALARS) {
    // <gather(x), y> = <x, combine(y)> for all x and y.
    test_random random(14);
    const routed_layer<T> layer = random_layer<T>(random, 150, 7, 3, 4);
    context<cpu> ctx(2);
    const segments<cpu> s = segments_of(ctx, layer);
    const index slots = s.capacity();
    const matrix<T, cpu> x = random_matrix<T>(random, 150, 19);
    const matrix<T, cpu> y = random_matrix<T>(random, slots, 19);
    matrix<T, cpu> up(slots, 19), down(150, 19);
    ops::gather(ctx, s, x, up.view());
    ops::combine(ctx, s, y, down.view(), grad_mode::overwrite);
    const auto dot = [](double a, double b) { return a * b; };
    const double left = total(each(to_table(up.view()), to_table(y.view()), dot));
    const double right = total(each(to_table(x.view()), to_table(down.view()), dot));
    const double size = total(absolute(each(to_table(up.view()), to_table(y.view()), dot)));
    // At most 3 slots a token are added in T; the rest is summed in double.
    CHECK(within(left, right, sum_bound<T>(3, size) + 2.0 * sum_bound<double>(slots * 19, size)));
    CHECK(size > 1.0);
  }

  TEST_CASE("gather and combine take strided views, any number of threads, unused places") {
    test_random random(24);
    const routed_layer<double> layer = random_layer<double>(random, 300, 5, 2);
    const matrix<double, cpu> wide = random_matrix<double>(random, 300, 12);
    const matrix_view<const double, cpu> x = wide.view().col_range(3, 7);
    matrix<double, cpu> expected_slots(600, 7), expected(300, 7);
    for (index i = 0, e = 0; e < 5; ++e) {
      for (index n = 0; n < 300; ++n) {
        if (!layer.on(n, e)) continue;
        for (index d = 0; d < 7; ++d) {
          expected_slots(i, d) = x(n, d);
          expected(n, d) += x(n, d);
        }
        ++i;
      }
    }
    for (const int threads : {1, 2, 3}) {
      context<cpu> ctx(threads);
      const segments<cpu> s = segments_of(ctx, layer, 3);
      matrix<double, cpu> slots(603, 9), y(300, 20);
      std::fill_n(slots.data(), slots.size(), -1.0);
      ops::gather(ctx, s, x, slots.view().col_range(1, 7));
      CHECK(same_bits(slots.view().row_range(0, 600).col_range(1, 7), expected_slots.view()));
      CHECK(slots(600, 1) == -1.0);
      CHECK(slots(5, 0) == -1.0);
      CHECK(slots(5, 8) == -1.0);
      ops::clear_unused(ctx, s, slots.view().col_range(1, 7));
      CHECK(same_bits(slots.view().row_range(0, 600).col_range(1, 7), expected_slots.view()));
      for (index i = 600; i < 603; ++i) {
        for (index d = 0; d < 9; ++d) CHECK(slots(i, d) == (d >= 1 && d < 8 ? 0.0 : -1.0));
      }
      ops::combine(ctx, s, slots.view().col_range(1, 7), y.view().col_range(10, 7),
                   grad_mode::overwrite);
      CHECK(same_bits(y.view().col_range(10, 7), expected.view()));
      CHECK(y(0, 9) == 0.0);
    }
  }

  TEST_CASE("gather and combine of no tokens do nothing") {
    context<cpu> ctx(2);
    const routed_layer<float> layer(0, 3);
    const segments<cpu> s = segments_of(ctx, layer);
    matrix<float, cpu> x(0, 4), slots(0, 4);
    CHECK_NOTHROW(ops::gather(ctx, s, x, slots.view()));
    CHECK_NOTHROW(ops::combine(ctx, s, slots, x.view(), grad_mode::overwrite));
  }

  TEST_CASE("gather and combine refuse what does not fit") {
    context<cpu> ctx(1);
    routed_layer<float> layer(3, 2);
    layer.turn_on(0, 0, 1.0);
    const segments<cpu> s = segments_of(ctx, layer);
    matrix<float, cpu> tokens(3, 4), slot(1, 4), wrong(2, 4), narrow(1, 3);
    CHECK_THROWS_WITH_AS(ops::gather(ctx, s, wrong, slot.view()),
                         "talpa::ops::gather: 'x' has shape [2, 4], expected [3, 4] = tokens, any "
                         "width",
                         shape_error);
    CHECK_THROWS_WITH_AS(ops::gather(ctx, s, tokens, narrow.view()),
                         "talpa::ops::gather: 'y' has shape [1, 3], expected [1, 4] = places for "
                         "slots, width of x",
                         shape_error);
    CHECK_THROWS_WITH_AS(ops::combine(ctx, s, wrong, tokens.view(), grad_mode::overwrite),
                         "talpa::ops::combine: 'x' has shape [2, 4], expected [1, 4] = places for "
                         "slots, any width",
                         shape_error);
    CHECK_THROWS_WITH_AS(
        ops::combine(ctx, s, slot, wrong.view(), grad_mode::overwrite),
        "talpa::ops::combine: 'y' has shape [2, 4], expected [3, 4] = tokens, width "
        "of x",
        shape_error);
    CHECK_THROWS_WITH_AS(ops::clear_unused(ctx, s, wrong.view()),
                         "talpa::ops::clear_unused: 'y' has shape [2, 4], expected [1, 4] = places "
                         "for slots, any width",
                         shape_error);
  }
}

}  // namespace talpa::gather_test
