// SPDX-License-Identifier: Apache-2.0
#include "support/routed.hpp"
#include "support/tolerance.hpp"

#include <talpa/cpu/segments.hpp>
#include <talpa/ops/segments.hpp>

#include <doctest/doctest.h>

#include <utility>
#include <vector>

namespace talpa::segments_test {

using namespace support;

namespace {

/// Segments by sorting (expert, token) pairs in the plainest way.
struct slow_segments {
  std::vector<index> offsets, token_of_slot, slot_offset_of_token, slot_of_token;
  std::vector<double> gate_of_slot;

  explicit slow_segments(const routed_layer<double>& layer) {
    std::vector<std::vector<index>> slots(static_cast<std::size_t>(layer.tokens()));
    for (index e = 0; e < layer.experts(); ++e) {
      offsets.push_back(static_cast<index>(token_of_slot.size()));
      for (index n = 0; n < layer.tokens(); ++n) {
        if (!layer.on(n, e)) continue;
        slots[static_cast<std::size_t>(n)].push_back(static_cast<index>(token_of_slot.size()));
        token_of_slot.push_back(n);
        gate_of_slot.push_back(layer.gates(n, e));
      }
    }
    offsets.push_back(static_cast<index>(token_of_slot.size()));
    for (const auto& of_token : slots) {
      slot_offset_of_token.push_back(static_cast<index>(slot_of_token.size()));
      for (const index slot : of_token) slot_of_token.push_back(slot);
    }
    slot_offset_of_token.push_back(static_cast<index>(slot_of_token.size()));
  }
};

template <class V>
std::vector<index> integers(const V& v, index count) {
  std::vector<index> r;
  for (index i = 0; i < count; ++i) r.push_back(static_cast<index>(v[i]));
  return r;
}

/// Tokens that use between 0 and `most` experts each, drawn at random.
routed_layer<double> ragged_layer(test_random& random, index tokens, index experts, index most) {
  routed_layer<double> layer(tokens, experts);
  for (index n = 0; n < tokens; ++n) {
    const index count = random.below(most + 1);
    for (index k = 0; k < count; ++k) {
      layer.turn_on(n, random.below(experts), random.uniform(0.0, 1.0));
    }
  }
  return layer;
}

struct built {
  segments<cpu> slots;
  vector_view<double, cpu> gates;
  index count;
};
built build(context<cpu>& ctx, const routed_layer<double>& layer, index extra = 0) {
  const index count = ops::count_slots(ctx, layer.mask, layer.experts());
  built b{make_segments(ctx.memory, layer.tokens(), layer.experts(), count + extra),
          ctx.memory.take<double>(count + extra), count};
  ops::build_segments(ctx, layer.mask, layer.gates, b.slots, b.gates);
  return b;
}

}  // namespace

TEST_SUITE("ops/segments") {
  TEST_CASE("build_segments sorts the slots of a routing worked by hand") {
    // token 0: experts 0, 2; token 1: none; token 2: expert 2; token 3: experts 0, 1.
    routed_layer<double> layer(4, 3);
    layer.turn_on(0, 0, 0.1);
    layer.turn_on(0, 2, 0.2);
    layer.turn_on(2, 2, 0.3);
    layer.turn_on(3, 0, 0.4);
    layer.turn_on(3, 1, 0.0);  // on, with a gate of zero
    context<cpu> ctx(1);
    const built b = build(ctx, layer);
    CHECK(b.count == 5);
    CHECK(integers(b.slots.offsets, 4) == std::vector<index>{0, 2, 3, 5});
    CHECK(integers(b.slots.token_of_slot, 5) == std::vector<index>{0, 3, 3, 0, 2});
    CHECK(integers(b.slots.slot_offset_of_token, 5) == std::vector<index>{0, 2, 2, 3, 5});
    CHECK(integers(b.slots.slot_of_token, 5) == std::vector<index>{0, 3, 4, 1, 2});
    CHECK(b.gates[0] == 0.1);
    CHECK(b.gates[1] == 0.4);
    CHECK(b.gates[2] == 0.0);
    CHECK(b.gates[3] == 0.2);
    CHECK(b.gates[4] == 0.3);
  }

  TEST_CASE("build_segments agrees with a plain sort for any shape and number of threads") {
    test_random random(4);
    for (const index experts : {1, 2, 31, 32, 33, 64, 100}) {
      // Few slots for each expert of a block, many, and more than are staged.
      for (const auto& shape : {std::pair<index, index>{1, 5},
                                {5, 5},
                                {255, 5},
                                {256, 5},
                                {257, 5},
                                {900, 5},
                                {257, experts},
                                {900, experts},
                                {600, 6 * experts}}) {
        const index tokens = shape.first, most = shape.second;
        const routed_layer<double> layer = ragged_layer(random, tokens, experts, most);
        const slow_segments expected(layer);
        const auto slots = static_cast<index>(expected.token_of_slot.size());
        CAPTURE(experts);
        CAPTURE(tokens);
        CAPTURE(most);
        for (const int threads : {1, 2, 3}) {
          context<cpu> ctx(threads);
          const built b = build(ctx, layer);
          CHECK(b.count == slots);
          CHECK(integers(b.slots.offsets, experts + 1) == expected.offsets);
          CHECK(integers(b.slots.token_of_slot, slots) == expected.token_of_slot);
          CHECK(integers(b.slots.slot_offset_of_token, tokens + 1) ==
                expected.slot_offset_of_token);
          CHECK(integers(b.slots.slot_of_token, slots) == expected.slot_of_token);
          CHECK(std::vector<double>(b.gates.data, b.gates.data + slots) == expected.gate_of_slot);
        }
      }
    }
  }

  TEST_CASE("build_segments handles no tokens, no experts, tokens without experts, and all on") {
    context<cpu> ctx(2);
    const built none = build(ctx, routed_layer<double>(0, 3));
    CHECK(integers(none.slots.offsets, 4) == std::vector<index>{0, 0, 0, 0});
    CHECK(integers(none.slots.slot_offset_of_token, 1) == std::vector<index>{0});
    const built idle = build(ctx, routed_layer<double>(2, 3));
    CHECK(integers(idle.slots.slot_offset_of_token, 3) == std::vector<index>{0, 0, 0});
    const built nobody = build(ctx, routed_layer<double>(2, 0));
    CHECK(integers(nobody.slots.offsets, 1) == std::vector<index>{0});
    CHECK(integers(nobody.slots.slot_offset_of_token, 3) == std::vector<index>{0, 0, 0});
    routed_layer<double> dense(2, 3);
    for (index n = 0; n < 2; ++n) {
      for (index e = 0; e < 3; ++e) dense.turn_on(n, e, 1.0);
    }
    const built all = build(ctx, dense);
    CHECK(integers(all.slots.token_of_slot, 6) == std::vector<index>{0, 1, 0, 1, 0, 1});
    CHECK(integers(all.slots.slot_of_token, 6) == std::vector<index>{0, 2, 4, 1, 3, 5});
  }

  TEST_CASE("build_segments leaves places beyond the last slot alone") {
    routed_layer<double> layer(2, 2);
    layer.turn_on(1, 0, 0.5);
    context<cpu> ctx(1);
    const index count = ops::count_slots(ctx, layer.mask, 2);
    const segments<cpu> s = make_segments(ctx.memory, 2, 2, count + 2);
    const vector_view<double, cpu> gates = ctx.memory.take<double>(count + 2);
    for (index i = 0; i < 3; ++i) {
      s.token_of_slot[i] = s.slot_of_token[i] = -7;
      gates[i] = -7.0;
    }
    ops::build_segments(ctx, layer.mask, layer.gates, s, gates);
    CHECK(integers(s.token_of_slot, 3) == std::vector<index>{1, -7, -7});
    CHECK(integers(s.slot_of_token, 3) == std::vector<index>{0, -7, -7});
    CHECK(gates[0] == 0.5);
    CHECK(gates[1] == -7.0);
  }

  TEST_CASE("build_segments ignores bits of the last word beyond the experts") {
    routed_layer<double> layer(2, 33);
    layer.turn_on(0, 32, 0.5);
    layer.mask(1, 1) = 0xfffffffeu;
    context<cpu> ctx(1);
    const built b = build(ctx, layer);
    CHECK(b.count == 1);
    CHECK(b.slots.offsets[33] == 1);
    CHECK(b.slots.token_of_slot[0] == 0);
  }

  TEST_CASE("build_segments_backward hands each slot's gradient to its gate") {
    test_random random(6);
    const routed_layer<double> layer = ragged_layer(random, 600, 35, 4);
    for (const int threads : {1, 3}) {
      context<cpu> ctx(threads);
      const built b = build(ctx, layer, 5);
      for (index i = 0; i < b.count; ++i) b.gates[i] = static_cast<double>(i + 1);
      matrix<double, cpu> over(600, 35), added(600, 35), ignored(600, 35);
      for (auto* m : {&over, &added, &ignored}) std::fill_n(m->data(), m->size(), 1000.0);
      ops::build_segments_backward(ctx, layer.mask, b.slots, b.gates, over.view(),
                                   grad_mode::overwrite);
      ops::build_segments_backward(ctx, layer.mask, b.slots, b.gates, added.view(),
                                   grad_mode::accumulate);
      ops::build_segments_backward(ctx, layer.mask, b.slots, b.gates, ignored.view(),
                                   grad_mode::ignore);
      table expected(600, 35);
      double slot = 0.0;
      for (index e = 0; e < 35; ++e) {
        for (index n = 0; n < 600; ++n) {
          if (layer.on(n, e)) expected(n, e) = ++slot;
        }
      }
      CHECK(difference(over.view(), expected, 0.0) == "");
      CHECK(difference(added.view(), each(expected, [](double x) { return x + 1000.0; }), 0.0) ==
            "");
      CHECK(largest(each(to_table(ignored.view()), [](double x) { return x - 1000.0; })) == 0.0);
    }
  }

  TEST_CASE("build_segments refuses what does not fit") {
    context<cpu> ctx(1);
    routed_layer<double> layer(3, 2);
    layer.turn_on(0, 0, 1.0);
    layer.turn_on(2, 1, 1.0);
    const auto build_with = [&](index tokens, index experts, index capacity, index gates) {
      const segments<cpu> s = make_segments(ctx.memory, tokens, experts, capacity);
      ops::build_segments(ctx, layer.mask, layer.gates, s, ctx.memory.take<double>(gates));
    };
    CHECK_NOTHROW(build_with(3, 2, 2, 2));
    CHECK_THROWS_WITH_AS(
        build_with(3, 2, 1, 1),
        "talpa::ops::build_segments: 'token_of_slot' has shape [1], expected [2] = "
        "set bits of mask, or more",
        shape_error);
    CHECK_THROWS_WITH_AS(
        build_with(4, 2, 2, 2),
        "talpa::ops::build_segments: 'slot_offset_of_token' has shape [5], expected "
        "[4] = tokens + 1",
        shape_error);
    CHECK_THROWS_WITH_AS(build_with(3, 3, 2, 2),
                         "talpa::ops::build_segments: 'gates' has shape [3, 2], expected [3, 3] = "
                         "tokens, experts",
                         shape_error);
    CHECK_THROWS_WITH_AS(build_with(3, 33, 2, 2),
                         "talpa::ops::build_segments: 'mask' has shape [3, 1], expected [3, 2] = "
                         "tokens, mask words of the experts",
                         shape_error);
    CHECK_THROWS_WITH_AS(build_with(3, 2, 2, 3),
                         "talpa::ops::build_segments: 'gate_of_slot' has shape [3], expected [2] = "
                         "size of token_of_slot",
                         shape_error);
    CHECK_THROWS_WITH_AS(ops::count_slots(ctx, layer.mask, 40),
                         "talpa::ops::count_slots: 'mask' has shape [3, 1], expected [3, 2] = "
                         "tokens, mask words of the experts",
                         shape_error);
  }
}

}  // namespace talpa::segments_test
