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
};

// All costs are of forward and backward per token, in multiply-adds of the base's products, and
// grow with D + O. Their constants were fitted to bench/layers/mole_linear_bench.cpp
// (docs/benchmarks/cpu.md) for E = 1..128, R = 1..64, K = 1..8, N = 512, D = O = 768 and 2048.

/// dense_masked: E R ranks; the router and gates for each expert; the passes over x, y, dy and dx,
/// worth 36.
constexpr double dense_masked_cost(const routed_cost& c) {
  constexpr double rank = 1.3125, expert = 0.875, passes = 36.0;
  return (rank * static_cast<double>(c.experts * c.width) +
          expert * static_cast<double>(c.experts) + passes) *
         static_cast<double>(c.inputs + c.outputs);
}

/// grouped: for each of K slots R ranks, and the rows that gather and combine move, worth 76;
/// products of few rows for each expert.
constexpr double grouped_cost(const routed_cost& c) {
  constexpr double rank = 1.6875, moves = 76.0, expert = 1.3125;
  return (static_cast<double>(c.max_selected) * (rank * static_cast<double>(c.width) + moves) +
          expert * static_cast<double>(c.experts)) *
         static_cast<double>(c.inputs + c.outputs);
}

/// indexed: for each of K slots R ranks, of which four are computed at a time; passes over the bank
/// and its gradient, worth a part of its ranks; the router and loops for each expert; the passes
/// over x, y, dy and dx, worth 10.
constexpr double indexed_cost(const routed_cost& c) {
  constexpr double rank = 2.0, bank = 0.15625, expert = 1.125, passes = 10.0;
  const index ranks = (c.width + 3) / 4 * 4;
  return (rank * static_cast<double>(c.max_selected * ranks) +
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
