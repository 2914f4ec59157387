// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "workloads.hpp"

#include <talpa/talpa.hpp>

#include <benchmark/benchmark.h>

// What the machine gives just now, for ratios to it.

namespace talpa::bench {

/// Multiply-adds a second of `work` on each thread, which makes `count` of them.
template <class Work>
double rate_of(context<cpu>& ctx, double count, Work work) {
  const int threads = ctx.threads;
  const auto all = [&] { detail::parallel_for(ctx, threads, [&](index t, int) { work(t); }); };
  return threads * count / seconds_on(threads, all);
}

/// The multiply-add peak: sums enough to hide its latency, none of them from memory, for longer
/// than a processor takes to change its frequency.
inline double peak_rate(context<cpu>& ctx) {
  typedef float vector __attribute__((vector_size(detail::register_bytes)));
  constexpr index sums = 12, lanes = detail::register_bytes / static_cast<index>(sizeof(float));
  constexpr index times = 1000000;
  return rate_of(ctx, static_cast<double>(sums * lanes * times), [](index) {
    vector sum[sums] = {}, left = vector{} + 0.5f, right = vector{} + 0.25f;
    // Sums that are known to be equal would become one.
    for (vector& s : sum) benchmark::DoNotOptimize(s);
    for (index i = 0; i < times; ++i) {
      detail::unrolled<sums>([&](auto s) __attribute__((always_inline)) {
        sum[s] = sum[s] * left + right;
      });
    }
    for (vector& s : sum) benchmark::DoNotOptimize(s);
  });
}

/// That of tiles which stay in L1.
inline double tile_rate(context<cpu>& ctx) {
  using tile = detail::register_tile<float>;
  constexpr index depth = 128, times = 2000;
  static const matrix<float, cpu> a(depth, tile::rows);
  static const matrix<float, cpu> b(tile::panels * depth, detail::panel_width<float>);
  static matrix<float, cpu> c;
  if (c.rows() < ctx.threads * tile::rows) {
    c = matrix<float, cpu>(ctx.threads * tile::rows, tile::cols);
  }
  const float* panels[tile::panels];
  for (index p = 0; p < tile::panels; ++p) {
    panels[p] = b.data() + p * depth * detail::panel_width<float>;
  }
  const double count = static_cast<double>(tile::rows * tile::cols * depth * times);
  return rate_of(ctx, count, [&](index t) {
    for (index i = 0; i < times; ++i) {
      tile::run(depth, a.data(), panels, 1.0f, 0.0f, &c(t * tile::rows, 0), tile::cols);
    }
  });
}

/// Bytes a second that all threads read from memory, of a block that no cache holds. Streams of
/// each thread lie side by side, as rows of a matrix do.
inline double read_rate(context<cpu>& ctx) {
  typedef float vector __attribute__((vector_size(detail::register_bytes)));
  constexpr index lanes = detail::register_bytes / static_cast<index>(sizeof(float));
  constexpr index streams = 8, length = index{1} << 20, tasks = 8;  // 256 MiB
  static const matrix<float, cpu> block(tasks * streams, length);
  const auto all = [&] {
    detail::parallel_for(ctx, tasks, [&](index task, int) {
      vector sum[streams] = {};
      for (index i = 0; i < length; i += lanes) {
        detail::unrolled<streams>([&](auto s) __attribute__((always_inline)) {
          sum[s] += *reinterpret_cast<const vector*>(&block(task * streams + s, i));
        });
      }
      for (vector& s : sum) benchmark::DoNotOptimize(s);
    });
  };
  return static_cast<double>(block.size() * static_cast<index>(sizeof(float))) /
         seconds_on(ctx.threads, all);
}

}  // namespace talpa::bench
