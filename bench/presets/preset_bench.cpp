// SPDX-License-Identifier: Apache-2.0
//
// Forward and backward of each preset that adapts a linear map, over that map alone, frozen and
// packed, on one thread: `overhead_pct` is the median of layer / mean of its two neighbours - 1.
// Elements of x are normal with the deviation `x`, with which the logits of routers grow: as they
// are initialised, with 1 most tokens are uncertain, with 5 few are. With `skew` the logits of an
// expert have a mean of their own, normal with that deviation. `active` is the mean number of
// experts a token uses, `entropy` the mean of its softmax in nats, `violation` that of the load.
// mix_lora and those of PERFT adapt a whole network: layers/ffn_bench.cpp.
#include "presets/measured_presets.hpp"
#include "workloads.hpp"

#include <talpa/talpa.hpp>

#include <benchmark/benchmark.h>

#include <string>
#include <vector>

namespace {

using namespace talpa;
using talpa::index;

constexpr index tokens = 512;

template <class Layer>
void run(benchmark::State& state, const Layer& layer, index width, const bench::token_kind& kind) {
  context<cpu> ctx(1);
  generator random(1);
  auto base = linear{.bias = false}.init<float, cpu>(width, width, random, "base.");
  base.freeze();
  auto params = layer.template init<float, cpu>(std::move(base), random);
  params.base.pack(ctx);
  const auto x = bench::tokens_of_kind(tokens, width, kind, random);  // [N, D]
  const auto dy = bench::normal_matrix(tokens, width, 1.0, random);   // [N, O]
  if (kind.skew != 0) {
    bench::add_mean_logits(params.router.scorer, bench::mean_logits(layer.experts, kind, random));
  }
  matrix<float, cpu> y(tokens, width), dx(tokens, width);
  generator noise(2);
  const batch_info<float, cpu> batch{.random = &noise};

  routing_statistics<float, cpu> statistics;
  const auto linear_pass = [&] {
    affine_forward<cpu, float>(ctx, params.base, x, y);
    affine_backward<cpu, float>(ctx, params.base, x, dy, dx, grad_mode::overwrite);
  };
  const auto layer_pass = [&](bool look) {
    const workspace<cpu>::scope scope(ctx.memory);
    const auto saved = layer.forward(ctx, params, x, y, mode::training, batch);
    if (look) statistics = measure(ctx, saved.routed);
    layer.backward(ctx, params, saved, x, dy, dx, grad_mode::overwrite);
  };
  linear_pass();
  layer_pass(true);
  const statistics_report report(statistics);
  std::vector<double> times, ratios;
  double before = bench::busy_seconds(linear_pass);
  for (auto _ : state) {
    const double time = bench::busy_seconds([&] { layer_pass(false); });
    const double after = bench::busy_seconds(linear_pass);
    times.push_back(time);
    ratios.push_back(2.0 * time / (before + after));
    before = after;
    state.SetIterationTime(time);
  }
  state.counters["overhead_pct"] = 100.0 * (bench::median(ratios) - 1.0);
  state.counters["ns/token"] = 1e9 * bench::median(times) / static_cast<double>(tokens);
  state.counters["active"] = report.active_experts();
  state.counters["entropy"] = report.mean_entropy();
  state.counters["violation"] = report.max_violation();
  state.SetLabel(strategy_name(layer.choose(width, width)));
}

template <class... Measured>
void add(bench::preset_list<Measured...>, index width) {
  const auto one = [&]<class M>(M) {
    const auto layer = M::layer(width);
    for (const bench::token_kind& kind : bench::token_kinds) {
      const std::string full =
          bench::preset_name(M::name, "step", tokens, width, bench::ranked_sizes(layer), kind) +
          "/threads:1/f32/cpu";
      benchmark::RegisterBenchmark(full.c_str(),
                                   [=](benchmark::State& state) { run(state, layer, width, kind); })
          ->UseManualTime()
          ->Unit(benchmark::kMillisecond);
    }
  };
  (one(Measured{}), ...);
}

const int registered = [] {
  for (const index width : {768, 2048}) {
    add(bench::controlled_presets{}, width);
    add(bench::entropy_presets{}, width);
    add(bench::top_k_presets{}, width);
    add(bench::biased_presets{}, width);
    add(bench::dense_presets{}, width);
  }
  return 0;
}();

}  // namespace
