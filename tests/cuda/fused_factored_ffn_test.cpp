// SPDX-License-Identifier: Apache-2.0
#include "products.hpp"
#include "support/parity.hpp"
#include "support/scalars.hpp"
#include "support/stored.hpp"

#include <talpa/cpu/add.hpp>
#include <talpa/cpu/bias.hpp>
#include <talpa/cpu/copy.hpp>
#include <talpa/cpu/dropout.hpp>
#include <talpa/cpu/expert_errors.hpp>
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
#include <talpa/cuda/expert_errors.hpp>
#include <talpa/cuda/fill.hpp>
#include <talpa/cuda/gather.hpp>
#include <talpa/cuda/grouped_gemm.hpp>
#include <talpa/cuda/reduce.hpp>
#include <talpa/cuda/route.hpp>
#include <talpa/cuda/scale.hpp>
#include <talpa/cuda/segments.hpp>
#include <talpa/cuda/select.hpp>
#include <talpa/cuda/slot_glu.hpp>
#include <talpa/layers/factored_ffn.hpp>
#include <talpa/layers/fused_factored_ffn.hpp>
#include <talpa/selectors/straight_through.hpp>
#include <talpa/selectors/top_k.hpp>

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>
#include <vector>

namespace talpa::fused_factored_ffn_test {
using support::device;
using support::random_stored;
using support::whole;

namespace {

using hard = top_k<gate::hard>;

struct sizes {
  index tokens, features, neurons, experts, shared;
};

/// Every neuron once, in an order with runs of neighbours and without.
neuron_split mixed_up(index neurons, index experts, index shared) {
  std::vector<index> order;
  for (index i = neurons / 2; i < neurons; ++i) order.push_back(i);
  for (index i = neurons / 2; i > 0; --i) order.push_back(i - 1);
  neuron_split split = given_split(std::move(order), experts + shared);
  split.shared = shared;
  return split;
}

/// A dense network of halves, on both sides.
template <class S>
struct dense_network {
  matrix<S, cpu> gate, up, down;
  matrix<S, device> gate_on, up_on, down_on;

  dense_network(support::test_random& random, index neurons, index features)
      : gate(random_stored<S>(random, neurons, features, 0.4)),
        up(random_stored<S>(random, neurons, features, 0.4)),
        down(random_stored<S>(random, neurons, features, 0.4)),
        gate_on(to_device<device>(gate.view())),
        up_on(to_device<device>(up.view())),
        down_on(to_device<device>(down.view())) {}

  swiglu::params<double, cpu> in_double() const {
    swiglu::params<double, cpu> p;
    p.gate = parameter<double, cpu>("gate", whole<S>(gate.view()));
    p.up = parameter<double, cpu>("up", whole<S>(up.view()));
    p.down = parameter<double, cpu>("down", whole<S>(down.view()));
    return p;
  }
};

/// One forward, one backward and labels on the device, and factored_ffn of the host in double with
/// the same neurons and the mask of the device.
template <class S, class Selector, class Rescale = rescale::exact>
void compare(const Selector& selector, const sizes& z) {
  CAPTURE(z.tokens);
  CAPTURE(z.experts);
  support::test_random random(31);
  generator numbers(7), other(7);
  context<device> ctx;
  const fused_factored_ffn<Selector, Rescale, S> layer{selector, z.experts, z.shared, true};
  const dense_network<S> dense(random, z.neurons, z.features);
  const neuron_split split = mixed_up(z.neurons, z.experts, z.shared);
  auto p = layer.split(ctx, dense.gate_on.view(), dense.up_on.view(), dense.down_on.view(), split,
                       numbers, "student.");
  layer.train_experts(ctx, p);
  layer.train_shared(ctx, p);
  layer.refresh(ctx, p);
  CHECK(p.down.name() == "student.expert.down");
  const auto x = random_stored<S>(random, z.tokens, z.features);
  const auto dy = random_stored<S>(random, z.tokens, z.features);
  const auto target = random_stored<S>(random, z.tokens, z.features);
  const auto x_on = to_device<device>(x.view()), dy_on = to_device<device>(dy.view()),
             target_on = to_device<device>(target.view());
  auto dlogits = support::random_matrix<float>(random, z.tokens, z.experts);
  const matrix<float, cpu> dgates(z.tokens, z.experts);
  auto dlogits_on = to_device<device>(dlogits.view()), dgates_on = to_device<device>(dgates.view());
  const routed_gradient<float, device> losses{dlogits_on.view(), dgates_on.view()};
  matrix<S, device> y(z.tokens, z.features), dx(z.tokens, z.features);
  ctx.memory.reserve(layer.saved_bytes(p, z.tokens));
  const auto kept = layer.forward(ctx, p, x_on.view(), y.view(), mode::training);
  CHECK(ctx.memory.used() <= layer.saved_bytes(p, z.tokens));
  layer.backward(ctx, p, kept, x_on.view(), dy_on.view(), dx.view(), grad_mode::overwrite,
                 mode::training, &losses);
  const auto labels = layer.label(ctx, p, x_on.view(), target_on.view());
  ctx.synchronise();

  const factored_ffn<router<linear_scorer, Selector>, Rescale> reference{
      .router = {{.bias = true}, selector}, .experts = z.experts, .shared_experts = z.shared};
  CHECK(reference.scale() == layer.scale());
  context<cpu> host(1);
  auto q = reference.split(dense.in_double(), split, other);
  const auto router = whole<S>(to_host(std::as_const(p.router_stored).view()).view());
  std::copy_n(router.data(), router.size(), q.router.scorer.weight.value().data);
  const auto mask = to_host(kept.mask);
  batch_info<double, cpu> batch;
  batch.replay = mask.view();
  const auto xd = whole<S>(x.view()), dyd = whole<S>(dy.view());
  matrix<double, cpu> yd(z.tokens, z.features), dxd(z.tokens, z.features);
  auto dl = support::in_double(dlogits), dg = support::in_double(dgates);
  const routed_gradient<double, cpu> from_losses{dl.view(), dg.view()};
  const auto keptd = reference.forward(host, q, xd, yd.view(), mode::training, batch);
  reference.backward(host, q, keptd, xd, dyd, dxd.view(), grad_mode::overwrite, &from_losses);
  const auto wanted = reference.label(host, q, xd, whole<S>(target.view()).view());
  if (z.tokens == 0) return;

  // As fused_moe_ffn.
  const double limit = std::sqrt(7.0) * support::storage_roundoff<S>();
  const auto compare_one = [&](const std::string& what, const matrix<double, cpu>& got,
                               const matrix<double, cpu>& expected) {
    CAPTURE(what);
    CHECK(support::distance(got, expected) <= limit);
  };
  const auto gradient = [](parameter<float, device>& w) {
    return support::in_double(to_host(w.grad()));
  };
  compare_one("y", whole<S>(to_host(std::as_const(y).view()).view()), yd);
  compare_one("dx", whole<S>(to_host(std::as_const(dx).view()).view()), dxd);
  compare_one("dWr", gradient(p.router), matrix<double, cpu>(q.router.scorer.weight.grad()));
  compare_one("db", gradient(p.router_bias), matrix<double, cpu>(q.router.scorer.bias.grad()));
  compare_one("dD", gradient(p.down), matrix<double, cpu>(q.expert.down.grad()));
  if (z.shared > 0) {
    compare_one("dD of shared experts", gradient(p.shared_down),
                matrix<double, cpu>(q.shared.down.grad()));
  }
  // The output of an expert has been rounded three times on its way (a or b, z), a row of it within
  // four times the expected error: for the distance s from its share of the target, of size r, this
  // is at most 4 sqrt(3) u (s + r) = d, and s^2 changes by at most 2 s d + d^2.
  const auto errors = to_host(labels.errors);
  const auto chosen = to_host(labels.chosen.mask);
  for (index n = 0; n < z.tokens; ++n) {
    double share = 0.0;
    for (index d = 0; d < z.features; ++d) {
      const double t = static_cast<double>(static_cast<float>(target(n, d))) / layer.scale();
      share += t * t / static_cast<double>(z.features);
    }
    share = std::sqrt(share);
    for (index e = 0; e < z.experts; ++e) {
      const double s = std::sqrt(wanted.errors(n, e));
      const double d = 4.0 * std::sqrt(3.0) * support::storage_roundoff<S>() * (s + share);
      CHECK(std::abs(static_cast<double>(errors(n, e)) - wanted.errors(n, e)) <=
            2.0 * s * d + d * d);
    }
    index on = 0;
    for (index e = 0; e < z.experts; ++e) {
      if ((chosen(n, 0) >> e & 1u) == 0) continue;
      ++on;
      for (index f = 0; f < z.experts; ++f) {
        if ((chosen(n, 0) >> f & 1u) == 0) CHECK(errors(n, e) <= errors(n, f));
      }
    }
    CHECK(on == selector.k);
  }
}

}  // namespace

TEST_SUITE("cuda/fused_factored_ffn") {
  TEST_CASE_TEMPLATE("forward, backward and labels agree with factored_ffn of the host", S,
                     TALPA_HALVES) {
    compare<S>(hard{2}, {support::device_size(23, 1025), 24, 40, 4, 1});
    compare<S>(hard{1}, {9, 17, 33, 3, 0});
    compare<S>(hard{1}, {7, 16, 8, 1, 0});
    compare<S>(hard{2}, {0, 16, 32, 4, 0});
  }

  TEST_CASE("a router that learns straight through agrees, too") {
    compare<bfloat16>(straight_through{2}, {11, 16, 32, 4, 0});
    compare<bfloat16, hard, rescale::floored>(hard{2}, {11, 16, 24, 3, 0});
  }

  TEST_CASE("all experts are the dense network, whatever the split") {
    using S = bfloat16;
    constexpr index tokens = 9, features = 16, neurons = 24;
    context<device> ctx;
    generator random(1);
    support::test_random numbers(2);
    const dense_network<S> dense(numbers, neurons, features);
    const auto x = to_device<device>(random_stored<S>(numbers, tokens, features).view());
    const auto run = [&](index experts, const neuron_split* split) {
      const fused_factored_ffn<hard, rescale::exact, S> layer{{experts}, experts};
      auto p = split != nullptr ? layer.split(ctx, dense.gate_on.view(), dense.up_on.view(),
                                              dense.down_on.view(), *split, random)
                                : layer.split(ctx, dense.gate_on.view(), dense.up_on.view(),
                                              dense.down_on.view(), random);
      matrix<S, device> y(tokens, features);
      layer.forward(ctx, p, x.view(), y.view(), mode::inference);
      ctx.synchronise();
      return whole<S>(to_host(std::as_const(y).view()).view());
    };
    const neuron_split split = mixed_up(neurons, 4, 0);
    const auto whole_network = run(1, nullptr);
    // Neither rounds a or b otherwise; of z, slots and y each rounds three times.
    const double limit = std::sqrt(6.0) * support::storage_roundoff<S>();
    CHECK(support::distance(run(4, &split), whole_network) <= limit);
    CHECK(support::distance(run(3, nullptr), whole_network) <= limit);
  }

  TEST_CASE("the same step twice has the same bits and takes no more memory") {
    using S = bfloat16;
    context<device> ctx;
    const sizes z{support::device_size(9, 777), 16, 32, 3, 1};
    generator random(1);
    support::test_random numbers(2);
    const dense_network<S> dense(numbers, z.neurons, z.features);
    const fused_factored_ffn<hard, rescale::exact, S> layer{{2}, z.experts, z.shared, true};
    auto p =
        layer.split(ctx, dense.gate_on.view(), dense.up_on.view(), dense.down_on.view(), random);
    const std::vector<index> one{1};
    layer.train_experts(ctx, p, one);
    layer.train_shared(ctx, p);
    const auto x = to_device<device>(random_stored<S>(numbers, z.tokens, z.features).view());
    matrix<S, device> y(z.tokens, z.features), dx(z.tokens, z.features);
    struct left_behind {
      std::vector<matrix<float, cpu>> gradients;
      matrix<S, cpu> y, dx;
    };
    const auto run = [&] {
      const workspace<device>::scope scope(ctx.memory);
      p.visit([&](parameter<float, device>& w) { w.zero_grad(ctx); });
      const auto kept = layer.forward(ctx, p, x.view(), y.view(), mode::training);
      layer.backward(ctx, p, kept, x.view(), x.view(), dx.view(), grad_mode::overwrite,
                     mode::training);
      layer.label(ctx, p, x.view(), y.view());
      ctx.synchronise();
      left_behind left{{}, to_host(std::as_const(y).view()), to_host(std::as_const(dx).view())};
      p.visit([&](parameter<float, device>& w) { left.gradients.push_back(to_host(w.grad())); });
      return left;
    };
    const left_behind first = run();
    const index allocations = ctx.memory.allocations() + ctx.scratch.allocations();
    const left_behind second = run();
    CHECK(ctx.memory.allocations() + ctx.scratch.allocations() == allocations);
    CHECK(support::bit_difference(first.y, second.y) == "");
    CHECK(support::bit_difference(first.dx, second.dx) == "");
    REQUIRE(first.gradients.size() == 6);
    CHECK(first.gradients[2].rows() == 2 * z.neurons / 4);
    for (std::size_t i = 0; i < first.gradients.size(); ++i) {
      CHECK(support::bit_difference(first.gradients[i], second.gradients[i]) == "");
    }
  }

  TEST_CASE("what does not fit is refused before any work") {
    using S = bfloat16;
    using layer_type = fused_factored_ffn<hard, rescale::exact, S>;
    context<device> ctx;
    generator random(3);
    support::test_random numbers(4);
    const dense_network<S> dense(numbers, 12, 8);
    const matrix<S, device> other(12, 7);
    const layer_type layer{{2}, 4};
    const auto split = [&](const layer_type& of, const matrix<S, device>& up,
                           const matrix<S, device>& down, const neuron_split& by) {
      return of.split(ctx, dense.gate_on.view(), up.view(), down.view(), by, random);
    };
    const neuron_split four = contiguous_split(12, 4);
    CHECK_THROWS_WITH_AS(split(layer, other, dense.down_on, four),
                         "talpa::fused_factored_ffn: 'up' has shape [12, 7], expected [12, 8] = "
                         "shape of gate",
                         shape_error);
    CHECK_THROWS_WITH_AS(split(layer, dense.up_on, other, four),
                         "talpa::fused_factored_ffn: 'down' has shape [12, 7], expected [12, 8] = "
                         "shape of gate",
                         shape_error);
    CHECK_THROWS_WITH_AS(split(layer, dense.up_on, dense.down_on, contiguous_split(8, 4)),
                         "talpa::fused_factored_ffn: 'order' is 8, expected 12..12 = neurons of "
                         "the dense network, each once",
                         value_error);
    CHECK_THROWS_WITH_AS(split(layer, dense.up_on, dense.down_on, contiguous_split(12, 3)),
                         "talpa::fused_factored_ffn: 'split.hidden' is 4, expected 3..3 = neurons "
                         "of one expert",
                         value_error);
    CHECK_THROWS_WITH_AS(split({{2}, 3, 1}, dense.up_on, dense.down_on, four),
                         "talpa::fused_factored_ffn: 'split.shared' is 0, expected 1..1 = "
                         "shared_experts",
                         value_error);
    CHECK_THROWS_WITH_AS(
        (layer_type{{2}, 5})
            .split(ctx, dense.gate_on.view(), dense.up_on.view(), dense.down_on.view(), random),
        "talpa::fused_factored_ffn: 'experts' is 5, expected a divisor of 12 = "
        "neurons of the dense network",
        value_error);
    auto p = split(layer, dense.up_on, dense.down_on, four);
    matrix<S, device> x(3, 8), y(3, 8), wide(3, 9);
    CHECK_THROWS_WITH_AS(layer.forward(ctx, p, wide.view(), y.view(), mode::training),
                         "talpa::fused_factored_ffn: 'x' has shape [3, 9], expected [3, 8] = "
                         "tokens, width of the layer",
                         shape_error);
    CHECK_THROWS_WITH_AS(
        layer.forward(ctx, p, x.view(), wide.view(), mode::training),
        "talpa::fused_factored_ffn: 'y' has shape [3, 9], expected [3, 8] = shape of x",
        shape_error);
    CHECK_THROWS_WITH_AS(layer.label(ctx, p, wide.view(), y.view()),
                         "talpa::fused_factored_ffn: 'h' has shape [3, 9], expected [3, 8] = "
                         "tokens, width of the layer",
                         shape_error);
    CHECK_THROWS_WITH_AS(
        layer.label(ctx, p, x.view(), wide.view()),
        "talpa::fused_factored_ffn: 'target' has shape [3, 9], expected [3, 8] = shape of h",
        shape_error);
    CHECK_THROWS_WITH_AS(layer.label(ctx, p, 5, x.view(), y.view()),
                         "talpa::fused_factored_ffn: 'k' is 5, expected 1..4 = experts",
                         value_error);
    CHECK(ctx.memory.used() == 0);
    CHECK_THROWS_WITH_AS((layer_type{{1}, 0}).validate(),
                         "talpa::fused_factored_ffn: 'experts' is 0, expected >= 1 = at least one "
                         "expert",
                         value_error);
    CHECK_THROWS_WITH_AS((layer_type{{1}, 2, -1}).validate(),
                         "talpa::fused_factored_ffn: 'shared_experts' is -1, expected >= 0 = "
                         "experts that are always on",
                         value_error);
    CHECK_THROWS_WITH_AS((layer_type{{3}, 2}).validate(),
                         "talpa::top_k: 'k' is 3, expected 1..2 = experts", value_error);
  }
}

}  // namespace talpa::fused_factored_ffn_test
