// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/index.hpp>

namespace talpa {

/// How a routed layer executes its experts. All choices compute the same function; sums run in a
/// different order, so results differ by rounding.
enum class strategy {
  automatic,     ///< choose_strategy decides from the sizes
  dense_masked,  ///< all ranks for every token, zero gates included: soft routing, few ranks
  grouped,  ///< slots sorted by expert, each expert on its own tokens: sparse routing, many ranks
};

constexpr const char* strategy_name(strategy s) {
  return s == strategy::automatic ? "automatic"
                                  : (s == strategy::dense_masked ? "dense_masked" : "grouped");
}

/// What the cost of a routed low-rank layer depends on.
struct routed_cost {
  index inputs = 0;        ///< D
  index outputs = 0;       ///< O
  index experts = 0;       ///< E
  index width = 0;         ///< R
  index max_selected = 0;  ///< bound of K
};

// Both costs are of forward and backward per token, in multiply-adds of the dense products, and
// grow with D + O. Their two constants were fitted to bench/layers/mole_linear_bench.cpp on one
// machine (docs/benchmarks/cpu.md) for E = 8..64, R = 1..32, K = 1..8, D = O = 768 and 2048.

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

/// The cheaper strategy by the two costs above; dense_masked at a tie. A pure function of sizes, so
/// a run is reproducible.
constexpr strategy choose_strategy(const routed_cost& c) {
  return grouped_cost(c) < dense_masked_cost(c) ? strategy::grouped : strategy::dense_masked;
}

}  // namespace talpa
