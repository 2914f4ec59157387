// SPDX-License-Identifier: Apache-2.0
#include "support/parity.hpp"
#include "support/scalars.hpp"

#include <talpa/cpu/slot_dropout.hpp>
#include <talpa/cuda/slot_dropout.hpp>

#include <doctest/doctest.h>

#include <cstdint>

namespace talpa::cuda_slot_dropout_test {

namespace {

using support::device;
using support::on_device;

constexpr random_stream stream{42, 7};
constexpr index experts = 5;

/// Slots of some tokens at 5 experts, none at expert 2 and none at the last; three places of
/// `capacity` are left over.
struct some_slots {
  matrix<index, cpu> offsets{1, experts + 1};
  matrix<std::int32_t, cpu> tokens;
  index capacity = 0;

  explicit some_slots(index rows) : tokens(1, rows * experts + 3) {
    index slots = 0;
    for (index e = 0; e < experts; ++e) {
      offsets(0, e) = slots;
      for (index n = 0; n < rows && e != 2 && e != experts - 1; ++n) {
        if ((n * 7 + e * 3) % 4 != 1) tokens(0, slots++) = static_cast<std::int32_t>(n);
      }
    }
    offsets(0, experts) = slots;
    capacity = slots + 3;
  }
  template <class B>
  segments<B> on(matrix<index, B>& o, matrix<std::int32_t, B>& t) const {
    segments<B> s;
    s.offsets = {o.view().data, experts + 1};
    s.token_of_slot = {t.view().data, capacity};
    return s;
  }
};

}  // namespace

TEST_SUITE("cuda/slot_dropout") {
  TEST_CASE_TEMPLATE("slots drop what they drop on the host, the places behind them stay", T,
                     TALPA_SCALARS) {
    context<device> ctx;
    context<cpu> host(1);
    support::test_random random(15);
    for (const index rows : {index{0}, index{1}, support::device_size(37, 5003)}) {
      some_slots slots(rows);
      auto offsets = to_device<device>(slots.offsets.view());
      auto tokens = to_device<device>(slots.tokens.view());
      const segments<cpu> here = slots.on<cpu>(slots.offsets, slots.tokens);
      const segments<device> there = slots.on<device>(offsets, tokens);
      // Rows that begin anywhere in a block of four random words.
      for (const index ranks : {1, 3, 8, 35}) {
        CAPTURE(rows);
        CAPTURE(ranks);
        on_device<T> x(support::random_matrix<T>(random, slots.capacity, ranks));
        on_device<T> y(support::random_matrix<T>(random, slots.capacity, ranks));
        matrix<T, cpu> expected = y.host();
        ops::slot_dropout(host, here, stream, 0.7f, x.host(), expected.view());
        ops::slot_dropout(ctx, there, stream, 0.7f, x.view(), y.view());
        ops::slot_dropout(ctx, there, stream, 0.7f, x.view(), x.view());
        ctx.synchronise();
        CHECK(support::bit_difference(y.now(), expected) == "");
        CHECK(y.intact());
        // In place: the places behind the slots keep what x held.
        matrix<T, cpu> in_place = x.host();
        ops::slot_dropout(host, here, stream, 0.7f, in_place, in_place.view());
        CHECK(support::bit_difference(x.now(), in_place) == "");
        CHECK(x.intact());
      }
    }
  }
}

}  // namespace talpa::cuda_slot_dropout_test
