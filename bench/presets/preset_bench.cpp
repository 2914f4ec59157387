// SPDX-License-Identifier: Apache-2.0
//
// Forward and backward of each preset that adapts a linear map, over that map alone, frozen and
// packed, on one thread: `overhead_pct` is the median of layer / mean of its two neighbours - 1.
// Elements of x are normal with the deviation `x`, with which the logits of routers grow: as they
// are initialised, with 1 most tokens are uncertain, with 5 few are. With `skew` the logits of an
// expert have a mean of their own, normal with that deviation. `active` is the mean number of
// experts a token uses, `entropy` the mean of its softmax in nats, `violation` that of the load.
// `peak_pct` is the share of the multiply-adds that registers alone make of those that base, router
// and the ranks of active experts need. The preset's own sizes stand beside fewer and more tokens
// and four times its rank.
// mix_lora and those of PERFT adapt a whole network: layers/ffn_bench.cpp.
#include "peaks.hpp"
#include "presets/measured_presets.hpp"
#include "workloads.hpp"

#include <talpa/talpa.hpp>

#include <benchmark/benchmark.h>

#include <string>
#include <vector>

namespace {

using namespace talpa;
using talpa::index;

struct workload {
  index tokens, width;
  bench::token_kind kind;
};

template <class Layer>
void run(benchmark::State& state, const Layer& layer, const workload& w) {
  const auto& [tokens, width, kind] = w;
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
  std::vector<double> times, ratios, peaks;
  double before = bench::busy_seconds(linear_pass);
  for (auto _ : state) {
    const double time = bench::busy_seconds([&] { layer_pass(false); });
    const double after = bench::busy_seconds(linear_pass);
    times.push_back(time);
    ratios.push_back(2.0 * time / (before + after));
    before = after;
    peaks.push_back(bench::peak_rate(ctx));
    state.SetIterationTime(time);
  }
  const double n = static_cast<double>(tokens), d = static_cast<double>(width);
  const double time = bench::median(times), experts = static_cast<double>(layer.experts);
  const double ranks = report.active_experts() * static_cast<double>(layer.expert.rank);
  const double products = 2.0 * n * d * d + 3.0 * n * d * (experts + 2.0 * ranks);
  state.counters["overhead_pct"] = 100.0 * (bench::median(ratios) - 1.0);
  state.counters["ns/token"] = 1e9 * time / n;
  state.counters["tokens/s"] = benchmark::Counter(n, benchmark::Counter::kIsIterationInvariantRate);
  state.counters["peak_pct"] = 100.0 * products / (time * bench::median(peaks));
  state.counters["active"] = report.active_experts();
  state.counters["entropy"] = report.mean_entropy();
  state.counters["violation"] = report.max_violation();
  state.SetLabel(strategy_name(layer.choose(width, width)));
}

template <class Measured>
void add(Measured, const workload& w, index times_rank) {
  auto layer = Measured::layer(w.width);
  layer.expert.rank *= times_rank;
  const std::string full = bench::preset_name(Measured::name, "step", w.tokens, w.width,
                                              bench::ranked_sizes(layer), w.kind) +
                           "/threads:1/f32/cpu";
  benchmark::RegisterBenchmark(full.c_str(), [=](benchmark::State& state) { run(state, layer, w); })
      ->UseManualTime()
      ->Unit(benchmark::kMillisecond);
}

template <class... Measured>
void add_all(bench::preset_list<Measured...>) {
  const auto add_one = [](auto measured) {
    for (const index width : {768, 2048}) {
      for (const bench::token_kind& kind : bench::token_kinds) add(measured, {512, width, kind}, 1);
    }
    add(measured, {64, 768, bench::even_tokens}, 1);
    add(measured, {4096, 768, bench::even_tokens}, 1);
    add(measured, {512, 768, bench::even_tokens}, 4);
  };
  (add_one(Measured{}), ...);
}

const int registered = [] {
  add_all(bench::controlled_presets{});
  add_all(bench::entropy_presets{});
  add_all(bench::top_k_presets{});
  add_all(bench::biased_presets{});
  add_all(bench::dense_presets{});
  return 0;
}();

}  // namespace
