// SPDX-License-Identifier: Apache-2.0
//
// Forward and backward of each preset that adapts a linear map, over that map alone, frozen and
// packed, on one thread: `overhead_pct` is the median of layer / mean of its two neighbours - 1.
// Elements of x are normal with the deviation `x`, with which the logits of routers grow: as they
// are initialised, with 1 most tokens are uncertain, with 5 few are. `active` is the mean number of
// experts a token uses, `entropy` the mean of its softmax in nats, `violation` that of the load.
// mix_lora and those of PERFT adapt a whole network: layers/ffn_bench.cpp.
#include "workloads.hpp"

#include <talpa/presets/ada_mole.hpp>
#include <talpa/presets/dyn_mole.hpp>
#include <talpa/presets/goat.hpp>
#include <talpa/presets/gw_moe.hpp>
#include <talpa/presets/hydra_lora.hpp>
#include <talpa/presets/ld_mole.hpp>
#include <talpa/presets/lora_moe.hpp>
#include <talpa/presets/mola.hpp>
#include <talpa/presets/mor.hpp>
#include <talpa/presets/re_moe.hpp>
#include <talpa/presets/smora.hpp>
#include <talpa/talpa.hpp>

#include <benchmark/benchmark.h>

#include <string>
#include <vector>

namespace {

using namespace talpa;
using talpa::index;

constexpr index tokens = 512;

template <class Layer>
void run(benchmark::State& state, const Layer& layer, index width, double deviation) {
  context<cpu> ctx(1);
  generator random(1);
  auto base = linear{.bias = false}.init<float, cpu>(width, width, random, "base.");
  base.freeze();
  auto params = layer.template init<float, cpu>(std::move(base), random);
  params.base.pack(ctx);
  const auto x = bench::normal_matrix(tokens, width, deviation, random);  // [N, D]
  const auto dy = bench::normal_matrix(tokens, width, 1.0, random);       // [N, O]
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

template <class Layer>
void add(const std::string& name, const Layer& layer, index width) {
  for (const int deviation : {1, 5}) {
    const std::string full = "presets/" + name + "/step/N:" + std::to_string(tokens) +
                             "/D:" + std::to_string(width) + "/E:" + std::to_string(layer.experts) +
                             "/R:" + std::to_string(layer.expert.rank) +
                             "/x:" + std::to_string(deviation) + "/threads:1/f32/cpu";
    benchmark::RegisterBenchmark(
        full.c_str(), [=](benchmark::State& state) { run(state, layer, width, deviation); })
        ->UseManualTime()
        ->Unit(benchmark::kMillisecond);
  }
}

const int registered = [] {
  for (const index width : {768, 2048}) {
    add("ada_mole", presets::ada_mole, width);
    add("dyn_mole", presets::dyn_mole, width);
    add("goat", presets::goat(width), width);
    add("gw_moe", presets::gw_moe, width);
    add("hydra_lora", presets::hydra_lora, width);
    add("ld_mole", presets::ld_mole, width);
    add("lora_moe", presets::lora_moe, width);
    add("mola", presets::mola, width);
    add("mor", presets::mor, width);
    add("re_moe", presets::re_moe, width);
    add("smora", presets::smora, width);
  }
  return 0;
}();

}  // namespace
