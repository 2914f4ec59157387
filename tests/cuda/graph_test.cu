// SPDX-License-Identifier: Apache-2.0
// On a real device only: capture is the runtime's, not ours to simulate.
#include "products.hpp"
#include "support/parity.hpp"

#include <talpa/cuda/adamw.hpp>
#include <talpa/cuda/add.hpp>
#include <talpa/cuda/bias.hpp>
#include <talpa/cuda/convert.hpp>
#include <talpa/cuda/copy.hpp>
#include <talpa/cuda/dropout.hpp>
#include <talpa/cuda/fill.hpp>
#include <talpa/cuda/gather.hpp>
#include <talpa/cuda/group_loss.hpp>
#include <talpa/cuda/grouped_gemm.hpp>
#include <talpa/cuda/indexed_gemm.hpp>
#include <talpa/cuda/mole_route.hpp>
#include <talpa/cuda/pair_gates.hpp>
#include <talpa/cuda/rank_gate.hpp>
#include <talpa/cuda/reduce.hpp>
#include <talpa/cuda/routing_sums.hpp>
#include <talpa/cuda/scale.hpp>
#include <talpa/cuda/segments.hpp>
#include <talpa/cuda/select.hpp>
#include <talpa/cuda/slot_glu.hpp>
#include <talpa/layers/fused_moe_ffn.hpp>
#include <talpa/layers/fused_mole_linear.hpp>
#include <talpa/layers/fused_perft_block.hpp>
#include <talpa/layers/mole_linear.hpp>
#include <talpa/losses/load_balance.hpp>
#include <talpa/optim/adamw.hpp>
#include <talpa/routing/statistics.hpp>
#include <talpa/scorers/linear_scorer.hpp>
#include <talpa/selectors/top_k.hpp>

#include <doctest/doctest.h>

#include <utility>

namespace talpa::cuda_graph_test {

namespace {

using S = bfloat16;
using layer_type = fused_mole_linear<top_k<gate::renormalised>, S>;
constexpr index inputs = 64, outputs = 48, tokens = 1000;

matrix<S, cpu> batch_of(int step) {
  support::test_random random(100 + step);
  matrix<S, cpu> x(tokens, inputs + outputs);
  for (index i = 0; i < x.size(); ++i) {
    x.data()[i] = static_cast<S>(static_cast<float>(random.uniform(-2.0, 2.0)));
  }
  return x;
}

/// The weights after some steps, each captured or not, and the statistics of the last.
struct trained {
  matrix<float, cpu> a, b, router;
  statistics_report statistics;
};

/// load(i) and a step for each i < steps; from the second on the step is a replayed graph if
/// `captured`, and no memory is taken.
template <class Load, class Step>
void repeat(context<gpu>& ctx, bool captured, int steps, const Load& load, const Step& step) {
  load(0);
  step();
  ctx.synchronise();
  const index allocations = ctx.memory.allocations() + ctx.scratch.allocations();
  cudaGraphExec_t instance = nullptr;
  for (int i = 1; i < steps; ++i) {
    load(i);
    if (!captured) {
      step();
    } else {
      if (instance == nullptr) {
        cudaGraph_t graph = nullptr;
        REQUIRE(cudaStreamBeginCapture(ctx.stream, cudaStreamCaptureModeGlobal) == cudaSuccess);
        step();
        REQUIRE(cudaStreamEndCapture(ctx.stream, &graph) == cudaSuccess);
        REQUIRE(cudaGraphInstantiate(&instance, graph, 0) == cudaSuccess);
        cudaGraphDestroy(graph);
      }
      REQUIRE(cudaGraphLaunch(instance, ctx.stream) == cudaSuccess);
    }
    ctx.synchronise();
  }
  if (instance != nullptr) cudaGraphExecDestroy(instance);
  CHECK(ctx.memory.allocations() + ctx.scratch.allocations() == allocations);
}

trained train(bool captured, int steps) {
  context<gpu> ctx;
  const layer_type layer{{2}, lora{.rank = 8}, 8};
  generator random(1);
  matrix<S, gpu> base(outputs, inputs);
  to_device<S, gpu>(batch_of(-1).view().row_range(0, outputs).col_range(0, inputs), base.view());
  auto p = layer.init(ctx, std::as_const(base).view(), random);
  matrix<S, gpu> x(tokens, layer.padded_inputs(inputs)), y(tokens, outputs),
      dy(tokens, layer.padded_outputs(outputs)), dx(tokens, inputs);
  matrix<float, gpu> dlogits(tokens, 8), dgates(tokens, 8), dvalue(1, 1);
  ops::fill(ctx, 0.01f, dvalue.view());
  parameter_group<float, gpu> group{.learning_rate = 0.01};
  group.add(p);
  adamw<float, gpu> optimiser({group});
  const load_balance<balance::per_selection, balance::per_layer> even;
  const auto statistics = make_statistics<float>(ctx.memory, 8);
  const auto step = [&] {
    const workspace<gpu>::scope scope(ctx.memory);
    const auto kept = layer.forward(ctx, p, x.view(), y.view(), mode::training, {},
                                    statistics.wanted(grad_mode::overwrite));
    const auto loss = even.forward(ctx, kept.routed);
    routed_gradient<float, gpu> from_losses;
    from_losses.dlogits = dlogits.view();
    from_losses.dgates = dgates.view();
    even.backward(ctx, kept.routed, loss, dvalue, from_losses, grad_mode::overwrite);
    layer.backward(ctx, p, kept, x.view(), dy.view(), dx.view(), grad_mode::overwrite,
                   mode::training, &from_losses);
    optimiser.step(ctx);
    optimiser.zero_grad(ctx);
    layer.refresh(ctx, p);
  };
  const auto load = [&](int i) {
    const matrix<S, cpu> batch = batch_of(i);
    to_device<S, gpu>(batch.view().col_range(0, inputs), x.view().col_range(0, inputs));
    to_device<S, gpu>(batch.view().col_range(inputs, outputs), dy.view().col_range(0, outputs));
  };
  repeat(ctx, captured, steps, load, step);
  return {to_host(p.a.value()), to_host(p.b.value()), to_host(p.router.value()),
          statistics_report(statistics)};
}

/// The same for experts of which each is a network, with one that is always on.
trained train_ffn(bool captured, int steps) {
  context<gpu> ctx;
  constexpr index hidden = 24, experts = 5;
  const fused_moe_ffn<top_k<gate::renormalised>, S> layer{{2}, hidden, experts, {}, 1, 2.0, true};
  generator random(1);
  const auto bank =
      to_device<gpu>(batch_of(-1).view().row_range(0, (1 + experts) * hidden).col_range(0, inputs));
  auto p = layer.init(ctx, std::as_const(bank).view(), std::as_const(bank).view(),
                      std::as_const(bank).view(), random);
  layer.train_experts(ctx, p);
  layer.train_shared(ctx, p);
  matrix<S, gpu> x(tokens, inputs), dy(tokens, inputs), y(tokens, inputs), dx(tokens, inputs);
  parameter_group<float, gpu> group{.learning_rate = 0.01};
  group.add(p);
  adamw<float, gpu> optimiser({group});
  const auto step = [&] {
    const workspace<gpu>::scope scope(ctx.memory);
    const auto kept = layer.forward(ctx, p, std::as_const(x).view(), y.view(), mode::training);
    layer.backward(ctx, p, kept, std::as_const(x).view(), std::as_const(dy).view(), dx.view(),
                   grad_mode::overwrite, mode::training);
    optimiser.step(ctx);
    optimiser.zero_grad(ctx);
    layer.refresh(ctx, p);
  };
  const auto load = [&](int i) {
    const matrix<S, cpu> batch = batch_of(i);
    to_device<S, gpu>(batch.view().col_range(0, inputs), x.view());
    to_device<S, gpu>(batch_of(i + 50).view().col_range(0, inputs), dy.view());
  };
  repeat(ctx, captured, steps, load, step);
  return {to_host(p.gate_up.value()), to_host(p.down.value()), to_host(p.router.value()), {}};
}

/// The same for adapters beside them, behind a router of their own.
trained train_perft(bool captured, int steps) {
  context<gpu> ctx;
  constexpr index hidden = 24, experts = 5, adapters = 6;
  using router_type = router<linear_scorer, top_k<gate::renormalised>>;
  const fused_perft_block<fused_moe_ffn<top_k<gate::renormalised>, S>,
                          placement::routed<router_type>, lora>
      layer{{{2}, hidden, experts}, {{{}, {2}}}, {.rank = 4}, adapters};
  generator random(1);
  const auto bank =
      to_device<gpu>(batch_of(-1).view().row_range(0, experts * hidden).col_range(0, inputs));
  auto base = layer.base.init(ctx, std::as_const(bank).view(), std::as_const(bank).view(),
                              std::as_const(bank).view(), random);
  base.freeze();
  auto p = layer.init(ctx, std::move(base), random);
  matrix<S, gpu> x(tokens, inputs), dy(tokens, inputs), y(tokens, inputs), dx(tokens, inputs);
  parameter_group<float, gpu> group{.learning_rate = 0.01};
  group.add(p);
  adamw<float, gpu> optimiser({group});
  const auto of_base = make_statistics<float>(ctx.memory, experts);
  const auto statistics = make_statistics<float>(ctx.memory, adapters);
  const auto step = [&] {
    const workspace<gpu>::scope scope(ctx.memory);
    const auto kept = layer.forward(ctx, p, std::as_const(x).view(), y.view(), mode::training, {},
                                    of_base.wanted(grad_mode::overwrite),
                                    statistics.wanted(grad_mode::overwrite));
    layer.backward(ctx, p, kept, std::as_const(x).view(), std::as_const(dy).view(), dx.view(),
                   grad_mode::overwrite, mode::training);
    optimiser.step(ctx);
    optimiser.zero_grad(ctx);
    layer.refresh(ctx, p);
  };
  const auto load = [&](int i) {
    const matrix<S, cpu> batch = batch_of(i);
    to_device<S, gpu>(batch.view().col_range(0, inputs), x.view());
    to_device<S, gpu>(batch_of(i + 50).view().col_range(0, inputs), dy.view());
  };
  repeat(ctx, captured, steps, load, step);
  return {to_host(p.a.value()), to_host(p.b.value()), to_host(p.router.value()),
          statistics_report(statistics)};
}

/// The same for a layer in float whose slots are sorted.
template <strategy Execution>
trained train_in_float(bool captured, int steps) {
  context<gpu> ctx;
  const mole_linear<router<linear_scorer, top_k<gate::renormalised>>, lora> layer{
      {{}, {2}}, {.rank = 8}, 8, Execution};
  generator random(1);
  auto base = init_affine<float, gpu>(inputs, outputs, true, false, random, "base.");
  base.freeze();
  auto p = layer.init<float, gpu>(std::move(base), random);
  matrix<float, gpu> x(tokens, inputs), dy(tokens, outputs), y(tokens, outputs), dx(tokens, inputs);
  parameter_group<float, gpu> group{.learning_rate = 0.01};
  group.add(p.router).add(p.expert);
  adamw<float, gpu> optimiser({group});
  const auto statistics = make_statistics<float>(ctx.memory, 8);
  const auto step = [&] {
    const workspace<gpu>::scope scope(ctx.memory);
    const auto kept = layer.forward(ctx, p, x.view(), y.view(), mode::training);
    measure(ctx, kept.routed, statistics, grad_mode::overwrite);
    layer.backward(ctx, p, kept, x.view(), dy.view(), dx.view(), grad_mode::overwrite);
    optimiser.step(ctx);
    optimiser.zero_grad(ctx);
  };
  const auto load = [&](int i) {
    support::test_random numbers(200 + i);
    to_device<float, gpu>(support::random_matrix<float>(numbers, tokens, inputs).view(), x.view());
    to_device<float, gpu>(support::random_matrix<float>(numbers, tokens, outputs).view(),
                          dy.view());
  };
  repeat(ctx, captured, steps, load, step);
  return {to_host(p.expert.a.value()), to_host(p.expert.b.value()),
          to_host(p.router.scorer.weight.value()), statistics_report(statistics)};
}

}  // namespace

TEST_SUITE("cuda/graph") {
  TEST_CASE("a captured step, replayed on other tokens, does what the step does") {
    for (const auto run : {train, train_ffn, train_perft, train_in_float<strategy::grouped>,
                           train_in_float<strategy::indexed>}) {
      const trained eager = run(false, 5), replayed = run(true, 5);
      CHECK(support::bit_difference(replayed.a, eager.a) == "");
      CHECK(support::bit_difference(replayed.b, eager.b) == "");
      CHECK(support::bit_difference(replayed.router, eager.router) == "");
      CHECK(replayed.statistics.counts == eager.statistics.counts);
      CHECK(replayed.statistics.importance == eager.statistics.importance);
      CHECK(replayed.statistics.probability == eager.statistics.probability);
      CHECK(replayed.statistics.entropy == eager.statistics.entropy);
    }
  }
}

}  // namespace talpa::cuda_graph_test
