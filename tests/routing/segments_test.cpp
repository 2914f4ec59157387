// SPDX-License-Identifier: Apache-2.0
#include "support/routed.hpp"

#include <talpa/cpu/segments.hpp>
#include <talpa/routing/segments.hpp>

#include <doctest/doctest.h>

namespace talpa::segments_test {

using namespace support;

TEST_SUITE("routing/segments") {
  TEST_CASE("make_segmented holds exactly the slots of a routing") {
    routed_layer<float> layer(3, 2);
    layer.turn_on(0, 1, 0.25);
    layer.turn_on(2, 0, 0.5);
    layer.turn_on(2, 1, 0.75);
    context<cpu> ctx(1);
    const auto s = make_segmented<float>(ctx, layer.view().routing);
    CHECK(s.slots.capacity() == 3);
    CHECK(s.slots.offsets[1] == 1);
    CHECK(s.gate_of_slot.size == 3);
    CHECK(s.gate_of_slot[0] == 0.5f);
    CHECK(s.gate_of_slot[1] == 0.25f);
    CHECK(s.gate_of_slot[2] == 0.75f);
  }

  TEST_CASE("make_segmented takes a bound instead of a count") {
    test_random random(2);
    const routed_layer<double> layer = random_layer<double>(random, 50, 6, 2, 4);
    context<cpu> ctx(2);
    const auto exact = make_segmented<double>(ctx, layer.view().routing);
    const auto bounded = make_segmented<double>(ctx, layer.view().routing, 100);
    REQUIRE(exact.slots.capacity() < 100);
    CHECK(bounded.slots.capacity() == 100);
    CHECK(bounded.slots.offsets[6] == exact.slots.capacity());
    for (index i = 0; i < exact.slots.capacity(); ++i) {
      CHECK(bounded.slots.token_of_slot[i] == exact.slots.token_of_slot[i]);
      CHECK(bounded.gate_of_slot[i] == exact.gate_of_slot[i]);
    }
  }

  TEST_CASE("make_segmented takes as many bytes as segments_bytes says, and of an empty routing") {
    context<cpu> ctx(1);
    ctx.memory.reserve(1 << 16);
    make_segments(ctx.memory, 37, 5, 74);
    CHECK(ctx.memory.used() == segments_bytes<cpu>(37, 5, 74));
    const routed_layer<float> empty(0, 4);
    const auto s = make_segmented<float>(ctx, empty.view().routing);
    CHECK(s.slots.capacity() == 0);
    for (index e = 0; e <= 4; ++e) CHECK(s.slots.offsets[e] == 0);
  }

  TEST_CASE("make_segmented refuses a negative bound") {
    context<cpu> ctx(1);
    const routed_layer<float> layer(1, 1);
    CHECK_THROWS_WITH_AS(
        make_segmented<float>(ctx, layer.view().routing, -1),
        "talpa::make_segmented: 'capacity' is -1, expected >= 0 = places for slots", value_error);
  }
}

}  // namespace talpa::segments_test
