// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "selectors/slow_selection.hpp"
#include "support/tolerance.hpp"

#include <talpa/cpu/select.hpp>
#include <talpa/routing/routing.hpp>
#include <talpa/testing/bounds.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <initializer_list>
#include <limits>
#include <numeric>
#include <string>
#include <vector>

// Selection by cumulative probability once more, with sorting and in double, and the comparison of
// a selector with it.

namespace talpa::support {

/// A row as it should be, and how far the nearest comparison is from a tie.
struct slow_mass_row {
  slow_row row;
  double margin = 1.0;
};

/// Gates of the experts in `on`: probabilities, divided by their sum where `how` says so.
inline void weigh_slowly(slow_row& r, weighing how) {
  double chosen = 0.0;
  for (std::size_t e = 0; e < r.on.size(); ++e) chosen += r.on[e] ? r.probability[e] : 0.0;
  for (std::size_t e = 0; e < r.on.size(); ++e) {
    r.gates[e] = !r.on[e]               ? 0.0
                 : how == weighing::raw ? r.probability[e]
                                        : r.probability[e] / chosen;
  }
}

/// On are the most likely experts down to where their probabilities exceed p, with or without the
/// one where they do, and the first min_k.
inline slow_mass_row slow_top_p(const std::vector<double>& u, double p, index min_k, bool keeps,
                                weighing how) {
  const std::size_t experts = u.size();
  slow_mass_row r{slow_top_k(u, 1, weighing::raw), 1.0};
  std::vector<std::size_t> order(experts);
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](std::size_t a, std::size_t b) { return u[a] > u[b]; });
  double before = 0.0;
  for (std::size_t i = 0; i < experts; ++i) {
    const std::size_t e = order[i];
    if (std::isinf(u[e])) break;
    const double after = before + r.row.probability[e];
    if (p < 1.0) r.margin = std::min(r.margin, std::abs(after - p));
    const double reached = keeps ? before : after;
    r.row.on[e] = reached <= p || p == 1.0 || static_cast<index>(i) < min_k;
    before = after;
  }
  weigh_slowly(r.row, how);
  return r;
}

/// Relative error of a gate: difference to the largest logit (its rounding is an absolute error of
/// the exponent, at most spread u), exponential (2 u), sums of E terms and divisions, twice where
/// the gates are renormalised.
template <class T>
double mass_gate_bound(index count, double spread, double gate) {
  return rounding_bound<T>(2.0 * (static_cast<double>(count) + spread + 4.0), gate) +
         static_cast<double>(std::numeric_limits<T>::denorm_min());
}

/// Runs a selector on eventful logits and compares masks, gates and gradients with
/// `slow(logits) -> slow_mass_row`. Empty when all agree; rows whose margin is within rounding are
/// left out, and more than one in ten of them is a failure too. amplification: how much more than
/// a gate's relative error the compared number has.
template <class T, class Selector, class Slow>
std::string compare_with_slow(const Selector& selector, index tokens, index count,
                              std::uint64_t seed, weighing how, double amplification, Slow slow) {
  test_random random(seed);
  const matrix<T, cpu> u = eventful_logits<T>(random, tokens, count);
  const matrix<T, cpu> dgates = random_matrix<T>(random, tokens, count);
  context<cpu> ctx(3);
  routing<T, cpu> r(tokens, count);
  matrix<T, cpu> du(tokens, count);
  ops::select(ctx, selector, u, {}, r.gates.view(), r.mask.view());
  ops::select_backward(ctx, selector, u, r.gates.view(), r.mask.view(), dgates, du.view());
  index left = 0;
  for (index n = 0; n < tokens; ++n) {
    const std::vector<double> logits = widened_row(u, n);
    const double spread = spread_of_row(logits);
    const slow_mass_row expected = slow(logits);
    // A sum of at most E probabilities, each with the error of a gate.
    if (expected.margin <= amplification * mass_gate_bound<T>(2 * count, spread, 1.0)) {
      ++left;
      continue;
    }
    const std::vector<double> gradient = slow_gradient(expected.row, widened_row(dgates, n), how);
    const double largest = testing::largest(dgates.view().row_range(n, 1));
    // g (dg - sum of g dg): the error of every factor, on terms that add up to 2 max |dg|.
    const double gradient_bound = 3.0 * mass_gate_bound<T>(count, spread, 2.0 * largest);
    for (index e = 0; e < count; ++e) {
      const auto i = static_cast<std::size_t>(e);
      const bool fine = r.view().on(n, e) == expected.row.on[i] &&
                        within(static_cast<double>(r.gates(n, e)), expected.row.gates[i],
                               mass_gate_bound<T>(count, spread, expected.row.gates[i])) &&
                        within(static_cast<double>(du(n, e)), gradient[i], gradient_bound);
      if (fine) continue;
      return "token " + std::to_string(n) + ", expert " + std::to_string(e) + ": gate " +
             exact_text(static_cast<double>(r.gates(n, e))) + " instead of " +
             exact_text(expected.row.gates[i]) + ", dlogit " +
             exact_text(static_cast<double>(du(n, e))) + " instead of " + exact_text(gradient[i]);
    }
  }
  return 10 * left <= tokens ? "" : std::to_string(left) + " rows are within rounding of a tie";
}

template <class T>
matrix<T, cpu> one_row(std::initializer_list<double> values) {
  matrix<T, cpu> m(1, static_cast<index>(values.size()));
  index e = 0;
  for (const double v : values) m(0, e++) = static_cast<T>(v);
  return m;
}

}  // namespace talpa::support
