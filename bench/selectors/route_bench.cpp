// SPDX-License-Identifier: Apache-2.0
//
// Routing alone, from logits to gates, mask and statistics, on one thread. Each iteration times the
// selector between two runs of raw top-k of the same sizes and two of a plain loop that does what
// the selector does, token by token with std::exp and sorting. `ns/token` is the median of the
// selector; `vs_top_k` and `vs_loop` are medians of its time over the mean of its two neighbours.
#include "selectors/plain_routing.hpp"
#include "workloads.hpp"

#include <talpa/talpa.hpp>

#include <benchmark/benchmark.h>

#include <string>

namespace {

using namespace talpa;
using bench::plain_row;
using talpa::index;

constexpr index tokens = 4096;

template <class Selector, class Plain>
void run(benchmark::State& state, const Selector& selector, index experts, index k, Plain plain) {
  context<cpu> ctx(1);
  generator random(1);
  const auto logits = bench::normal_matrix(tokens, experts, 1.0, random);  // [N, E]
  const auto control = bench::normal_matrix(tokens, 1, 1.0, random);       // [N, 1]
  const matrix<float, cpu> bias(1, experts);                               // [1, E]
  routing<float, cpu> chosen(tokens, experts);
  const auto statistics = make_statistics<float>(ctx.memory, experts);
  const auto route = [&](const auto& policy) {
    const select_inputs<float, cpu> more{control.view(), bias.view(), 0};
    ops::select(ctx, policy, logits, {}, chosen.gates.view(), chosen.mask.view(), more);
    measure(ctx, routed_view<float, cpu>{logits.view(), chosen.view()}, statistics,
            grad_mode::overwrite);
  };
  const auto selector_pass = [&] { route(selector); };
  const auto top_k_pass = [&] { route(top_k<gate::raw>{.k = k}); };
  bench::plain_router loop(experts);
  const auto loop_pass = [&] {
    loop.begin();
    for (index n = 0; n < tokens; ++n) {
      loop.route({logits.view().row(n), control(n, 0), experts, k}, plain);
    }
    benchmark::DoNotOptimize(loop.totals());
  };
  selector_pass();
  top_k_pass();
  loop_pass();
  std::vector<double> times, to_top_k, to_loop;
  for (auto _ : state) {
    const double loop_before = bench::seconds(loop_pass), top_before = bench::seconds(top_k_pass);
    const double time = bench::seconds(selector_pass);
    const double top_after = bench::seconds(top_k_pass), loop_after = bench::seconds(loop_pass);
    times.push_back(time);
    to_top_k.push_back(2.0 * time / (top_before + top_after));
    to_loop.push_back(2.0 * time / (loop_before + loop_after));
    state.SetIterationTime(time);
  }
  const double n = static_cast<double>(tokens), e = static_cast<double>(experts);
  state.counters["ns/token"] = 1e9 * bench::median(times) / n;
  state.counters["vs_top_k"] = bench::median(to_top_k);
  state.counters["vs_loop"] = bench::median(to_loop);
  state.counters["tokens/s"] = benchmark::Counter(n, benchmark::Counter::kIsIterationInvariantRate);
  // Logits are read twice, gates written and read, the mask likewise.
  state.counters["bytes/s"] = benchmark::Counter(n * (16.0 * e + 8.0 * (e + 31.0) / 32.0),
                                                 benchmark::Counter::kIsIterationInvariantRate);
}

/// One benchmark for each E; `make(experts, k)` gives the selector. `k` of 0: the selector has
/// none, and top-2 stands beside it.
template <class Make, class Plain>
void add(const std::string& name, const std::vector<index>& ks, Make make, Plain plain) {
  for (const index experts : {8, 16, 64, 128}) {
    for (const index k : ks) {
      const std::string full = "selectors/" + name + "/N:" + std::to_string(tokens) +
                               "/E:" + std::to_string(experts) +
                               (k > 0 ? "/K:" + std::to_string(k) : std::string()) + "/f32/cpu";
      benchmark::RegisterBenchmark(full.c_str(), [=](benchmark::State& state) {
        run(state, make(experts, k), experts, k > 0 ? k : 2, plain);
      })->UseManualTime();
    }
  }
}

const std::vector<index> all_k = {1, 2, 8};
const std::vector<index> no_k = {0};

void add_all() {
  add(
      "top_k_raw", all_k, [](index, index k) { return top_k<gate::raw>{.k = k}; },
      bench::plain_top_k{});
  add(
      "top_k_renormalised", all_k, [](index, index k) { return top_k<gate::renormalised>{.k = k}; },
      bench::plain_top_k{true});
  add(
      "dense", no_k, [](index, index) { return dense{}; }, bench::plain_dense{});
}

const int registered = (add_all(), 0);

}  // namespace
