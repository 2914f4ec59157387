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
  indexed,  ///< slots sorted by expert, rows read and written in place: sparse routing; CPU, `lora`
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
  bool can_index = false;  ///< whether experts and backend have strategy::indexed
};

// All costs are of forward and backward per token, in multiply-adds of the dense products, and
// grow with D + O. Their constants were fitted to bench/layers/mole_linear_bench.cpp
// (docs/benchmarks/cpu.md) for E = 1..64, R = 1..64, K = 1..8, D = O = 768 and 2048.

/// dense_masked: E R ranks, and the passes over x, y, dy and dx, worth 30 ranks.
constexpr double dense_masked_cost(const routed_cost& c) {
  constexpr double passes = 30.0;
  return (static_cast<double>(c.experts * c.width) + passes) *
         static_cast<double>(c.inputs + c.outputs);
}

/// grouped: for each of K slots R ranks, and the rows that gather and combine move, worth 40 ranks.
constexpr double grouped_cost(const routed_cost& c) {
  constexpr double moves = 40.0;
  return static_cast<double>(c.max_selected) * (static_cast<double>(c.width) + moves) *
         static_cast<double>(c.inputs + c.outputs);
}

/// indexed: for each of K slots R ranks, of which four are computed at a time and which take a
/// quarter longer than in dense products; a pass over the bank for all tokens of a task, worth a
/// 32nd of its ranks; and the passes over x, y, dy and dx, worth 15 ranks.
constexpr double indexed_cost(const routed_cost& c) {
  constexpr double slower = 1.25, bank = 0.03125, passes = 15.0;
  const index ranks = (c.width + 3) / 4 * 4;
  return (slower * static_cast<double>(c.max_selected * ranks) +
          bank * static_cast<double>(c.experts * c.width) + passes) *
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
