// SPDX-License-Identifier: Apache-2.0
//
// What a mixture of LoRA experts costs on top of the frozen, packed linear map that it adapts. Each
// iteration times the bare linear, the layer and the linear again; `overhead_pct` is the median of
// layer / mean of its two neighbours - 1, on one thread of processor time. `floor_pct` is the same
// ratio by flop count alone.
// The label says which strategy `automatic` takes for these sizes, `predicted_overhead_pct` what
// its cost model expects of a step: the products of an adapter are done three times in one, of
// which the model counts one, those of the base twice.
// `dynamic` is dynamic entropy whose threshold leaves 30 % of these tokens on all experts; `active`
// is the mean number of experts a token then has.
// `flop/s` counts the operations that have to be done, `bytes/s` each operand that has to be moved
// once a pass: a strategy that does or moves more is slower by them, not faster.
#include "layers/adapted_map.hpp"
#include "workloads.hpp"

#include <talpa/talpa.hpp>

#include <benchmark/benchmark.h>

#include <bit>
#include <string>

namespace {

using namespace talpa;
using talpa::index;

/// Which of the two linear maps has a bias.
enum class biased { none, base, router };

struct workload {
  index tokens, width, experts, rank, selected;  // N, D = O, E, R, K; K = 0: soft, -1: dynamic
  int threads;
  bool backward;
  strategy execution;
  bool alone = false;  // add_adapter onto a y that is there
  biased bias = biased::none;
};

double cost_of(strategy s, const routed_cost& cost) {
  switch (s) {
    case strategy::dense_masked:
      return dense_masked_cost(cost);
    case strategy::grouped:
      return grouped_cost(cost);
    default:
      return indexed_cost(cost);
  }
}

/// How many experts tokens have.
template <class Layer>
struct spread {
  spread(context<cpu>& ctx, const Layer& layer,
         const typename Layer::template params<float, cpu>& params, const matrix<float, cpu>& x) {
    matrix<float, cpu> y(x.rows(), params.base.weight.rows());
    const workspace<cpu>::scope scope(ctx.memory);
    const auto saved = layer.forward(ctx, params, x, y, mode::inference);
    for (index n = 0; n < x.rows(); ++n) {
      index of_token = 0;
      for (index word = 0; word < saved.routed.routing.mask.cols; ++word) {
        of_token += std::popcount(saved.routed.routing.mask(n, word));
      }
      on_all += of_token == layer.experts ? 1.0 : 0.0;
      active += static_cast<double>(of_token);
    }
    on_all /= static_cast<double>(x.rows());
    active /= static_cast<double>(x.rows());
  }
  double on_all = 0.0;  ///< share of tokens with all experts
  double active = 0.0;  ///< experts a token, in the mean
};

template <class Selector>
void run(benchmark::State& state, const workload& w, const Selector& selector) {
  context<cpu> ctx(w.threads);
  using layer_type = mole_linear<router<linear_scorer, Selector>, lora>;
  bench::adapted_map<layer_type> map(
      ctx,
      {.router = {.scorer = {.bias = w.bias == biased::router}, .selector = selector},
       .expert = {.rank = w.rank},
       .experts = w.experts,
       .execution = w.execution},
      w.tokens, w.width, w.backward, w.bias == biased::base);
  layer_type& layer = map.layer;
  if constexpr (requires { layer.router.selector.threshold; }) {
    double low = 0.0, high = 1.0;
    for (int halving = 0; halving < 24; ++halving) {
      layer.router.selector.threshold = 0.5 * (low + high);
      const bool too_many = spread<layer_type>(ctx, layer, map.params, map.x).on_all > 0.3;
      (too_many ? low : high) = layer.router.selector.threshold;
    }
  }
  const double active = spread<layer_type>(ctx, layer, map.params, map.x).active;

  const auto linear_pass = [&] { map.linear_pass(); };
  const auto layer_pass = [&] {
    if (!w.alone) return map.layer_pass();
    const workspace<cpu>::scope scope(ctx.memory);
    layer.add_adapter(ctx, map.params, map.x, map.y, mode::training);
  };
  const auto time_of = [&](const auto& pass) { return bench::seconds_on(w.threads, pass); };
  linear_pass();
  layer_pass();
  std::vector<double> ratios, linear_times;
  double before = time_of(linear_pass);
  for (auto _ : state) {
    const double time = time_of(layer_pass);
    const double after = time_of(linear_pass);
    ratios.push_back(2.0 * time / (before + after));
    linear_times.push_back(after);
    before = after;
    state.SetIterationTime(time);
  }
  const double n = static_cast<double>(w.tokens), d = static_cast<double>(w.width);
  const double k = active, r = static_cast<double>(w.rank), e = static_cast<double>(w.experts);
  const double linear_seconds = bench::median(linear_times);
  const double linear_flop = (w.backward ? 4.0 : 2.0) * n * d * d;
  // Router and selected ranks, forward; backward adds dx and the gradients of both.
  const double adapter_flop = 2.0 * n * d * (w.backward ? 3.0 : 1.0) * (e + 2.0 * k * r);
  // Forward reads x and the weights and writes y; backward reads x, dy and the weights and writes
  // dx and the gradients of router and experts.
  const double adapter_weights = d * (e + 2.0 * e * r);
  const double weights = (w.alone ? n * d : d * d) + adapter_weights;  // y is read and written
  const double elements =
      2.0 * n * d + weights + (w.backward ? 3.0 * n * d + weights + adapter_weights : 0.0);
  state.counters["overhead_pct"] = 100.0 * (bench::median(ratios) - (w.alone ? 0.0 : 1.0));
  state.counters["floor_pct"] = 100.0 * adapter_flop / linear_flop;
  if (w.backward) {
    const index most = layer.router.selector.max_selected(w.experts);
    const routed_cost cost{w.width, w.width, w.experts, w.rank, most, true};
    state.counters["predicted_overhead_pct"] =
        100.0 * 3.0 * cost_of(w.execution, cost) / (2.0 * d * d);
  }
  if (w.selected < 0) state.counters["active"] = active;
  state.counters["linear_ms"] = 1e3 * linear_seconds;
  state.counters["linear_gflops"] = linear_flop / linear_seconds * 1e-9;
  const auto rate = [&](const char* unit, double count) {
    state.counters[unit] = benchmark::Counter(count, benchmark::Counter::kIsIterationInvariantRate);
  };
  auto free = layer;
  free.execution = strategy::automatic;
  state.SetLabel(std::string("automatic: ") + strategy_name(free.choose(w.width, w.width)));
  rate("tokens/s", n);
  rate("flop/s", (w.alone ? 0.0 : linear_flop) + adapter_flop);
  rate("bytes/s", elements * sizeof(float));
}

void run(benchmark::State& state, const workload& w) {
  if (w.selected < 0) {
    run(state, w, dynamic_entropy<>{});
  } else if (w.selected == 0) {
    run(state, w, dense{});
  } else {
    run(state, w, top_k<gate::renormalised>{.k = w.selected});
  }
}

void add(const workload& w) {
  const std::string name =
      "layers/mole_linear/" +
      std::string(w.alone ? "add_adapter" : (w.backward ? "step" : "forward")) +
      "/N:" + std::to_string(w.tokens) + "/D:" + std::to_string(w.width) +
      "/E:" + std::to_string(w.experts) + "/R:" + std::to_string(w.rank) +
      (w.selected < 0    ? std::string("/dynamic")
       : w.selected == 0 ? std::string("/soft")
                         : "/K:" + std::to_string(w.selected)) +
      (w.bias == biased::base     ? "/bias:base"
       : w.bias == biased::router ? "/bias:router"
                                  : "") +
      "/threads:" + std::to_string(w.threads) + "/" + strategy_name(w.execution) + "/f32/cpu";
  benchmark::RegisterBenchmark(name.c_str(), [w](benchmark::State& state) { run(state, w); })
      ->UseManualTime()
      ->Unit(benchmark::kMillisecond);
}

/// What users ask first: the price of the adapter, sparse and soft.
void add_overheads() {
  for (const index tokens : {512, 4096}) {
    for (const index width : {768, 2048}) {
      for (const index rank : {8, 16}) {
        for (const int threads : {1, 2}) {
          for (const bool backward : {false, true}) {
            add({tokens, width, 8, rank, 2, threads, backward, strategy::dense_masked});
            add({tokens, width, 8, rank, 2, threads, backward, strategy::grouped});
            add({tokens, width, 8, rank, 2, threads, backward, strategy::indexed});
            add({tokens, width, 8, rank, 0, threads, backward, strategy::dense_masked});
          }
        }
      }
    }
  }
}

/// Some tokens unsure: they get all experts.
void add_dynamic() {
  for (const index width : {768, 2048}) {
    for (const int threads : {1, 2}) {
      for (const bool backward : {false, true}) {
        for (const strategy execution : {strategy::dense_masked, strategy::indexed}) {
          add({512, width, 8, 8, -1, threads, backward, execution});
        }
      }
    }
  }
}

/// The adapter alone, onto what somebody else's map has made of x: `overhead_pct` is its time over
/// that of talpa's map.
void add_alone() {
  for (const index width : {768, 2048}) {
    for (const int threads : {1, 2}) {
      add({512, width, 8, 8, 2, threads, false, strategy::indexed, true});
    }
  }
}

/// A bias of the base, which the bare map adds in a pass of its own, and one of the router.
void add_biased() {
  for (const index width : {768, 2048}) {
    for (const bool backward : {false, true}) {
      for (const biased bias : {biased::base, biased::router}) {
        add({512, width, 8, 8, 2, 1, backward, strategy::indexed, false, bias});
      }
    }
  }
}

/// Where the adapter is the smallest part of the map, and where it is a large one.
void add_extremes() {
  for (const int threads : {1, 2}) {
    for (const bool backward : {false, true}) {
      add({512, 4096, 8, 8, 2, threads, backward, strategy::indexed});
      add({512, 2048, 64, 8, 2, threads, backward, strategy::indexed});
      if (threads == 2 || !backward) {  // the third is among those of add_crossover
        add({512, 2048, 8, 64, 2, threads, backward, strategy::indexed});
      }
    }
  }
}

/// Where strategies overtake each other: what the cost model of layers/strategy.hpp is fitted to.
void add_crossover() {
  struct sizes {
    index experts, rank, selected;
  };
  for (const index width : {768, 2048}) {
    for (const sizes& s : {sizes{8, 1, 2}, sizes{8, 4, 2}, sizes{8, 32, 2}, sizes{8, 8, 1},
                           sizes{8, 8, 4}, sizes{8, 8, 8}, sizes{8, 64, 2}, sizes{2, 8, 2},
                           sizes{16, 8, 2}, sizes{32, 8, 2}, sizes{64, 4, 2}, sizes{64, 8, 8}}) {
      for (const strategy execution :
           {strategy::dense_masked, strategy::grouped, strategy::indexed}) {
        add({512, width, s.experts, s.rank, s.selected, 1, true, execution});
      }
    }
  }
}

const int registered =
    (add_overheads(), add_dynamic(), add_alone(), add_biased(), add_extremes(), add_crossover(), 0);

}  // namespace
