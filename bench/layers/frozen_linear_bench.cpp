// SPDX-License-Identifier: Apache-2.0
//
// The frozen linear map y = x W^T in three forms: W packed once, ops::gemm, Eigen's product. Each
// iteration times all three, one after the other, and the loop over K of a tile with everything in
// L1, which is the multiply-add peak that this machine gives just then. `NAME_pct` is the median
// of rate / mean of the two peaks beside it, `NAME_ns` the median of nanoseconds a token.
#include "workloads.hpp"

#include <talpa/talpa.hpp>

#include <benchmark/benchmark.h>

#include <string>
#include <vector>

namespace {

using namespace talpa;
using talpa::index;

/// Multiply-adds a second of one tile that stays in L1.
double peak_rate() {
  using tile = detail::register_tile<float>;
  constexpr index depth = 64, times = 4000;
  static const matrix<float, cpu> a(depth, tile::rows);
  static const matrix<float, cpu> b(tile::panels * depth, detail::panel_width<float>);
  static matrix<float, cpu> c(tile::rows, tile::cols);
  const float* panels[tile::panels];
  for (index p = 0; p < tile::panels; ++p) {
    panels[p] = b.data() + p * depth * detail::panel_width<float>;
  }
  const double time = bench::busy_seconds([&] {
    for (index i = 0; i < times; ++i) {
      tile::run(depth, a.data(), panels, 1.0f, 0.0f, c.data(), tile::cols);
    }
  });
  return static_cast<double>(tile::rows * tile::cols * depth * times) / time;
}

void frozen_linear(benchmark::State& state) {
  const index tokens = state.range(0), width = state.range(1);  // N, D = O
  context<cpu> ctx(1);
  generator random(1);
  const auto x = bench::normal_matrix(tokens, width, 1.0, random);  // [N, D]
  const auto w = bench::normal_matrix(width, width, 1.0, random);   // [O, D]
  matrix<float, cpu> y(tokens, width);                              // [N, O]
  const packed_matrix<float, cpu> packed(ctx, w, transpose::yes);   // [D, O]

  struct form {
    const char* name;
    std::vector<double> shares, times;
  };
  form forms[] = {{"packed", {}, {}}, {"gemm", {}, {}}, {"eigen", {}, {}}};
  const auto pass = [&](index which) {
    if (which == 0) ops::gemm(ctx, x, transpose::no, packed, 0.0f, y.view());
    if (which == 1) ops::gemm(ctx, x, transpose::no, w, transpose::yes, 0.0f, y.view());
    if (which == 2) {
      detail::eigen_product<float>(1.0f, x.view(), transpose::no, w.view(), transpose::yes, 0.0f,
                                   y.view());
    }
  };
  for (index which = 0; which < 3; ++which) pass(which);
  const double work = static_cast<double>(tokens) * static_cast<double>(width * width);
  std::vector<double> peaks;
  double before = peak_rate();
  for (auto _ : state) {
    double total = 0.0;
    for (index which = 0; which < 3; ++which) {
      const double time = bench::busy_seconds([&] { pass(which); });
      const double after = peak_rate();
      forms[which].shares.push_back(200.0 * work / time / (before + after));
      forms[which].times.push_back(time);
      peaks.push_back(after);
      before = after;
      total += time;
    }
    state.SetIterationTime(total);
  }
  for (const form& f : forms) {
    state.counters[std::string(f.name) + "_pct"] = bench::median(f.shares);
    state.counters[std::string(f.name) + "_ns"] =
        1e9 * bench::median(f.times) / static_cast<double>(tokens);
  }
  state.counters["peak_gflop/s"] = 2e-9 * bench::median(peaks);
}

BENCHMARK(frozen_linear)
    ->Name("layers/frozen_linear")
    ->ArgNames({"N", "D"})
    ->Args({64, 768})
    ->Args({512, 768})
    ->Args({512, 2048})
    ->UseManualTime()
    ->Unit(benchmark::kMillisecond);

}  // namespace
