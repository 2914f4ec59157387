// SPDX-License-Identifier: Apache-2.0
#include "support/parity.hpp"
#include "support/routed.hpp"
#include "support/scalars.hpp"

#include <talpa/core/error.hpp>
#include <talpa/cpu/segments.hpp>
#include <talpa/cuda/segments.hpp>

#include <doctest/doctest.h>

#include <algorithm>

namespace talpa::cuda_segments_test {
using support::device;
using support::on_device;

namespace {

/// Tokens that use between 0 and `most` experts each; stray bits beyond the last expert.
template <class T>
support::routed_layer<T> ragged_layer(index tokens, index experts, index most) {
  support::test_random random(7);
  support::routed_layer<T> layer(tokens, experts);
  for (index n = 0; n < tokens; ++n) {
    for (index k = random.below(most + 1); k > 0; --k) {
      layer.turn_on(n, random.below(experts), random.uniform(-1.0, 1.0));
    }
    if (experts % 32 != 0) layer.mask(n, experts / 32) |= ~0u << (experts % 32);
  }
  return layer;
}

/// A vector with a place before and behind it that must stay as it is.
template <class T>
struct device_vector {
  matrix<T, cpu> filled;
  matrix<T, device> all;
  explicit device_vector(index size) : filled(1, size + 2) {
    std::fill_n(filled.data(), filled.size(), T{77});
    all = to_device<device>(filled.view());
  }
  vector_view<T, device> view() { return {all.data() + 1, filled.cols() - 2}; }
  /// Where it differs from the first `count` of `values`, and from 77 elsewhere.
  std::string difference(const T* values, index count) {
    matrix<T, cpu> expected = filled;
    std::copy_n(values, count, expected.data() + 1);
    return support::bit_difference(to_host(all.view()), expected);
  }
};

/// Segments of the device beside those of the host, `extra` places more than needed (or fewer).
template <class T>
std::string build_difference(const support::routed_layer<T>& layer, index extra) {
  const index tokens = layer.tokens(), experts = layer.experts();
  context<cpu> host(1);
  context<device> ctx;
  on_device<T> gates(layer.gates);
  on_device<std::uint32_t> mask(layer.mask);
  const index count = ops::count_slots(host, layer.mask, experts);
  if (ops::count_slots(ctx, mask.view(), experts) != count) return "counts differ";

  const segments<cpu> expected = make_segments(host.memory, tokens, experts, count);
  const auto expected_gates = host.memory.take<T>(count);
  ops::build_segments(host, layer.mask, layer.gates, expected, expected_gates);

  const index places = count + extra, used = std::min(places, count);
  device_vector<index> offsets(experts + 1), slot_offset_of_token(tokens + 1);
  device_vector<std::int32_t> token_of_slot(places), slot_of_token(places);
  device_vector<T> gate_of_slot(places);
  const segments<device> found{offsets.view(), token_of_slot.view(), slot_offset_of_token.view(),
                               slot_of_token.view()};
  ops::build_segments(ctx, mask.view(), gates.view(), found, gate_of_slot.view());
  ctx.synchronise();
  std::string different =
      offsets.difference(expected.offsets.data, experts + 1) +
      token_of_slot.difference(expected.token_of_slot.data, used) +
      slot_offset_of_token.difference(expected.slot_offset_of_token.data, tokens + 1) +
      slot_of_token.difference(expected.slot_of_token.data, used) +
      gate_of_slot.difference(expected_gates.data, used);
  if (extra < 0) return different;

  support::test_random random(8);
  matrix<T, cpu> dgate = support::random_matrix<T>(random, 1, places);
  if (places > 0) dgate(0, 0) = -T{0};  // a sum from +0 hides its sign
  auto device_dgate = to_device<device>(dgate.view());
  const segments<cpu> longer{expected.offsets,
                             {expected.token_of_slot.data, places},
                             expected.slot_offset_of_token,
                             {expected.slot_of_token.data, places}};
  for (const grad_mode mode : {grad_mode::overwrite, grad_mode::accumulate}) {
    matrix<T, cpu> dgates = support::random_matrix<T>(random, tokens, experts);
    on_device<T> device_dgates(dgates);
    ops::build_segments_backward(host, layer.mask, longer, {dgate.data(), places}, dgates.view(),
                                 mode);
    ops::build_segments_backward(ctx, mask.view(), found, {device_dgate.data(), places},
                                 device_dgates.view(), mode);
    ctx.synchronise();
    different += support::bit_difference(device_dgates.now(), dgates);
    if (!device_dgates.intact()) different += "something else was written";
  }
  return different;
}

}  // namespace

TEST_SUITE("cuda/segments") {
  TEST_CASE_TEMPLATE("segments and gates have the bits of the host", T, TALPA_SCALARS) {
    for (const index experts : {index{1}, index{5}, index{32}, index{70}}) {
      for (const index tokens : {index{0}, index{1}, support::device_size(129, 5003)}) {
        CAPTURE(experts);
        CAPTURE(tokens);
        CHECK(build_difference(ragged_layer<T>(tokens, experts, 5), 0) == "");
      }
    }
  }

  TEST_CASE("more chunks of tokens than lanes of a warp") {
    CHECK(build_difference(ragged_layer<float>(32 * 33 + 1, 2, 2), 3) == "");
  }

  TEST_CASE("places beyond the slots stay as they are, slots beyond the places are left out") {
    const auto layer = ragged_layer<float>(40, 6, 3);
    CHECK(build_difference(layer, 4) == "");
    CHECK(build_difference(layer, -4) == "");
    CHECK(build_difference(ragged_layer<float>(3, 4, 0), 2) == "");
  }

  TEST_CASE("a checked context refuses more slots than places") {
    const auto layer = ragged_layer<float>(40, 6, 3);
    context<device> ctx;
    ctx.checked = true;
    on_device<float> gates(layer.gates);
    on_device<std::uint32_t> mask(layer.mask);
    const index count = ops::count_slots(ctx, mask.view(), 6);
    const auto build = [&](index places) {
      const segments<device> s = make_segments(ctx.memory, 40, 6, places);
      ops::build_segments(ctx, mask.view(), gates.view(), s, ctx.memory.take<float>(places));
    };
    CHECK_NOTHROW(build(count));
    CHECK_THROWS_AS(build(count - 1), shape_error);
  }
}

}  // namespace talpa::cuda_segments_test
