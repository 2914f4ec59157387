// SPDX-License-Identifier: Apache-2.0
#include "products.hpp"
#include "support/parity.hpp"
#include "support/scalars.hpp"
#include "support/stored.hpp"

#include <talpa/cpu/add.hpp>
#include <talpa/cpu/bias.hpp>
#include <talpa/cpu/copy.hpp>
#include <talpa/cpu/dropout.hpp>
#include <talpa/cpu/fill.hpp>
#include <talpa/cpu/gated_activation.hpp>
#include <talpa/cpu/gather.hpp>
#include <talpa/cpu/gemm.hpp>
#include <talpa/cpu/grouped_gemm.hpp>
#include <talpa/cpu/rank_gate.hpp>
#include <talpa/cpu/reduce.hpp>
#include <talpa/cpu/scale.hpp>
#include <talpa/cpu/segments.hpp>
#include <talpa/cpu/select.hpp>
#include <talpa/cuda/add.hpp>
#include <talpa/cuda/bias.hpp>
#include <talpa/cuda/convert.hpp>
#include <talpa/cuda/fill.hpp>
#include <talpa/cuda/gather.hpp>
#include <talpa/cuda/grouped_gemm.hpp>
#include <talpa/cuda/reduce.hpp>
#include <talpa/cuda/route.hpp>
#include <talpa/cuda/scale.hpp>
#include <talpa/cuda/segments.hpp>
#include <talpa/cuda/select.hpp>
#include <talpa/cuda/slot_glu.hpp>
#include <talpa/layers/fused_moe_ffn.hpp>
#include <talpa/layers/moe_ffn.hpp>
#include <talpa/routing/statistics.hpp>
#include <talpa/scorers/linear_scorer.hpp>
#include <talpa/selectors/dynamic_entropy.hpp>
#include <talpa/selectors/top_k.hpp>

#include <doctest/doctest.h>

#include <cmath>
#include <string>
#include <utility>
#include <vector>

namespace talpa::fused_moe_ffn_test {
using support::device;
using support::random_stored;
using support::whole;

namespace {

using renormalised = top_k<gate::renormalised>;

struct sizes {
  index tokens, features, hidden, experts;
  index shared = 0;
  double scale = 1.0;
  bool bias = false;
};

/// Which experts have master weights.
enum class training { none, some, all };

double size_of(const matrix<double, cpu>& m) {
  double squares = 0.0;
  for (index i = 0; i < m.size(); ++i) squares += m.data()[i] * m.data()[i];
  return std::sqrt(squares);
}

/// ||dlogits||, from what each token alone adds to the gradient of the router's bias. The other
/// gradients are of no use behind it.
template <class Layer>
double size_of_token_gradients(const Layer& layer, typename Layer::template params<double, cpu>& p,
                               const matrix<double, cpu>& x, const matrix<double, cpu>& dy,
                               const batch_info<double, cpu>& all) {
  context<cpu> ctx(1);
  matrix<double, cpu> y(1, x.cols()), dx(1, x.cols());
  double squares = 0.0;
  for (index n = 0; n < x.rows(); ++n) {
    const workspace<cpu>::scope scope(ctx.memory);
    batch_info<double, cpu> one;
    one.replay = all.replay.row_range(n, 1);
    one.padding_mask = {all.padding_mask.data + n, 1};
    p.router.scorer.bias.zero_grad(ctx);
    const auto kept =
        layer.forward(ctx, p, x.view().row_range(n, 1), y.view(), mode::training, one);
    layer.backward(ctx, p, kept, x.view().row_range(n, 1), dy.view().row_range(n, 1), dx.view(),
                   grad_mode::overwrite);
    const double size = size_of(matrix<double, cpu>(p.router.scorer.bias.grad()));
    squares += size * size;
  }
  return std::sqrt(squares);
}

/// One forward and backward on the device, and moe_ffn of the host in double with the same weights
/// and the mask of the device.
template <class S, class Selector>
void compare(const Selector& selector, const sizes& z, training which) {
  CAPTURE(z.tokens);
  CAPTURE(z.experts);
  support::test_random random(11);
  generator numbers(7), other(7);
  context<device> ctx;
  const fused_moe_ffn<Selector, S> layer{selector, z.hidden, z.experts, {},
                                         z.shared, z.scale,  z.bias};
  const index always = z.shared * z.hidden, rows = always + z.experts * z.hidden;
  const auto gate = random_stored<S>(random, rows, z.features, 0.3);
  const auto up = random_stored<S>(random, rows, z.features, 0.3);
  const auto down = random_stored<S>(random, rows, z.features, 0.3);
  const auto on = [](const matrix<S, cpu>& m) { return to_device<device>(m.view()); };
  const auto gate_on = on(gate), up_on = on(up), down_on = on(down);
  auto p = layer.init(ctx, gate_on.view(), up_on.view(), down_on.view(), numbers, "ffn.");
  const std::vector<index> last{z.experts - 1};
  if (which == training::all) layer.train_experts(ctx, p);
  if (which == training::some) layer.train_experts(ctx, p, last);
  if (which == training::all) layer.train_shared(ctx, p);
  if (z.bias) {
    matrix<float, cpu> b(1, z.experts);
    for (index e = 0; e < z.experts; ++e) b(0, e) = 0.25f * static_cast<float>(e % 3);
    to_device<float, device>(b.view(), p.router_bias.value());
    CHECK(p.router_bias.name() == "ffn.router.bias");
  }
  layer.refresh(ctx, p);  // rounds numbers that have been rounded before
  CHECK(p.router.name() == "ffn.router.weight");
  CHECK(p.down.name() == "ffn.expert.down");

  const auto x = random_stored<S>(random, z.tokens, z.features);
  const auto dy = random_stored<S>(random, z.tokens, z.features);
  const auto x_on = on(x), dy_on = on(dy);
  matrix<std::uint8_t, cpu> real(1, z.tokens);
  for (index n = 0; n < z.tokens; ++n) real(0, n) = n % 5 == 3 ? 0 : 1;
  const auto real_on = to_device<device>(real.view());
  matrix<S, device> y(z.tokens, z.features), dx(z.tokens, z.features);
  ctx.memory.reserve(layer.template saved_bytes<device>(z.tokens));
  const auto kept =
      layer.forward(ctx, p, x_on.view(), y.view(), mode::training, {real_on.data(), z.tokens});
  CHECK(ctx.memory.used() <= layer.template saved_bytes<device>(z.tokens));
  layer.backward(ctx, p, kept, x_on.view(), dy_on.view(), dx.view(), grad_mode::overwrite,
                 mode::training);
  ctx.synchronise();
  const auto mask = to_host(kept.mask);

  using slow = moe_ffn<router<linear_scorer, Selector>, swiglu>;
  const slow reference{.router = {{.bias = z.bias}, selector},
                       .expert = {.hidden = z.hidden},
                       .experts = z.experts,
                       .shared = {.hidden = z.hidden},
                       .shared_experts = z.shared,
                       .scale = z.scale};
  context<cpu> host(1);
  auto q = reference.template init<double, cpu>(z.features, other);
  const auto set = [](parameter<double, cpu>& to, const matrix<double, cpu>& from) {
    for (index i = 0; i < from.size(); ++i) to.value().data[i] = from.data()[i];
  };
  const auto part = [&](const matrix<S, cpu>& from, index first, index count) {
    return whole<S>(from.view().row_range(first, count));
  };
  set(q.expert.gate, part(gate, always, rows - always));
  set(q.expert.up, part(up, always, rows - always));
  set(q.expert.down, part(down, always, rows - always));
  if (z.shared > 0) {
    set(q.shared.gate, part(gate, 0, always));
    set(q.shared.up, part(up, 0, always));
    set(q.shared.down, part(down, 0, always));
  }
  if (z.bias) {
    set(q.router.scorer.bias, support::in_double(to_host(std::as_const(p.router_bias).value())));
  }
  set(q.router.scorer.weight, whole<S>(to_host(std::as_const(p.router_stored).view()).view()));
  if (which == training::some) reference.expert.train_experts(q.expert, last);
  const auto xd = whole<S>(x.view()), dyd = whole<S>(dy.view());
  matrix<double, cpu> yd(z.tokens, z.features), dxd(z.tokens, z.features);
  batch_info<double, cpu> batch;
  batch.replay = mask.view();
  batch.padding_mask = {real.data(), z.tokens};
  const auto keptd = reference.forward(host, q, xd, yd.view(), mode::training, batch);
  reference.backward(host, q, keptd, xd, dyd, dxd.view(), grad_mode::overwrite);
  if (z.tokens == 0) return;

  // On its way a number is rounded to the storage six times at most (a or b, z, the row of a slot,
  // of a token; dz, da or db, twice for dx), each time independently of the others; y and dx once
  // more where the routed experts join the shared ones.
  const double limit = std::sqrt(z.shared > 0 ? 7.0 : 6.0) * support::storage_roundoff<S>();
  const auto compare_one = [&](const std::string& what, const matrix<double, cpu>& got,
                               const matrix<double, cpu>& wanted) {
    CAPTURE(what);
    CHECK(support::distance(got, wanted) <= limit);
  };
  compare_one("y", whole<S>(to_host(std::as_const(y).view()).view()), yd);
  compare_one("dx", whole<S>(to_host(std::as_const(dx).view()).view()), dxd);
  compare_one("dWr", support::in_double(to_host(p.router.grad())),
              matrix<double, cpu>(q.router.scorer.weight.grad()));
  if (which == training::none) {
    CHECK(!p.down.exists());
    CHECK(!p.shared_down.exists());
    return;
  }
  if (z.shared > 0 && which == training::all) {
    compare_one("dD of shared experts", support::in_double(to_host(p.shared_down.grad())),
                matrix<double, cpu>(q.shared.down.grad()));
    const auto found = support::in_double(to_host(p.shared_gate_up.grad()));
    matrix<double, cpu> both(2 * always, z.features);
    const auto dgate = q.shared.gate.grad(), dup = q.shared.up.grad();
    for (index r = 0; r < always; ++r) {
      for (index c = 0; c < z.features; ++c) {
        both(r, c) = dgate(r, c);
        both(always + r, c) = dup(r, c);
      }
    }
    compare_one("dG, dU of shared experts", found, both);
  }
  compare_one("dD", support::in_double(to_host(p.down.grad())),
              matrix<double, cpu>(q.expert.down.grad()));
  const auto both = support::in_double(to_host(p.gate_up.grad()));
  matrix<double, cpu> wanted(both.rows(), both.cols());
  const auto dgate = q.expert.gate.grad(), dup = q.expert.up.grad();
  for (index r = 0; r < dgate.rows; ++r) {
    const index to = r / z.hidden * 2 * z.hidden + r % z.hidden;
    for (index c = 0; c < z.features; ++c) {
      wanted(to, c) = dgate(r, c);
      wanted(to + z.hidden, c) = dup(r, c);
    }
  }
  compare_one("dG, dU", both, wanted);
  if (z.bias) {
    // What tokens add to db may cancel, so its error is held against them, not against db.
    const auto db = support::in_double(to_host(p.router_bias.grad()));
    const matrix<double, cpu> expected(q.router.scorer.bias.grad());
    const double of_tokens = size_of_token_gradients(reference, q, xd, dyd, batch);
    CHECK(support::distance(db, expected) * size_of(expected) <= limit * of_tokens);
  }
}

}  // namespace

TEST_SUITE("cuda/fused_moe_ffn") {
  TEST_CASE_TEMPLATE("forward and backward agree with moe_ffn of the host", S, TALPA_HALVES) {
    compare<S>(renormalised{2}, {support::device_size(37, 2049), 24, 40, 5}, training::all);
    compare<S>(renormalised{1}, {9, 17, 11, 3}, training::some);
    compare<S>(renormalised{1}, {7, 16, 8, 1}, training::none);
    compare<S>(renormalised{2}, {0, 16, 16, 4}, training::all);
  }

  TEST_CASE("a router that sends uncertain tokens to all experts agrees, too") {
    compare<bfloat16>(dynamic_entropy<>{.threshold = 0.7},
                      {support::device_size(33, 1025), 32, 24, 6}, training::all);
  }

  TEST_CASE_TEMPLATE("shared experts, a scale and a bias agree, too", S, TALPA_HALVES) {
    compare<S>(renormalised{2}, {support::device_size(27, 1025), 24, 16, 4, 2, 2.5, true},
               training::all);
    compare<S>(renormalised{1}, {9, 17, 11, 3, 1, 1.0, true}, training::some);
    compare<S>(renormalised{1}, {7, 16, 8, 2, 0, 0.5, false}, training::none);
    compare<S>(renormalised{2}, {0, 16, 16, 4, 1, 2.0, true}, training::all);
  }

  TEST_CASE("the totals of the routing have the bits of routing_sums") {
    context<device> ctx;
    generator random(5);
    support::test_random numbers(6);
    constexpr index tokens = 70, features = 16, hidden = 8, experts = 6;
    const fused_moe_ffn<renormalised, bfloat16> layer{{2}, hidden, experts};
    const auto bank =
        to_device<device>(random_stored<bfloat16>(numbers, experts * hidden, features).view());
    auto p = layer.init(ctx, bank.view(), bank.view(), bank.view(), random);
    const auto x = to_device<device>(random_stored<bfloat16>(numbers, tokens, features).view());
    matrix<bfloat16, device> y(tokens, features);
    const auto together = make_statistics<float>(ctx.memory, experts);
    const auto kept = layer.forward(ctx, p, x.view(), y.view(), mode::training, {},
                                    together.wanted(grad_mode::overwrite));
    CHECK(kept.routed.totals.out.counts.data == together.totals.counts.data);
    const auto measured = measure(ctx, kept.routed);
    ctx.synchronise();
    const statistics_report as_routed(together), afterwards(measured);
    CHECK(as_routed.tokens == tokens);
    CHECK(as_routed.counts == afterwards.counts);
    CHECK(as_routed.importance == afterwards.importance);
    CHECK(as_routed.probability == afterwards.probability);
    CHECK(as_routed.entropy == afterwards.entropy);
  }

  TEST_CASE("what does not fit is refused before any work") {
    using S = bfloat16;
    using layer_type = fused_moe_ffn<renormalised, S>;
    context<device> ctx;
    generator random(3);
    const layer_type layer{{2}, 3, 4};
    const matrix<S, device> bank(12, 8), other(12, 7);
    CHECK_THROWS_WITH_AS(layer.init(ctx, bank.view(), other.view(), bank.view(), random),
                         "talpa::fused_moe_ffn: 'up' has shape [12, 7], expected [12, 8] = shape "
                         "of gate",
                         shape_error);
    CHECK_THROWS_WITH_AS(
        (layer_type{{2}, 3, 4, {}, 1}).init(ctx, bank.view(), bank.view(), bank.view(), random),
        "talpa::fused_moe_ffn: 'gate' has shape [12, 8], expected [15, 8] = neurons of all "
        "experts, width of the layer",
        shape_error);
    auto p = layer.init(ctx, bank.view(), bank.view(), bank.view(), random);
    matrix<S, device> x(3, 8), y(3, 8), wide(3, 9);
    CHECK_THROWS_WITH_AS(layer.forward(ctx, p, wide.view(), y.view(), mode::training),
                         "talpa::fused_moe_ffn: 'x' has shape [3, 9], expected [3, 8] = tokens, "
                         "width of the layer",
                         shape_error);
    CHECK_THROWS_WITH_AS(layer.forward(ctx, p, x.view(), wide.view(), mode::training),
                         "talpa::fused_moe_ffn: 'y' has shape [3, 9], expected [3, 8] = tokens, "
                         "width of the layer",
                         shape_error);
    CHECK(ctx.memory.used() == 0);
    const auto kept = layer.forward(ctx, p, x.view(), y.view(), mode::training);
    CHECK_THROWS_WITH_AS(
        layer.backward(ctx, p, kept, x.view(), wide.view(), {}, grad_mode::ignore, mode::training),
        "talpa::fused_moe_ffn: 'dy' has shape [3, 9], expected [3, 8] = tokens, "
        "width of the layer",
        shape_error);
    CHECK_THROWS_WITH_AS((layer_type{{2}, 0, 4}).validate(),
                         "talpa::fused_moe_ffn: 'hidden' is 0, expected >= 1 = neurons of one "
                         "expert",
                         value_error);
    CHECK_THROWS_WITH_AS((layer_type{{2}, 3, 0}).validate(),
                         "talpa::fused_moe_ffn: 'experts' is 0, expected >= 1 = at least one "
                         "expert",
                         value_error);
    CHECK_THROWS_WITH_AS((layer_type{{2}, 3, 4, {}, -1}).validate(),
                         "talpa::fused_moe_ffn: 'shared_experts' is -1, expected >= 0 = experts "
                         "that are always on",
                         value_error);
    CHECK_THROWS_WITH_AS((layer_type{{2}, 3, 4, {}, 0, HUGE_VAL}).validate(),
                         "talpa::fused_moe_ffn: 'scale' is inf, expected a finite number",
                         value_error);
  }
}

}  // namespace talpa::fused_moe_ffn_test
