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

/// Cost of dense_masked per token, in multiply-adds at full speed: E R (D + O) at the share of peak
/// that Eigen reaches on products with E R columns.
constexpr double dense_masked_cost(const routed_cost& c) {
  constexpr double efficiency = 0.5;
  return static_cast<double>(c.experts * c.width) * static_cast<double>(c.inputs + c.outputs) /
         efficiency;
}

/// Cost of grouped per token, in the same unit: K R (D + O) at the share of peak of products with R
/// columns, and the rows that gather and combine move: K D written and read, K O written, read and
/// added.
constexpr double grouped_cost(const routed_cost& c) {
  constexpr double efficiency = 0.25;
  constexpr double moved_element = 4.0;
  const double k = static_cast<double>(c.max_selected);
  const double d = static_cast<double>(c.inputs), o = static_cast<double>(c.outputs);
  return k * static_cast<double>(c.width) * (d + o) / efficiency +
         moved_element * k * (2.0 * d + 3.0 * o);
}

/// The cheaper strategy by the two costs above; dense_masked at a tie. A pure function of sizes, so
/// a run is reproducible.
constexpr strategy choose_strategy(const routed_cost& c) {
  return grouped_cost(c) < dense_masked_cost(c) ? strategy::grouped : strategy::dense_masked;
}

}  // namespace talpa
