// SPDX-License-Identifier: Apache-2.0
#include "products.hpp"
#include "support/parity.hpp"
#include "support/scalars.hpp"
#include "support/stored.hpp"

#include <talpa/cpu/activation.hpp>
#include <talpa/cpu/add.hpp>
#include <talpa/cpu/bias.hpp>
#include <talpa/cpu/copy.hpp>
#include <talpa/cpu/dropout.hpp>
#include <talpa/cpu/fill.hpp>
#include <talpa/cpu/gated_activation.hpp>
#include <talpa/cpu/gather.hpp>
#include <talpa/cpu/gemm.hpp>
#include <talpa/cpu/grouped_gemm.hpp>
#include <talpa/cpu/pair_gates.hpp>
#include <talpa/cpu/rank_gate.hpp>
#include <talpa/cpu/reduce.hpp>
#include <talpa/cpu/scale.hpp>
#include <talpa/cpu/segments.hpp>
#include <talpa/cpu/select.hpp>
#include <talpa/cpu/slot_dropout.hpp>
#include <talpa/cuda/add.hpp>
#include <talpa/cuda/bias.hpp>
#include <talpa/cuda/convert.hpp>
#include <talpa/cuda/fill.hpp>
#include <talpa/cuda/gather.hpp>
#include <talpa/cuda/grouped_gemm.hpp>
#include <talpa/cuda/pair_gates.hpp>
#include <talpa/cuda/rank_gate.hpp>
#include <talpa/cuda/reduce.hpp>
#include <talpa/cuda/route.hpp>
#include <talpa/cuda/scale.hpp>
#include <talpa/cuda/segments.hpp>
#include <talpa/cuda/select.hpp>
#include <talpa/cuda/slot_glu.hpp>
#include <talpa/layers/fused_perft_block.hpp>
#include <talpa/layers/moe_ffn.hpp>
#include <talpa/layers/perft_block.hpp>
#include <talpa/routing/statistics.hpp>
#include <talpa/selectors/top_k.hpp>

#include <doctest/doctest.h>

#include <cmath>
#include <string>
#include <utility>
#include <vector>

namespace talpa::fused_perft_block_test {
using support::device;
using support::random_stored;
using support::whole;

namespace {

using renormalised = top_k<gate::renormalised>;
using own_router = router<linear_scorer, renormalised>;
template <class S, class Placement, class Adapter>
using block_of = fused_perft_block<fused_moe_ffn<renormalised, S>, Placement, Adapter>;

struct sizes {
  index tokens, features, hidden, experts, adapters, chosen;
  index shared = 0;
  double scale = 1.0;
};

/// A placement whose router is given its mask.
template <class Placement>
struct replayed : Placement {
  matrix_view<const std::uint32_t, cpu> recorded{};

  template <class T, class B>
  auto forward(context<B>& ctx, const typename Placement::template params<T, B>& p,
               const routing_view<const T, B>& base, index adapters, input<T, B> x, mode m,
               batch_info<T, B> batch) const {
    if constexpr (std::same_as<B, cpu>) batch.replay = recorded;
    return Placement::forward(ctx, p, base, adapters, x, m, batch);
  }
};

/// Tokens, gradients and parameters of a layer on the device.
template <class Layer>
struct running {
  using S = typename Layer::S;

  sizes z;
  Layer layer;
  matrix<S, cpu> gate, up, down, x, dy, y_before;
  matrix<std::uint8_t, cpu> real;
  matrix<S, device> x_on, dy_on, y, dx;
  matrix<std::uint8_t, device> real_on;
  typename Layer::template params<device> p;

  running(context<device>& ctx, const Layer& made, const sizes& size) : z(size), layer(made) {
    support::test_random random(11);
    generator numbers(7);
    const index rows = (z.shared + z.experts) * z.hidden;
    gate = random_stored<S>(random, rows, z.features, 0.3);
    up = random_stored<S>(random, rows, z.features, 0.3);
    down = random_stored<S>(random, rows, z.features, 0.3);
    x = random_stored<S>(random, z.tokens, z.features);
    dy = random_stored<S>(random, z.tokens, z.features);
    const auto on = [](const matrix<S, cpu>& m) { return to_device<device>(m.view()); };
    const auto gate_on = on(gate), up_on = on(up), down_on = on(down);
    auto base = layer.base.init(ctx, gate_on.view(), up_on.view(), down_on.view(), numbers, "b.");
    p = layer.init(ctx, std::move(base), numbers, "perft.");
    p.visit([&](parameter<float, device>& w) {
      to_device<float, device>(
          support::random_matrix<float>(random, w.rows(), w.cols(), 0.4).view(), w.value());
    });
    layer.refresh(ctx, p);
    x_on = on(x);
    dy_on = on(dy);
    y = matrix<S, device>(z.tokens, z.features);
    dx = matrix<S, device>(z.tokens, z.features);
    real = matrix<std::uint8_t, cpu>(1, z.tokens);
    for (index n = 0; n < z.tokens; ++n) real(0, n) = n % 5 == 3 ? 0 : 1;
    real_on = to_device<device>(real.view());
  }

  vector_view<const std::uint8_t, device> padding_mask() const {
    return {real_on.data(), z.tokens};
  }
  auto forward(context<device>& ctx) {
    return layer.forward(ctx, p, std::as_const(x_on).view(), y.view(), mode::training,
                         padding_mask());
  }
  template <class Saved>
  void backward(context<device>& ctx, const Saved& kept,
                const routed_gradient<float, device>* from_losses = nullptr,
                const routed_gradient<float, device>* from_base_losses = nullptr) {
    layer.backward(ctx, p, kept, std::as_const(x_on).view(), std::as_const(dy_on).view(), dx.view(),
                   grad_mode::overwrite, mode::training, from_losses, from_base_losses);
  }
};

/// One forward and backward on the device, gradients of losses of both routers included, and
/// perft_block of the host in double with the same weights and masks. `trained` adapters train.
template <class S, class Placement, class Adapter>
void compare(const Placement& placement, const Adapter& adapter, const sizes& z,
             const std::vector<index>& trained = {}) {
  CAPTURE(z.tokens);
  CAPTURE(z.adapters);
  CAPTURE(std::string(Placement::name));
  using fused = block_of<S, Placement, Adapter>;
  context<device> ctx;
  running<fused> there(
      ctx,
      {{{z.chosen}, z.hidden, z.experts, {}, z.shared, z.scale}, placement, adapter, z.adapters},
      z);
  if (!trained.empty()) {
    there.p.base.freeze();
    there.p.a.train_blocks(adapter.rank, trained);
    there.p.b.train_blocks(adapter.rank, trained);
  }
  support::test_random random(23);
  const auto loss = [&](index columns) {
    return support::random_matrix<float>(random, z.tokens, columns, 0.5);
  };
  const auto dlogits = loss(z.adapters), dgates = loss(z.adapters), dlogits_base = loss(z.experts),
             dgates_base = loss(z.experts);
  auto dlogits_on = to_device<device>(dlogits.view()), dgates_on = to_device<device>(dgates.view()),
       dlogits_base_on = to_device<device>(dlogits_base.view()),
       dgates_base_on = to_device<device>(dgates_base.view());
  const routed_gradient<float, device> losses{dlogits_on.view(), dgates_on.view()},
      base_losses{dlogits_base_on.view(), dgates_base_on.view()};
  ctx.memory.reserve(there.layer.template saved_bytes<device>(z.tokens));
  const auto kept = there.forward(ctx);
  CHECK(ctx.memory.used() <= there.layer.template saved_bytes<device>(z.tokens));
  there.backward(ctx, kept, &losses, &base_losses);
  ctx.synchronise();

  using slow = perft_block<moe_ffn<own_router, swiglu>, replayed<Placement>, Adapter>;
  const auto mask = to_host(kept.routing.mask), base_mask = to_host(kept.base.mask);
  const slow reference{.base = {.router = {{}, {z.chosen}},
                                .expert = {.hidden = z.hidden},
                                .experts = z.experts,
                                .shared = {.hidden = z.hidden},
                                .shared_experts = z.shared,
                                .scale = z.scale},
                       .placement = {placement, mask.view()},
                       .adapter = adapter,
                       .adapters = z.adapters,
                       .execution = strategy::dense_masked};
  context<cpu> host(1);
  generator other(7);
  auto q = reference.template init<double, cpu>(
      reference.base.template init<double, cpu>(z.features, other), other);
  const auto set = [](parameter<double, cpu>& to, const matrix<double, cpu>& from) {
    for (index i = 0; i < from.size(); ++i) to.value().data[i] = from.data()[i];
  };
  const auto rows_of = [](const matrix<S, device>& m, index first, index rows) {
    return whole<S>(matrix<S, cpu>(to_host(m.view())).view().row_range(first, rows));
  };
  const auto part = [&](const matrix<S, cpu>& from, index first, index count) {
    return whole<S>(from.view().row_range(first * z.hidden, count * z.hidden));
  };
  set(q.base.expert.gate, part(there.gate, z.shared, z.experts));
  set(q.base.expert.up, part(there.up, z.shared, z.experts));
  set(q.base.expert.down, part(there.down, z.shared, z.experts));
  if (z.shared > 0) {
    set(q.base.shared.gate, part(there.gate, 0, z.shared));
    set(q.base.shared.up, part(there.up, 0, z.shared));
    set(q.base.shared.down, part(there.down, 0, z.shared));
  }
  set(q.base.router.scorer.weight, rows_of(there.p.base.router_stored, 0, z.experts));
  const index ranks = z.adapters * adapter.rank;
  std::vector<parameter<double, cpu>*> factors;
  q.adapter.visit([&](parameter<double, cpu>& w) { factors.push_back(&w); });
  set(*factors[0], rows_of(there.p.in_stored, 0, ranks));
  set(*factors[1], rows_of(there.p.out_stored, 0, ranks));
  CHECK(there.p.a.name() == "perft." + std::string("adapter.") + factors[0]->name().substr(8));
  parameter<double, cpu>* chooser = nullptr;
  if constexpr (fused::routes) {
    chooser = &q.placement.router.scorer.weight;
    set(*chooser, rows_of(there.p.in_stored, there.layer.rank_width(), z.adapters));
    CHECK(there.p.router.name() == "perft.placement.router.weight");
  }
  if (!trained.empty()) {
    q.base.freeze();
    adapter.train_experts(q.adapter, trained);
  }
  const auto xd = whole<S>(there.x.view()), dyd = whole<S>(there.dy.view());
  matrix<double, cpu> yd(z.tokens, z.features), dxd(z.tokens, z.features);
  batch_info<double, cpu> batch;
  batch.replay = base_mask.view();
  batch.padding_mask = {there.real.data(), z.tokens};
  auto dl = support::in_double(dlogits), dg = support::in_double(dgates),
       dlb = support::in_double(dlogits_base), dgb = support::in_double(dgates_base);
  const routed_gradient<double, cpu> from_losses{dl.view(), dg.view()},
      from_base_losses{dlb.view(), dgb.view()};
  const auto keptd = reference.forward(host, q, xd, yd.view(), mode::training, batch);
  reference.backward(host, q, keptd, xd, dyd, dxd.view(), grad_mode::overwrite, &from_losses,
                     &from_base_losses);
  if (z.tokens == 0) return;

  // As fused_moe_ffn, six times or seven, and once more: y and dx are rounded again when the
  // adapters' share joins them. Each time independently of the others.
  const double limit = std::sqrt(z.shared > 0 ? 8.0 : 7.0) * support::storage_roundoff<S>();
  const auto compare_one = [&](const std::string& what, const matrix<double, cpu>& got,
                               const matrix<double, cpu>& wanted) {
    CAPTURE(what);
    CHECK(support::distance(got, wanted) <= limit);
  };
  const auto gradient = [&](const std::string& what, parameter<float, device>& got,
                            parameter<double, cpu>& wanted) {
    REQUIRE(got.trained_size() == wanted.trained_size());
    compare_one(what, support::in_double(to_host(got.grad())), matrix<double, cpu>(wanted.grad()));
  };
  compare_one("y", whole<S>(to_host(std::as_const(there.y).view()).view()), yd);
  compare_one("dx", whole<S>(to_host(std::as_const(there.dx).view()).view()), dxd);
  gradient("dA", there.p.a, *factors[0]);
  gradient("dB", there.p.b, *factors[1]);
  if (chooser != nullptr) gradient("dWr", there.p.router, *chooser);
  gradient("dWr of the base", there.p.base.router, q.base.router.scorer.weight);
}

}  // namespace

TEST_SUITE("cuda/fused_perft_block") {
  using placement::base_weighted;
  using placement::dense;
  using placement::embedded;
  using placement::routed;
  using placement::single;

  TEST_CASE_TEMPLATE("adapters behind a router of their own agree with perft_block of the host", S,
                     TALPA_HALVES) {
    const lora adapter{.rank = 4, .alpha = 6.0};
    compare<S>(routed<own_router>{{{}, {2}}}, adapter,
               {support::device_size(21, 2049), 24, 16, 5, 6, 2});
    compare<S>(routed<own_router>{{{}, {1}}}, lora{.rank = 3, .alpha = 3.0}, {9, 17, 11, 3, 5, 1},
               {1, 4});
    compare<S>(routed<own_router>{{{}, {1}}}, adapter, {7, 16, 8, 1, 1, 1});
    compare<S>(routed<own_router>{{{}, {2}}}, adapter, {0, 16, 8, 4, 3, 2});
  }

  TEST_CASE("adapters in the experts agree with perft_block of the host") {
    compare<bfloat16>(embedded{}, parallel_adapter<>{.rank = 4, .scale = 0.8},
                      {support::device_size(19, 1025), 16, 8, 5, 5, 2});
    compare<bfloat16>(embedded{}, parallel_adapter<>{.rank = 3}, {9, 12, 8, 4, 4, 2, 1, 2.0},
                      {0, 3});
  }

  TEST_CASE("adapters that the base weighs agree with perft_block of the host") {
    compare<bfloat16>(base_weighted<own_router>{{{}, {2}}}, lora{.rank = 4, .alpha = 8.0},
                      {support::device_size(17, 1025), 16, 8, 5, 6, 3, 0, 0.5});
  }

  TEST_CASE("adapters that are always on agree with perft_block of the host") {
    compare<bfloat16>(dense{}, lora{.rank = 4, .alpha = 8.0},
                      {support::device_size(13, 1025), 16, 8, 4, 3, 2});
    compare<bfloat16>(single{}, parallel_adapter<tanh>{.rank = 5}, {11, 17, 8, 3, 1, 1});
  }

  TEST_CASE("one adapter behind a router with gate 1 is an adapter that is always on") {
    using S = bfloat16;
    context<device> ctx;
    const sizes z{9, 16, 8, 3, 1, 1};
    const lora adapter{.rank = 4};
    const fused_moe_ffn<renormalised, S> base{{1}, z.hidden, z.experts};
    running<block_of<S, routed<own_router>, lora>> behind(
        ctx, {base, {{{}, {1}}}, adapter, z.adapters}, z);
    running<block_of<S, dense, lora>> always(ctx, {base, {}, adapter, z.adapters}, z);
    for (const auto& [to, from] :
         {std::pair{&always.p.a, &behind.p.a}, {&always.p.b, &behind.p.b}}) {
      to_device<float, device>(to_host(std::as_const(*from).value()).view(), to->value());
    }
    always.layer.refresh(ctx, always.p);
    // Every token is real: padding gets what is always on.
    behind.layer.forward(ctx, behind.p, std::as_const(behind.x_on).view(), behind.y.view(),
                         mode::training);
    always.layer.forward(ctx, always.p, std::as_const(always.x_on).view(), always.y.view(),
                         mode::training);
    ctx.synchronise();
    // z and y are rounded in each, and products of other shapes may add in another order.
    CHECK(support::distance(whole<S>(to_host(std::as_const(always.y).view()).view()),
                            whole<S>(to_host(std::as_const(behind.y).view()).view())) <=
          2.0 * support::storage_roundoff<S>());
  }

  TEST_CASE("all tokens on one adapter: the others get zero gradients, and padding gets zero") {
    using S = bfloat16;
    context<device> ctx;
    const sizes z{9, 16, 8, 3, 4, 1};
    running<block_of<S, routed<own_router>, lora>> one(
        ctx, {{{1}, z.hidden, z.experts}, {{{}, {1}}}, {.rank = 4}, z.adapters}, z);
    // Tokens with a large first number, which the router of adapter 2 alone reads.
    matrix<float, cpu> router(z.adapters, z.features);
    router(2, 0) = 4.0f;
    to_device<float, device>(router.view(), one.p.router.value());
    one.layer.refresh(ctx, one.p);
    for (index n = 0; n < z.tokens; ++n) one.x(n, 0) = static_cast<S>(2.0f);
    to_device<S, device>(one.x.view(), one.x_on.view());
    const auto kept = one.forward(ctx);
    one.backward(ctx, kept);
    ctx.synchronise();
    const auto y = to_host(std::as_const(one.y).view());
    const auto mask = to_host(kept.routing.mask);
    for (index n = 0; n < z.tokens; ++n) {
      CHECK(mask(n, 0) == (one.real(0, n) == 1 ? 4u : 0u));
      if (one.real(0, n) == 1) continue;
      for (index d = 0; d < z.features; ++d) CHECK(static_cast<float>(y(n, d)) == 0.0f);
    }
    for (const auto& gradient : {to_host(one.p.a.grad()), to_host(one.p.b.grad())}) {
      for (index r = 0; r < gradient.rows(); ++r) {
        bool zero = true;
        for (index d = 0; d < z.features; ++d) zero = zero && gradient(r, d) == 0.0f;
        CHECK(zero == (r / 4 != 2));
      }
    }
  }

  TEST_CASE("the same step twice has the same bits and takes no more memory") {
    using S = bfloat16;
    context<device> ctx;
    const sizes z{support::device_size(11, 777), 16, 8, 4, 6, 2};
    running<block_of<S, base_weighted<own_router>, lora>> step(
        ctx, {{{2}, z.hidden, z.experts}, {{{}, {2}}}, {.rank = 4}, z.adapters}, z);
    struct left_behind {
      std::vector<matrix<float, cpu>> gradients;
      std::vector<matrix<S, cpu>> outputs;
    };
    const auto run = [&] {
      const workspace<device>::scope scope(ctx.memory);
      step.p.visit([&](parameter<float, device>& w) { w.zero_grad(ctx); });
      step.backward(ctx, step.forward(ctx));
      ctx.synchronise();
      left_behind left;
      step.p.visit(
          [&](parameter<float, device>& w) { left.gradients.push_back(to_host(w.grad())); });
      for (const auto* m : {&step.y, &step.dx}) left.outputs.push_back(to_host(m->view()));
      return left;
    };
    const left_behind first = run();
    const index allocations = ctx.memory.allocations() + ctx.scratch.allocations();
    const left_behind second = run();
    CHECK(ctx.memory.allocations() + ctx.scratch.allocations() == allocations);
    REQUIRE(first.gradients.size() == 4);
    for (std::size_t i = 0; i < 4; ++i) {
      CHECK(support::bit_difference(first.gradients[i], second.gradients[i]) == "");
    }
    for (std::size_t i = 0; i < 2; ++i) {
      CHECK(support::bit_difference(first.outputs[i], second.outputs[i]) == "");
    }
  }

  TEST_CASE("dx is overwritten, added to or left alone") {
    using S = bfloat16;
    context<device> ctx;
    const sizes z{9, 16, 8, 4, 3, 2, 1};
    running<block_of<S, dense, lora>> block(
        ctx, {{{2}, z.hidden, z.experts, {}, z.shared}, {}, {.rank = 4}, z.adapters}, z);
    const auto kept = block.forward(ctx);
    const auto dx = [&](grad_mode how) {
      matrix<S, device> to = to_device<device>(block.x.view());
      block.layer.backward(ctx, block.p, kept, std::as_const(block.x_on).view(),
                           std::as_const(block.dy_on).view(), to.view(), how, mode::training);
      ctx.synchronise();
      return whole<S>(to_host(std::as_const(to).view()).view());
    };
    auto sum = dx(grad_mode::overwrite);
    const auto before = whole<S>(block.x.view());
    for (index i = 0; i < sum.size(); ++i) sum.data()[i] += before.data()[i];
    CHECK(support::distance(dx(grad_mode::ignore), before) == 0.0);
    // Four parts join what was there, shared experts, routed ones, the router's and the adapters',
    // each rounded; without it likewise.
    CHECK(support::distance(dx(grad_mode::accumulate), sum) <=
          std::sqrt(8.0) * support::storage_roundoff<S>());
  }

  TEST_CASE("the totals of both routings have the bits of routing_sums") {
    using S = bfloat16;
    context<device> ctx;
    const sizes z{70, 16, 8, 6, 5, 2};
    running<block_of<S, routed<own_router>, lora>> block(
        ctx, {{{2}, z.hidden, z.experts}, {{{}, {2}}}, {.rank = 4}, z.adapters}, z);
    const auto of_base = make_statistics<float>(ctx.memory, z.experts);
    const auto of_placement = make_statistics<float>(ctx.memory, z.adapters);
    const auto kept = block.layer.forward(
        ctx, block.p, std::as_const(block.x_on).view(), block.y.view(), mode::training, {},
        of_base.wanted(grad_mode::overwrite), of_placement.wanted(grad_mode::overwrite));
    const auto agree = [&](const auto& together, const auto& routed) {
      CHECK(routed.totals.out.counts.data == together.totals.counts.data);
      const auto measured = measure(ctx, routed);
      ctx.synchronise();
      const statistics_report as_routed(together), afterwards(measured);
      CHECK(as_routed.tokens == z.tokens);
      CHECK(as_routed.counts == afterwards.counts);
      CHECK(as_routed.importance == afterwards.importance);
      CHECK(as_routed.probability == afterwards.probability);
      CHECK(as_routed.entropy == afterwards.entropy);
    };
    agree(of_base, kept.base.routed);
    agree(of_placement, kept.routed);
  }

  TEST_CASE("what does not fit is refused before any work") {
    using S = bfloat16;
    using block = block_of<S, routed<own_router>, lora>;
    context<device> ctx;
    const sizes z{3, 8, 3, 4, 2, 2};
    const fused_moe_ffn<renormalised, S> base{{2}, z.hidden, z.experts};
    running<block> made(ctx, {base, {{{}, {2}}}, {.rank = 2}, z.adapters}, z);
    matrix<S, device> wide(3, 9);
    const matrix_view<const S, device> x = std::as_const(made.x_on).view();
    CHECK_THROWS_WITH_AS(
        made.layer.forward(ctx, made.p, wide.view(), made.y.view(), mode::training),
        "talpa::fused_perft_block: 'x' has shape [3, 9], expected [3, 8] = tokens, "
        "width of the layer",
        shape_error);
    CHECK_THROWS_WITH_AS(
        made.layer.forward(ctx, made.p, x, wide.view(), mode::training),
        "talpa::fused_perft_block: 'y' has shape [3, 9], expected [3, 8] = tokens, "
        "width of the layer",
        shape_error);
    CHECK(ctx.memory.used() == 0);
    const auto kept = made.forward(ctx);
    const auto backward = [&](auto tokens, auto dy, auto dx) {
      made.layer.backward(ctx, made.p, kept, tokens, dy, dx, grad_mode::overwrite, mode::training);
    };
    CHECK_THROWS_WITH_AS(backward(wide.view(), x, made.dx.view()),
                         "talpa::fused_perft_block: 'x' has shape [3, 9], expected [3, 8] = tokens "
                         "of forward, width of the layer",
                         shape_error);
    CHECK_THROWS_WITH_AS(
        backward(x, wide.view(), made.dx.view()),
        "talpa::fused_perft_block: 'dy' has shape [3, 9], expected [3, 8] = tokens, "
        "width of the layer",
        shape_error);
    CHECK_THROWS_WITH_AS(
        backward(x, x, wide.view()),
        "talpa::fused_perft_block: 'dx' has shape [3, 9], expected [3, 8] = shape of x",
        shape_error);
    CHECK_THROWS_WITH_AS((block{base, {{{}, {2}}}, {.rank = 2}, 0}).validate(),
                         "talpa::fused_perft_block: 'adapters' is 0, expected >= 1 = at least one "
                         "adapter",
                         value_error);
    CHECK_THROWS_WITH_AS((block{base, {{{}, {2}}}, {.rank = 2, .dropout = 0.25}, 2}).validate(),
                         "talpa::fused_perft_block: 'adapter.dropout' is 0.25, expected 0 = no "
                         "dropout",
                         value_error);
    CHECK_THROWS_WITH_AS((block{base, {{{true}, {2}}}, {.rank = 2}, 2}).validate(),
                         "talpa::fused_perft_block: 'placement.router.scorer.bias' is true, "
                         "expected false = a router without bias",
                         value_error);
    CHECK_THROWS_WITH_AS((block{base, {{{}, {3}}}, {.rank = 2}, 2}).validate(),
                         "talpa::top_k: 'k' is 3, expected 1..2 = experts", value_error);
    CHECK_THROWS_WITH_AS((block_of<S, embedded, parallel_adapter<>>{base, {}, {}, 3}).validate(),
                         "talpa::placement::embedded: 'adapters' is 3, expected 4..4 = experts of "
                         "the base",
                         value_error);
  }
}

}  // namespace talpa::fused_perft_block_test
