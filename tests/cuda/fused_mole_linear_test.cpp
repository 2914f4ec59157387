// SPDX-License-Identifier: Apache-2.0
#include "products.hpp"
#include "support/parity.hpp"
#include "support/stored.hpp"

#include <talpa/cpu/add.hpp>
#include <talpa/cpu/bias.hpp>
#include <talpa/cpu/copy.hpp>
#include <talpa/cpu/dropout.hpp>
#include <talpa/cpu/fill.hpp>
#include <talpa/cpu/gather.hpp>
#include <talpa/cpu/gemm.hpp>
#include <talpa/cpu/grouped_gemm.hpp>
#include <talpa/cpu/rank_gate.hpp>
#include <talpa/cpu/reduce.hpp>
#include <talpa/cpu/routed_linear.hpp>
#include <talpa/cpu/segments.hpp>
#include <talpa/cpu/select.hpp>
#include <talpa/cuda/add.hpp>
#include <talpa/cuda/convert.hpp>
#include <talpa/cuda/group_loss.hpp>
#include <talpa/cuda/mole_route.hpp>
#include <talpa/cuda/routing_sums.hpp>
#include <talpa/layers/fused_mole_linear.hpp>
#include <talpa/layers/mole_linear.hpp>
#include <talpa/losses/load_balance.hpp>
#include <talpa/routing/statistics.hpp>
#include <talpa/scorers/linear_scorer.hpp>
#include <talpa/selectors/dynamic_entropy.hpp>
#include <talpa/selectors/top_k.hpp>

#include <doctest/doctest.h>

#include <string>
#include <type_traits>

namespace talpa::fused_mole_linear_test {

namespace {

using support::device;
using support::distance;
using support::storage_roundoff;
using support::stored;
using support::whole;

struct sizes {
  index tokens, inputs, outputs, experts, rank;
};

/// One forward and backward on the device, and the layer of the host in double with the same
/// weights and the mask of the device.
template <class S, class Selector>
void compare(const Selector& selector, const sizes& z, bool room) {
  CAPTURE(z.tokens);
  CAPTURE(z.experts);
  CAPTURE(room);
  support::test_random random(11);
  generator numbers(7);
  context<device> ctx;
  fused_mole_linear<Selector, S> layer{selector, lora{.rank = z.rank, .alpha = 8.0}, z.experts};
  const auto w = stored<S>(support::random_matrix<double>(random, z.outputs, z.inputs, 0.2));
  const auto base = to_device<device>(w.view());
  auto p = layer.init(ctx, std::as_const(base).view(), numbers);
  // B of a fresh adapter is zero, which would hide most of backward.
  const auto b = support::random_matrix<float>(random, z.experts * z.rank, z.outputs, 0.3);
  to_device<float, device>(b.view(), p.b.value());
  layer.refresh(ctx, p);

  const auto x = stored<S>(support::random_matrix<double>(random, z.tokens, z.inputs));
  const auto dy = stored<S>(support::random_matrix<double>(random, z.tokens, z.outputs));
  const index x_cols = room ? layer.padded_inputs(z.inputs) : z.inputs;
  const index dy_cols = room ? layer.padded_outputs(z.outputs) : z.outputs;
  matrix<S, device> x_device(z.tokens, x_cols), dy_device(z.tokens, dy_cols);
  to_device<S, device>(x.view(), x_device.view().col_range(0, z.inputs));
  to_device<S, device>(dy.view(), dy_device.view().col_range(0, z.outputs));
  matrix<S, device> y(z.tokens, z.outputs), dx(z.tokens, z.inputs);
  const auto kept = layer.forward(ctx, p, x_device.view(), y.view(), mode::training);
  layer.backward(ctx, p, kept, x_device.view(), dy_device.view(), dx.view(), grad_mode::overwrite,
                 mode::training);
  ctx.synchronise();
  const auto mask = to_host(kept.mask);

  // The routing has the bits of the host from the same logits.
  context<cpu> host(1);
  {
    const auto logits = to_host(kept.routed.logits);
    matrix<float, cpu> gates(z.tokens, z.experts);
    matrix<std::uint32_t, cpu> on(z.tokens, mask_words(z.experts));
    ops::select(host, selector, logits, {}, gates.view(), on.view());
    CHECK(support::bit_difference(to_host(kept.gates), gates) == "");
    for (index i = 0; i < on.size(); ++i) CHECK(on.data()[i] == mask.data()[i]);
  }

  using slow = mole_linear<router<linear_scorer, Selector>, lora>;
  const slow reference{{{}, selector}, layer.expert, z.experts, strategy::dense_masked};
  generator other(7);
  affine_params<double, cpu> frozen;
  frozen.weight = parameter<double, cpu>("w", whole<S>(w.view()));
  frozen.freeze();
  auto q = reference.template init<double, cpu>(std::move(frozen), other);
  const auto rounded = [&](const parameter<float, device>& from, parameter<double, cpu>& to) {
    const auto values = to_host(from.value());
    for (index i = 0; i < values.size(); ++i) {
      to.value().data[i] =
          static_cast<double>(static_cast<float>(static_cast<S>(values.data()[i])));
    }
  };
  rounded(p.router, q.router.scorer.weight);
  rounded(p.a, q.expert.a);
  rounded(p.b, q.expert.b);
  const auto xd = whole<S>(x.view()), dyd = whole<S>(dy.view());
  matrix<double, cpu> yd(z.tokens, z.outputs), dxd(z.tokens, z.inputs);
  batch_info<double, cpu> batch;
  batch.replay = mask.view();
  const auto keptd = reference.forward(host, q, xd, yd.view(), mode::training, batch);
  reference.backward(host, q, keptd, xd, dyd, dxd.view(), grad_mode::overwrite);

  // y, dx and what they are made of are rounded to the storage three times at most.
  const double limit = 3.0 * storage_roundoff<S>() * (std::is_same_v<S, float> ? 32.0 : 1.0);
  if (z.tokens == 0) return;
  const auto compare_one = [&](const std::string& what, const matrix<double, cpu>& got,
                               const matrix<double, cpu>& wanted) {
    CAPTURE(what);
    CHECK(distance(got, wanted) <= limit);
  };
  compare_one("y", whole<S>(to_host(std::as_const(y).view()).view()), yd);
  compare_one("dx", whole<S>(to_host(std::as_const(dx).view()).view()), dxd);
  const auto gradient = [&](const std::string& what, const parameter<float, device>& got,
                            const parameter<double, cpu>& wanted) {
    compare_one(what, support::in_double(to_host(got.grad())), matrix<double, cpu>(wanted.grad()));
  };
  gradient("dA", p.a, q.expert.a);
  gradient("dB", p.b, q.expert.b);
  gradient("dWr", p.router, q.router.scorer.weight);
}

}  // namespace

TEST_SUITE("cuda/fused_mole_linear") {
  TEST_CASE_TEMPLATE("forward and backward agree with mole_linear of the host", S, float,
                     bfloat16) {
    using renormalised = top_k<gate::renormalised>;
    for (const bool room : {false, true}) {
      compare<S>(renormalised{2}, {support::device_size(37, 2049), 24, 40, 8, 4}, room);
      compare<S>(renormalised{1}, {5, 16, 16, 1, 2}, room);
    }
    compare<S>(renormalised{3}, {support::device_size(19, 517), 17, 9, 11, 3}, false);
    compare<S>(renormalised{2}, {0, 16, 16, 4, 2}, false);
  }

  TEST_CASE("a forward that measures leaves what measure does, and losses read it") {
    using S = bfloat16;
    const index tokens = support::device_size(21, 1500), experts = 5;
    context<device> ctx;
    support::test_random random(12);
    generator numbers(8);
    const fused_mole_linear<top_k<gate::renormalised>, S> layer{{2}, lora{.rank = 2}, experts};
    const auto w = stored<S>(support::random_matrix<double>(random, 6, 7));
    const auto base = to_device<device>(w.view());
    auto p = layer.init(ctx, std::as_const(base).view(), numbers);
    auto x = to_device<device>(stored<S>(support::random_matrix<double>(random, tokens, 7)).view());
    matrix<S, device> y(tokens, 6), again(tokens, 6);
    matrix<std::uint8_t, cpu> flags(tokens, 1);
    for (index n = 0; n < tokens; ++n) flags(n, 0) = n % 4 == 2 ? 0 : 1;
    const auto real = to_device<device>(flags.view());
    const vector_view<const std::uint8_t, device> padding{real.data(), tokens};
    const auto plain = layer.forward(ctx, p, x.view(), y.view(), mode::training, padding);
    const auto found = make_statistics<float>(ctx.memory, experts);
    const auto kept = layer.forward(ctx, p, x.view(), again.view(), mode::training, padding,
                                    found.wanted(grad_mode::overwrite));
    const load_balance<balance::per_selection, balance::per_layer> even;
    const auto expected = even.forward(ctx, plain.routed), loss = even.forward(ctx, kept.routed);
    const statistics_report wanted(measure(ctx, plain.routed)), report(found);
    ctx.synchronise();
    CHECK(distance(whole<S>(to_host(again.view()).view()), whole<S>(to_host(y.view()).view())) ==
          0.0);
    CHECK(report.tokens == wanted.tokens);
    CHECK(report.counts == wanted.counts);
    CHECK(report.importance == wanted.importance);
    CHECK(report.probability == wanted.probability);
    CHECK(report.entropy == wanted.entropy);
    CHECK(report.squared_logsumexp == wanted.squared_logsumexp);
    CHECK(support::bit_difference(to_host(loss.value), to_host(expected.value)) == "");
  }

  TEST_CASE("what does not fit is refused before any work") {
    using S = bfloat16;
    using layer_type = fused_mole_linear<top_k<gate::renormalised>, S>;
    context<device> ctx;
    generator random(3);
    const layer_type layer{{2}, lora{.rank = 2}, 4};
    const matrix<S, device> base(6, 5);
    auto p = layer.init(ctx, base.view(), random);
    matrix<S, device> x(3, 5), y(3, 6), dy(3, 6), wide(3, 7);
    CHECK_THROWS_WITH_AS(layer.forward(ctx, p, wide.view(), y.view(), mode::training),
                         "talpa::fused_mole_linear: 'x' has shape [3, 7], expected [3, 5] = "
                         "tokens, input width of the base, or padded",
                         shape_error);
    CHECK_THROWS_WITH_AS(layer.forward(ctx, p, x.view(), wide.view(), mode::training),
                         "talpa::fused_mole_linear: 'y' has shape [3, 7], expected [3, 6] = "
                         "tokens, output width of the base",
                         shape_error);
    CHECK(ctx.memory.used() == 0);
    const auto kept = layer.forward(ctx, p, x.view(), y.view(), mode::training);
    CHECK_THROWS_WITH_AS(
        layer.backward(ctx, p, kept, x.view(), wide.view(), {}, grad_mode::ignore, mode::training),
        "talpa::fused_mole_linear: 'dy' has shape [3, 7], expected [3, 6] = "
        "tokens, output width of the base, or padded",
        shape_error);
    CHECK_THROWS_WITH_AS((layer_type{{2}, lora{.dropout = 0.5}, 4}).validate(),
                         "talpa::fused_mole_linear: 'expert.dropout' is 0.5, expected 0 = no "
                         "dropout",
                         value_error);
    CHECK_THROWS_WITH_AS((layer_type{{2}, lora{}, 0}).validate(),
                         "talpa::fused_mole_linear: 'experts' is 0, expected >= 1 = at least one "
                         "expert",
                         value_error);
    CHECK_THROWS_WITH_AS((layer_type{{5}, lora{}, 4}).validate(),
                         "talpa::top_k: 'k' is 5, expected 1..4 = experts", value_error);
    const matrix<float, device> logits(1, 513);
    matrix<float, device> gates(1, 513);
    matrix<std::uint32_t, device> mask(1, 17);
    CHECK_THROWS_WITH_AS(
        ops::select(ctx, top_k<gate::raw>{2}, logits.view(), {}, gates.view(), mask.view()),
        "talpa::top_k: 'experts' is 513, expected 1..512 = experts of a row on a "
        "device",
        value_error);
  }

  TEST_CASE("a router that sends uncertain tokens to all experts agrees, too") {
    compare<float16>(dynamic_entropy<>{.threshold = 0.7},
                     {support::device_size(33, 1025), 32, 24, 16, 2}, true);
  }
}

}  // namespace talpa::fused_mole_linear_test
