// SPDX-License-Identifier: Apache-2.0
//
// SwiGLU experts beside what the machine gives: a layer of them whose tokens are spread evenly, and
// the grouped products it is made of. The roof of a line is the greater of two times: its
// multiply-adds at the rate of multiply-adds of registers alone, and the bytes of the bank at the
// rate at which memory is read (and, of a gradient, written). `roof_pct` is the median of the roof
// over the time, `tile_pct` the rate of a register tile with everything in L1 in percent of that of
// registers, `memory_gb/s` the bytes of the bank over the time.
#include "peaks.hpp"
#include "workloads.hpp"

#include <talpa/talpa.hpp>

#include <benchmark/benchmark.h>

#include <algorithm>
#include <functional>
#include <string>
#include <vector>

namespace {

using namespace talpa;
using talpa::index;

constexpr index width = 1024, hidden = 2816, experts = 8, chosen = 2;

/// Times `pass`, which makes `products` multiply-adds and moves `bytes` of the bank.
void time_below_roof(benchmark::State& state, context<cpu>& ctx, index tokens, double products,
                     double bytes, const std::function<void()>& pass) {
  pass();
  std::vector<double> times, shares, tiles, reads;
  double peak = bench::peak_rate(ctx), read = bench::read_rate(ctx);
  for (auto _ : state) {
    const double time = bench::seconds_on(ctx.threads, pass);
    const double peak_after = bench::peak_rate(ctx), read_after = bench::read_rate(ctx);
    const double roof =
        std::max(2.0 * products / (peak + peak_after), 2.0 * bytes / (read + read_after));
    times.push_back(time);
    shares.push_back(100.0 * roof / time);
    tiles.push_back(100.0 * bench::tile_rate(ctx) / peak_after);
    reads.push_back(read_after);
    peak = peak_after, read = read_after;
    state.SetIterationTime(time);
  }
  const double time = bench::median(times);
  state.counters["roof_pct"] = bench::median(shares);
  state.counters["tile_pct"] = bench::median(tiles);
  state.counters["gflop/s"] = 2e-9 * products / time;
  state.counters["memory_gb/s"] = 1e-9 * bytes / time;
  state.counters["read_gb/s"] = 1e-9 * bench::median(reads);
  state.counters["ns/token"] = 1e9 * time / static_cast<double>(tokens);
}

/// Tokens near one of E / K centres, each of which is the row of K experts' logits.
void run_layer(benchmark::State& state, index tokens, bool step, int threads) {
  context<cpu> ctx(threads);
  generator random{1};
  const moe_ffn<router<linear_scorer, top_k<gate::renormalised>>> layer{
      .router = {.selector = {.k = chosen}}, .expert = {.hidden = hidden}, .experts = experts};
  auto params = layer.init<float, cpu>(width, random);
  const index centres = experts / chosen;
  const auto centre = bench::normal_matrix(centres, width, 1.0, random);
  auto x = bench::normal_matrix(tokens, width, 0.25, random);
  const auto dy = bench::normal_matrix(tokens, width, 1.0, random);
  matrix<float, cpu> y(tokens, width), dx(tokens, width);
  for (index n = 0; n < tokens; ++n) {
    for (index d = 0; d < width; ++d) x(n, d) += centre(n % centres, d);
  }
  for (index e = 0; e < experts; ++e) {
    std::copy_n(centre.view().row(e / chosen), width, params.router.scorer.weight.value().row(e));
  }
  const auto pass = [&] {
    const workspace<cpu>::scope scope(ctx.memory);
    const auto kept = layer.forward(ctx, params, x, y.view(), mode::training, {});
    if (step) layer.backward(ctx, params, kept, x, dy, dx.view(), grad_mode::overwrite);
  };
  {
    const workspace<cpu>::scope scope(ctx.memory);
    const auto kept = layer.forward(ctx, params, x, y.view(), mode::training, {});
    for (index e = 0; e <= experts; ++e) {
      if (kept.mixed.sorted.slots.offsets[e] != e * tokens * chosen / experts) {
        return state.SkipWithError("tokens are not spread evenly");
      }
    }
  }
  const double bank = static_cast<double>(experts * hidden) * width;
  const double products = 3.0 * static_cast<double>(tokens * chosen * hidden) * width;
  // A step reads the bank twice, reads and writes its gradient.
  time_below_roof(state, ctx, tokens, (step ? 3.0 : 1.0) * products,
                  (step ? 4.0 : 1.0) * 3.0 * bank * sizeof(float), pass);
}

enum class product { by_rows, by_cols, gradient };

/// One of the products, `slots` a group.
void run_product(benchmark::State& state, index slots, product kind, int threads) {
  context<cpu> ctx(threads);
  generator random{1};
  const auto bank = bench::normal_matrix(experts * hidden, width, 1.0, random);
  const auto narrow = bench::normal_matrix(experts * slots, width, 1.0, random);
  const auto wide = bench::normal_matrix(experts * slots, hidden, 1.0, random);
  matrix<float, cpu> out_narrow(experts * slots, width), out_wide(experts * slots, hidden);
  matrix<float, cpu> dbank(kind == product::gradient ? experts * hidden : 0, width);
  vector<index, cpu> offsets(experts + 1);
  for (index e = 0; e <= experts; ++e) offsets[e] = e * slots;
  const row_run all{0, experts * hidden, 0};
  const double size = static_cast<double>(experts * hidden) * width;
  time_below_roof(
      state, ctx, experts * slots, static_cast<double>(slots) * size,
      (kind == product::gradient ? 2.0 : 1.0) * size * sizeof(float), [&] {
        switch (kind) {
          case product::by_rows:
            return ops::grouped_gemm(ctx, offsets, narrow, bank, transpose::yes, out_wide.view());
          case product::by_cols:
            return ops::grouped_gemm(ctx, offsets, wide, bank, transpose::no, out_narrow.view());
          case product::gradient:
            return ops::grouped_gemm_gradient(ctx, offsets, wide, narrow, {&all, 1}, dbank.view());
        }
      });
}

void add(const std::string& name, index size, int threads,
         const std::function<void(benchmark::State&)>& run) {
  const std::string full = name + std::to_string(size) + "/D:" + std::to_string(width) +
                           "/H:" + std::to_string(hidden) + "/E:" + std::to_string(experts) +
                           "/threads:" + std::to_string(threads) + "/f32/cpu";
  benchmark::RegisterBenchmark(full.c_str(), run)->UseManualTime()->Unit(benchmark::kMillisecond);
}

void add_all() {
  for (const int threads : {1, 2}) {
    for (const index slots : {1, 4, 16, 128, 1024}) {
      for (const bool step : {false, true}) {
        add(std::string("roof/moe_ffn/") + (step ? "step" : "forward") + "/K:2/N:",
            slots * experts / chosen, threads, [=](benchmark::State& state) {
              run_layer(state, slots * experts / chosen, step, threads);
            });
      }
      for (const product kind : {product::by_rows, product::by_cols, product::gradient}) {
        const char* const names[] = {"by_rows", "by_cols", "gradient"};
        add(std::string("roof/grouped_gemm/") + names[static_cast<int>(kind)] + "/slots:", slots,
            threads, [=](benchmark::State& state) { run_product(state, slots, kind, threads); });
      }
    }
  }
}

const int registered = (add_all(), 0);

}  // namespace
