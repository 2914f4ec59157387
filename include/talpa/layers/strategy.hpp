// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/index.hpp>

namespace talpa {

/// How a routed layer executes its experts. All choices compute the same function; sums run in a
/// different order, so results differ by rounding.
enum class strategy {
  automatic,     ///< choose_strategy decides from the sizes
  dense_masked,  ///< all ranks for every token, zero gates included: soft routing, few ranks
  grouped,       ///< slots sorted by expert, each expert on copies of its tokens' rows: many ranks
  indexed,       ///< slots sorted by expert, rows read and written in place: sparse routing; `lora`
};

constexpr const char* strategy_name(strategy s) {
  constexpr const char* names[] = {"automatic", "dense_masked", "grouped", "indexed"};
  return names[static_cast<int>(s)];
}

/// What the cost of a routed low-rank layer depends on.
struct routed_cost {
  index inputs = 0;        ///< D
  index outputs = 0;       ///< O
  index experts = 0;       ///< E
  index width = 0;         ///< R
  index max_selected = 0;  ///< bound of K
  bool can_index = false;  ///< whether the experts have strategy::indexed
  bool on_device = false;  ///< whether the kernels of a device run it
};

// All costs are of forward and backward per token, in multiply-adds of the base's products, and
// grow with D + O. Their constants were fitted for E = 1..128, R = 1..64, K = 1..8: those of the
// CPU to bench/layers/mole_linear_bench.cpp (docs/benchmarks/cpu.md) with N = 512, D = O = 768 and
// 2048, those of a device to steps on an H200 (docs/benchmarks/gpu.md) with N = 4096, D = O = 2048.
// There the base runs at 50 TFLOP/s, beside which every pass over rows is dear.

/// dense_masked: E R ranks; the router and gates for each expert; the passes over x, y, dy and dx.
constexpr double dense_masked_cost(const routed_cost& c) {
  const double rank = c.on_device ? 3.0625 : 1.3125, expert = c.on_device ? 0.0 : 0.875,
               passes = c.on_device ? 366.0 : 36.0;
  return (rank * static_cast<double>(c.experts * c.width) +
          expert * static_cast<double>(c.experts) + passes) *
         static_cast<double>(c.inputs + c.outputs);
}

/// grouped: for each of K slots R ranks, and the rows that gather and combine move; products of few
/// rows for each expert; the passes over x, y, dy and dx.
constexpr double grouped_cost(const routed_cost& c) {
  const double rank = c.on_device ? 4.125 : 1.6875, moves = c.on_device ? 352.0 : 76.0,
               expert = c.on_device ? 3.625 : 1.3125, passes = c.on_device ? 523.0 : 0.0;
  return (static_cast<double>(c.max_selected) * (rank * static_cast<double>(c.width) + moves) +
          expert * static_cast<double>(c.experts) + passes) *
         static_cast<double>(c.inputs + c.outputs);
}

/// indexed: for each of K slots R ranks, of which the CPU computes four at a time, and the rows
/// that a device reads; passes over the bank and its gradient, worth a part of its ranks; the
/// router and loops for each expert; the passes over x, y, dy and dx.
constexpr double indexed_cost(const routed_cost& c) {
  const double rank = c.on_device ? 7.5 : 2.0, moves = c.on_device ? 215.0 : 0.0,
               bank = c.on_device ? 0.0 : 0.15625, expert = c.on_device ? 3.625 : 1.125,
               passes = c.on_device ? 553.0 : 10.0;
  const index ranks = c.on_device ? c.width : (c.width + 3) / 4 * 4;
  return (static_cast<double>(c.max_selected) * (rank * static_cast<double>(ranks) + moves) +
          bank * static_cast<double>(c.experts * c.width) +
          expert * static_cast<double>(c.experts) + passes) *
         static_cast<double>(c.inputs + c.outputs);
}

/// The cheapest strategy by the costs above among those that there are; at a tie dense_masked, then
/// indexed. A pure function of sizes and backend, so a run is reproducible.
constexpr strategy choose_strategy(const routed_cost& c) {
  const double masked = dense_masked_cost(c), grouped = grouped_cost(c);
  if (c.can_index && indexed_cost(c) < masked && indexed_cost(c) <= grouped) {
    return strategy::indexed;
  }
  return grouped < masked ? strategy::grouped : strategy::dense_masked;
}

}  // namespace talpa
