// SPDX-License-Identifier: Apache-2.0
#include "support/routed.hpp"

#include <talpa/routing/record.hpp>

#include <doctest/doctest.h>

namespace talpa::record_test {

using namespace support;

namespace {

template <class Batch, class Recorded>
concept can_replay = requires(Batch batch, Recorded&& recorded) {
  talpa::replay(batch, static_cast<Recorded&&>(recorded));
};

}  // namespace

TEST_SUITE("routing/record") {
  TEST_CASE("record copies a routing that outlives the step") {
    test_random random(3);
    routed_layer<float> layer = random_layer<float>(random, 20, 40, 3);
    const routing<float, cpu> kept = record(layer.view().routing);
    const routing<float, cpu> again = record(routing_view<float, cpu>{layer.gates, layer.mask});
    CHECK(kept == again);
    CHECK(kept.mask(7, 1) == layer.mask(7, 1));
    layer.turn_on(4, 39, 0.5);
    CHECK(kept.gates(4, 39) != 0.5f);
    CHECK_FALSE(kept == record(layer.view().routing));
  }

  TEST_CASE("record copies strided views") {
    matrix<float, cpu> gates(3, 8);
    matrix<std::uint32_t, cpu> mask(3, 4);
    gates(2, 5) = 0.25f;
    mask(2, 3) = 4;
    const routing<float, cpu> kept =
        record(routing_view<float, cpu>{gates.view().col_range(3, 3), mask.view().col_range(3, 1)});
    CHECK(kept.gates.cols() == 3);
    CHECK(kept.gates(2, 2) == 0.25f);
    CHECK(kept.view().on(2, 2));
  }

  TEST_CASE("replay names a recorded mask in a batch and keeps the rest of it") {
    routing<double, cpu> kept(6, 3);
    kept.mask(1, 0) = 5;
    batch_info<double, cpu> batch;
    batch.sequence_length = 2;
    const batch_info<double, cpu> again = replay(batch, kept);
    CHECK(again.sequence_length == 2);
    CHECK(again.replay.data == kept.mask.data());
    CHECK(again.replay.rows == 6);
    CHECK(again.replay(1, 0) == 5);
    CHECK_NOTHROW(check_batch("test", again, 6, 3));
    CHECK_THROWS_AS(check_batch("test", again, 4, 3), shape_error);
    // A recording that dies with the expression is refused.
    CHECK(can_replay<batch_info<double, cpu>, const routing<double, cpu>&>);
    CHECK_FALSE(can_replay<batch_info<double, cpu>, routing<double, cpu>>);
  }

  TEST_CASE("to_text prints a small routing as a table") {
    routed_layer<double> layer(3, 3);
    layer.turn_on(0, 1, 1.0);
    layer.turn_on(1, 0, 0.0);
    layer.turn_on(1, 2, 0.125);
    CHECK(to_text(layer.view().routing) ==
          " token       0       1       2\n"
          "     0       .  1.0000       .\n"
          "     1  0.0000       .  0.1250\n"
          "     2       .       .       .\n");
    CHECK(to_text(layer.view().routing, 1) ==
          " token       0       1       2\n"
          "     0       .  1.0000       .\n"
          "and 2 more\n");
  }
}

}  // namespace talpa::record_test
