// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "workloads.hpp"

#include <benchmark/benchmark.h>

#include <functional>
#include <string>
#include <vector>

namespace talpa::bench {

/// Enters the median of ratios under `name`, and the values between which four fifths of them lie.
inline void enter_ratio(benchmark::State& state, const std::string& name,
                        const std::vector<double>& ratios) {
  state.counters[name] = median(ratios);
  state.counters[name + "_p10"] = quantile(ratios, 0.1);
  state.counters[name + "_p90"] = quantile(ratios, 0.9);
}

/// Times `pass` between two runs of `other`, on one thread: `ns/token` is its median, `vs_NAME` the
/// median of its time over the mean of its two neighbours.
inline void time_beside(benchmark::State& state, index tokens, const std::function<void()>& pass,
                        const std::string& name, const std::function<void()>& other) {
  pass();
  other();
  std::vector<double> times, ratios;
  double before = busy_seconds(other);
  for (auto _ : state) {
    const double time = busy_seconds(pass), after = busy_seconds(other);
    times.push_back(time);
    ratios.push_back(2.0 * time / (before + after));
    before = after;
    state.SetIterationTime(time);
  }
  const double n = static_cast<double>(tokens);
  state.counters["ns/token"] = 1e9 * median(times) / n;
  state.counters["vs_" + name] = median(ratios);
  state.counters["tokens/s"] = benchmark::Counter(n, benchmark::Counter::kIsIterationInvariantRate);
}

}  // namespace talpa::bench
