// SPDX-License-Identifier: Apache-2.0
//
// What a mixture of LoRA experts costs on top of the frozen linear map that it adapts. Each
// iteration times the bare linear, the layer and the linear again; `overhead_pct` is the median of
// layer / mean of its two neighbours - 1. `floor_pct` is the same ratio by flop count alone.
#include "workloads.hpp"

#include <talpa/talpa.hpp>

#include <benchmark/benchmark.h>

#include <string>

namespace {

using namespace talpa;
using talpa::index;

struct workload {
  index tokens, width, rank, selected;  // N, D = O, R, K; K = 0: soft
  int threads;
  bool backward;
  strategy execution;
};

constexpr index expert_count = 8;

template <class Selector>
void run(benchmark::State& state, const workload& w, const Selector& selector) {
  context<cpu> ctx(w.threads);
  generator random(1);
  const mole_linear<router<linear_scorer, Selector>, lora> layer{.router = {.selector = selector},
                                                                 .expert = {.rank = w.rank},
                                                                 .experts = expert_count,
                                                                 .execution = w.execution};
  auto base = linear{.bias = false}.init<float, cpu>(w.width, w.width, random, "base.");
  base.freeze();
  auto params = layer.template init<float, cpu>(std::move(base), random);
  fill_normal(params.expert.b.value(), 0.1, random);
  const auto x = bench::normal_matrix(w.tokens, w.width, 1.0, random);   // [N, D]
  const auto dy = bench::normal_matrix(w.tokens, w.width, 1.0, random);  // [N, O]
  matrix<float, cpu> y(w.tokens, w.width), dx(w.tokens, w.width);

  const auto linear_pass = [&] {
    affine_forward<cpu, float>(ctx, params.base, x, y);
    if (w.backward) {
      affine_backward<cpu, float>(ctx, params.base, x, dy, dx, grad_mode::overwrite);
    }
  };
  const auto layer_pass = [&] {
    const workspace<cpu>::scope scope(ctx.memory);
    const auto saved = layer.forward(ctx, params, x, y, mode::training);
    if (w.backward) layer.backward(ctx, params, saved, x, dy, dx, grad_mode::overwrite);
  };
  linear_pass();
  layer_pass();
  std::vector<double> ratios, linear_times;
  double before = bench::seconds(linear_pass);
  for (auto _ : state) {
    const double time = bench::seconds(layer_pass);
    const double after = bench::seconds(linear_pass);
    ratios.push_back(2.0 * time / (before + after));
    linear_times.push_back(after);
    before = after;
    state.SetIterationTime(time);
  }
  const double n = static_cast<double>(w.tokens), d = static_cast<double>(w.width);
  const double k = static_cast<double>(w.selected == 0 ? expert_count : w.selected);
  const double r = static_cast<double>(w.rank), e = static_cast<double>(expert_count);
  const double linear_seconds = bench::median(linear_times);
  const double linear_flop = (w.backward ? 4.0 : 2.0) * n * d * d;
  // Router and selected ranks, forward; backward adds dx and the gradients of both.
  const double adapter_flop = 2.0 * n * d * (w.backward ? 3.0 : 1.0) * (e + 2.0 * k * r);
  state.counters["overhead_pct"] = 100.0 * (bench::median(ratios) - 1.0);
  state.counters["floor_pct"] = 100.0 * adapter_flop / linear_flop;
  state.counters["linear_ms"] = 1e3 * linear_seconds;
  state.counters["linear_gflops"] = linear_flop / linear_seconds * 1e-9;
  state.counters["tokens/s"] = benchmark::Counter(n, benchmark::Counter::kIsIterationInvariantRate);
}

void run(benchmark::State& state, const workload& w) {
  if (w.selected == 0) {
    run(state, w, dense{});
  } else {
    run(state, w, top_k<gate::renormalised>{.k = w.selected});
  }
}

void register_all() {
  for (const index tokens : {512, 4096}) {
    for (const index width : {768, 2048}) {
      for (const index rank : {8, 16}) {
        for (const index selected : {2, 0}) {
          for (const int threads : {1, 2}) {
            for (const bool backward : {false, true}) {
              for (const strategy s : {strategy::dense_masked, strategy::grouped}) {
                if (selected == 0 && s == strategy::grouped) continue;
                const std::string name =
                    "layers/mole_linear/" + std::string(backward ? "step" : "forward") +
                    "/N:" + std::to_string(tokens) + "/D:" + std::to_string(width) +
                    "/E:" + std::to_string(expert_count) + "/R:" + std::to_string(rank) +
                    (selected == 0 ? std::string("/soft") : "/K:" + std::to_string(selected)) +
                    "/threads:" + std::to_string(threads) + "/" + strategy_name(s) + "/f32/cpu";
                const workload w{tokens, width, rank, selected, threads, backward, s};
                benchmark::RegisterBenchmark(name.c_str(),
                                             [w](benchmark::State& state) { run(state, w); })
                    ->UseManualTime()
                    ->Unit(benchmark::kMillisecond);
              }
            }
          }
        }
      }
    }
  }
}

const int registered = (register_all(), 0);

}  // namespace
