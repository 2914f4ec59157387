// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "selectors/measured_selectors.hpp"
#include "selectors/plain_routing.hpp"
#include "workloads.hpp"

#include <talpa/talpa.hpp>

#include <benchmark/benchmark.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <string>
#include <vector>

// Routing alone, from logits to gates, mask and statistics, on one thread. Each iteration times the
// selector between two runs of raw top-k of the same sizes and two of a plain loop that does what
// the selector does, token by token with std::exp and sorting. `ns/token` is the median of the
// selector; `vs_top_k` and `vs_loop` are medians of its time over the mean of its two neighbours.
// All in time of the processor, so that other processes disturb little. Lines that begin with
// `selectors/` end there; lines that begin with `routing/` sort the slots by expert as well.
// `active` is the mean number of experts a token uses, `entropy` the mean of its softmax in nats,
// `violation` that of the load. With `skew` the logits of an expert have a mean of their own,
// normal with that deviation: some experts are wanted by most tokens.

namespace talpa::bench {

/// What is routed, and where it goes; with `sorts` the slots are sorted too.
struct routing_bench {
  routing_bench(index tokens, index experts, index k, double skew, bool sorts)
      : ctx(1),
        random(1),
        logits(skewed_logits(tokens, experts, skew, random)),
        control(normal_matrix(tokens, 1, 1.0, random)),
        bias(normal_matrix(1, experts, 0.1, random)),
        chosen(tokens, experts),
        statistics(make_statistics<float>(ctx.memory, experts)),
        batch{logits.view(), control.view(), bias.view(), tokens < 512 ? tokens : 512, k} {
    if (!sorts) return;
    slots = make_segments(ctx.memory, tokens, experts, tokens * experts);
    gate_of_slot = ctx.memory.take<float>(tokens * experts);
  }

  static matrix<float, cpu> skewed_logits(index tokens, index experts, double skew,
                                          generator& random) {
    matrix<float, cpu> logits = normal_matrix(tokens, experts, 1.0, random);
    if (skew == 0.0) return logits;
    const matrix<float, cpu> mean = normal_matrix(1, experts, skew, random);
    for (index n = 0; n < tokens; ++n) {
      for (index e = 0; e < experts; ++e) logits(n, e) += mean(0, e);
    }
    return logits;
  }

  template <class Selector>
  void choose(const Selector& selector) {
    const select_inputs<float, cpu> more{control.view(), bias.view(), batch.sequence_length};
    ops::select(ctx, selector, logits, {}, chosen.gates.view(), chosen.mask.view(), more);
  }
  template <class Selector>
  void route(const Selector& selector) {
    choose(selector);
    measure(ctx, routed_view<float, cpu>{logits.view(), chosen.view()}, statistics,
            grad_mode::overwrite);
    if (gate_of_slot.data != nullptr) sort();
  }
  void sort() {
    ops::build_segments<cpu, float>(ctx, chosen.mask.view(), chosen.gates.view(), slots,
                                    gate_of_slot);
  }
  /// Whether a plain loop came to the same sums of gates. One in a hundred may differ: sums are
  /// formed in another order, which decides some ties, and an auction ends near the best.
  bool agrees(const plain_router& loop) const {
    double difference = 0.0, all = 0.0;
    for (index e = 0; e < logits.cols(); ++e) {
      const double ours = static_cast<double>(statistics.totals.importance(0, e));
      difference +=
          std::abs(ours - static_cast<double>(loop.importance()[static_cast<std::size_t>(e)]));
      all += ours;
    }
    return difference <= 0.01 * all;
  }

  context<cpu> ctx;
  generator random;
  matrix<float, cpu> logits;   // [N, E]
  matrix<float, cpu> control;  // [N, 1]
  matrix<float, cpu> bias;     // [1, E]
  routing<float, cpu> chosen;
  routing_statistics<float, cpu> statistics;
  segments<cpu> slots{};
  vector_view<float, cpu> gate_of_slot{};
  plain_batch batch;
};

inline void compare(benchmark::State& state, const routing_bench& bench,
                    const std::function<void()>& selector_pass,
                    const std::function<void()>& top_k_pass,
                    const std::function<void()>& loop_pass) {
  std::vector<double> times, to_top_k, to_loop;
  for (auto _ : state) {
    const double loop_before = busy_seconds(loop_pass), top_before = busy_seconds(top_k_pass);
    const double time = busy_seconds(selector_pass);
    const double top_after = busy_seconds(top_k_pass), loop_after = busy_seconds(loop_pass);
    times.push_back(time);
    to_top_k.push_back(2.0 * time / (top_before + top_after));
    to_loop.push_back(2.0 * time / (loop_before + loop_after));
    state.SetIterationTime(time);
  }
  const double n = static_cast<double>(bench.logits.rows());
  const double e = static_cast<double>(bench.logits.cols());
  state.counters["ns/token"] = 1e9 * median(times) / n;
  state.counters["vs_top_k"] = median(to_top_k);
  state.counters["vs_loop"] = median(to_loop);
  state.counters["tokens/s"] = benchmark::Counter(n, benchmark::Counter::kIsIterationInvariantRate);
  // Logits are read twice, gates written and read, the mask likewise.
  state.counters["bytes/s"] = benchmark::Counter(n * (16.0 * e + 8.0 * (e + 31.0) / 32.0),
                                                 benchmark::Counter::kIsIterationInvariantRate);
}

/// What is routed: sizes, and the deviation of the experts' mean logits.
struct route_load {
  index tokens, experts, k;
  double skew;
};

template <class Selector, class Plain>
void run_route(benchmark::State& state, const Selector& selector, const route_load& load,
               bool sorts, Plain plain) {
  routing_bench bench(load.tokens, load.experts, load.k, load.skew, sorts);
  plain_router loop(load.experts, sorts);
  const auto selector_pass = [&] { bench.route(selector); };
  const auto top_k_pass = [&] { bench.route(top_k<gate::raw>{.k = load.k}); };
  const auto loop_pass = [&] {
    loop.run(bench.batch, plain);
    benchmark::DoNotOptimize(loop.totals());
  };
  top_k_pass();
  loop_pass();
  selector_pass();
  if (!bench.agrees(loop)) {
    state.SkipWithError("the plain loop routes differently");
    return;
  }
  const statistics_report report(bench.statistics);
  compare(state, bench, selector_pass, top_k_pass, loop_pass);
  state.counters["active"] = report.active_experts();
  state.counters["entropy"] = report.mean_entropy();
  state.counters["violation"] = report.max_violation();
}

/// Two benchmarks for each E and k, with and without a sort of the slots, and for 8 and 64 experts
/// and k = 2 (or none) one with skewed logits and some with fewer and more tokens.
/// `make(experts, k)` gives the selector.
template <class Make, class Plain>
void add_route(const std::string& name, const route_sizes& sizes, Make make, Plain plain) {
  const auto add = [&](index tokens, index experts, index k, double skew, bool sorts) {
    const std::string full =
        route_name((sorts ? "routing/" : "selectors/") + name, tokens, experts, k, skew);
    const route_load load{tokens, experts, k > 0 ? k : 2, skew};
    const auto run = [=](benchmark::State& state) {
      run_route(state, make(experts, k), load, sorts, plain);
    };
    benchmark::RegisterBenchmark(full.c_str(), run)->UseManualTime();
  };
  for (const bool sorts : {false, true}) {
    for (const index experts : sizes.experts) {
      for (const index k : sizes.ks) add(sizes.tokens, experts, k, 0.0, sorts);
    }
  }
  for (const index experts : sizes.experts) {
    const bool has_two = std::find_if(sizes.ks.begin(), sizes.ks.end(),
                                      [](index k) { return k == 0 || k == 2; }) != sizes.ks.end();
    if (has_two && (experts == 8 || experts == 64)) {
      const index k = sizes.ks.front() == 0 ? 0 : 2;
      add(sizes.tokens, experts, k, skewed, true);
      if (sizes.tokens != route_sizes{}.tokens) continue;
      add(sizes.tokens / 32, experts, k, 0.0, true);
      add(8 * sizes.tokens, experts, k, 0.0, true);
    }
  }
}

/// Those of each selector of a list; `loops` gives the plain loop of each.
template <class... Measured, class Loops>
void add_routes(selector_list<Measured...>, const Loops& loops) {
  (add_route(
       Measured::name, Measured::sizes(),
       [](index experts, index k) { return Measured::make(experts, k); }, loops(Measured{})),
   ...);
}

}  // namespace talpa::bench
