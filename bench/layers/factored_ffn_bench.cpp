// SPDX-License-Identifier: Apache-2.0
//
// What a dense feed-forward network costs at inference when k of the E experts that its neurons
// were split into work for a token. Each iteration times the dense network, the experts and the
// dense network again: `vs_dense` is the median of experts / mean of its two neighbours, `floor`
// the same ratio by flop count, k / E and the router. `flop/s` counts the operations that have to
// be done.
#include "beside.hpp"

#include <talpa/talpa.hpp>

#include <benchmark/benchmark.h>

#include <string>

namespace {

using namespace talpa;
using talpa::index;

struct workload {
  index tokens, width, neurons, experts, selected;  // N, D, F, E, k
};

void run(benchmark::State& state, const workload& w) {
  context<cpu> ctx(1);
  generator random(1);
  const dense_ffn<> dense;
  const factored_ffn<> layer{.router = {.scorer = {.bias = true}, .selector = {.k = w.selected}},
                             .experts = w.experts};
  auto network = dense.init<float, cpu>(w.width, w.neurons, random);
  network.freeze();
  const auto params = layer.borrow(network, random);
  const auto x = bench::normal_matrix(w.tokens, w.width, 1.0, random);  // [N, D]
  matrix<float, cpu> y(w.tokens, w.width);                              // [N, D]
  bench::time_beside(
      state, w.tokens, [&] { infer(ctx, layer, params, x, y.view()); }, "dense",
      [&] { infer(ctx, dense, network, x, y.view()); });
  const double n = static_cast<double>(w.tokens), d = static_cast<double>(w.width);
  const double f = static_cast<double>(w.neurons), e = static_cast<double>(w.experts);
  const double dense_flop = 6.0 * n * d * f;
  const double flop = dense_flop * static_cast<double>(w.selected) / e + 2.0 * n * d * e;
  state.counters["floor"] = flop / dense_flop;
  state.counters["flop/s"] =
      benchmark::Counter(flop, benchmark::Counter::kIsIterationInvariantRate);
}

void add(const workload& w) {
  const std::string name = "layers/factored_ffn/infer/N:" + std::to_string(w.tokens) +
                           "/D:" + std::to_string(w.width) + "/F:" + std::to_string(w.neurons) +
                           "/E:" + std::to_string(w.experts) + "/K:" + std::to_string(w.selected) +
                           "/f32/cpu";
  benchmark::RegisterBenchmark(name.c_str(), [w](benchmark::State& state) { run(state, w); })
      ->UseManualTime()
      ->Unit(benchmark::kMillisecond);
}

const int registered = [] {
  struct share {
    index experts, selected;
  };
  for (const index width : {256, 768}) {
    for (const share& s : {share{4, 1}, share{4, 2}, share{4, 4}, share{8, 2}, share{16, 4}}) {
      add({512, width, 4 * width, s.experts, s.selected});
    }
  }
  return 0;
}();

}  // namespace
