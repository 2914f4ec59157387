// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "peaks.hpp"
#include "workloads.hpp"

#include <talpa/talpa.hpp>

#include <benchmark/benchmark.h>

#include <functional>
#include <string>
#include <vector>

// The frozen linear map y = x W^T, in several forms. Each iteration times all of them, one after
// the other, and between them multiply-adds of registers alone, on every thread: the peak that this
// machine gives just then. `NAME_pct` is the median of rate / mean of the two peaks beside it,
// `NAME_ns` the median of nanoseconds a token, `tile_pct` the rate of a register tile with
// everything in L1: where another program shares the core, loads and decoding limit it to less than
// the peak. Time is that of the processor on one thread, that which passes on several.

namespace talpa::bench {

struct linear_form {
  std::string name;
  std::function<void()> pass;
};

struct linear_load {
  explicit linear_load(index tokens, index width, int threads)
      : ctx(threads),
        random(1),
        x(normal_matrix(tokens, width, 1.0, random)),
        w(normal_matrix(width, width, 1.0, random)),
        y(tokens, width),
        packed(ctx, w, transpose::yes) {}

  linear_form with_packed() {
    return {"packed", [this] { ops::gemm(ctx, x, transpose::no, packed, 0.0f, y.view()); }};
  }

  context<cpu> ctx;
  generator random;
  matrix<float, cpu> x;              // [N, D]
  matrix<float, cpu> w;              // [O, D]
  matrix<float, cpu> y;              // [N, O]
  packed_matrix<float, cpu> packed;  // [D, O]
};

inline void time_linear(benchmark::State& state, linear_load& load,
                        const std::vector<linear_form>& forms) {
  struct figures {
    std::vector<double> shares, times;
  };
  std::vector<figures> found(forms.size());
  for (const linear_form& form : forms) form.pass();
  const double work =
      static_cast<double>(load.x.rows()) * static_cast<double>(load.w.rows() * load.w.cols());
  std::vector<double> peaks, tiles;
  double before = peak_rate(load.ctx);
  for (auto _ : state) {
    double total = 0.0;
    for (std::size_t i = 0; i < forms.size(); ++i) {
      const double time = seconds_on(load.ctx.threads, forms[i].pass), after = peak_rate(load.ctx);
      found[i].shares.push_back(200.0 * work / time / (before + after));
      found[i].times.push_back(time);
      peaks.push_back(after);
      before = after;
      total += time;
    }
    tiles.push_back(100.0 * tile_rate(load.ctx) / before);
    state.SetIterationTime(total);
  }
  for (std::size_t i = 0; i < forms.size(); ++i) {
    state.counters[forms[i].name + "_pct"] = median(found[i].shares);
    state.counters[forms[i].name + "_ns"] =
        1e9 * median(found[i].times) / static_cast<double>(load.x.rows());
  }
  state.counters["tile_pct"] = median(tiles);
  state.counters["peak_gflop/s"] = 2e-9 * median(peaks);
}

/// A benchmark of one and of two threads for each size; `run(state, load)`.
template <class Run>
void add_linear(const std::string& name, Run run) {
  for (const int threads : {1, 2}) {
    for (const auto& [tokens, width] :
         {std::pair<index, index>{64, 768}, {512, 768}, {512, 2048}, {512, 4096}}) {
      const std::string full = name + "/N:" + std::to_string(tokens) +
                               "/D:" + std::to_string(width) +
                               "/threads:" + std::to_string(threads) + "/f32/cpu";
      benchmark::RegisterBenchmark(full.c_str(),
                                   [=, tokens = tokens, width = width](benchmark::State& state) {
                                     linear_load load(tokens, width, threads);
                                     run(state, load);
                                   })
          ->UseManualTime()
          ->Unit(benchmark::kMillisecond);
    }
  }
}

}  // namespace talpa::bench
