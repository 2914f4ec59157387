// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "support/random.hpp"

#include <talpa/core/matrix.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <numeric>
#include <vector>

// Selections once more, one row at a time in double, with sorting and whole Jacobians: nothing is
// shared with the library but the definition.

namespace talpa::support {

enum class weighing { raw, renormalised };

struct slow_row {
  std::vector<bool> on;
  std::vector<double> gates;
  std::vector<double> probability;
};

/// The k experts that come first by logit, then index, among those that are not -inf; weighed by
/// softmax over all logits, or by softmax over themselves.
inline slow_row slow_top_k(const std::vector<double>& u, index k, weighing how) {
  const std::size_t experts = u.size();
  slow_row r{std::vector<bool>(experts, false), std::vector<double>(experts, 0.0),
             std::vector<double>(experts, 0.0)};
  std::vector<std::size_t> order(experts);
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](std::size_t a, std::size_t b) { return u[a] > u[b]; });
  const double top = u[order[0]];
  double all = 0.0, chosen = 0.0;
  for (std::size_t e = 0; e < experts; ++e) all += std::exp(u[e] - top);
  for (std::size_t i = 0; i < static_cast<std::size_t>(k) && i < experts; ++i) {
    if (std::isinf(u[order[i]])) break;
    r.on[order[i]] = true;
    chosen += std::exp(u[order[i]] - top);
  }
  for (std::size_t e = 0; e < experts; ++e) {
    r.probability[e] = std::exp(u[e] - top) / all;
    if (!r.on[e]) continue;
    r.gates[e] = how == weighing::raw ? r.probability[e] : std::exp(u[e] - top) / chosen;
  }
  return r;
}

/// dlogits by the whole Jacobian dg_e / du_j = g_e (delta_ej - q_j), with q the distribution that
/// the gates are taken from: p, or the gates themselves.
inline std::vector<double> slow_gradient(const slow_row& r, const std::vector<double>& dgates,
                                         weighing how) {
  const std::size_t experts = r.gates.size();
  std::vector<double> du(experts, 0.0);
  for (std::size_t e = 0; e < experts; ++e) {
    if (!r.on[e]) continue;
    for (std::size_t j = 0; j < experts; ++j) {
      const double q = how == weighing::raw ? r.probability[j] : r.gates[j];
      du[j] += dgates[e] * r.gates[e] * ((e == j ? 1.0 : 0.0) - q);
    }
  }
  return du;
}

/// [N, E] of logits with everything that a selection meets: ties in one row of three, experts at
/// -inf in one of four, and outliers.
template <class T>
matrix<T, cpu> eventful_logits(test_random& random, index tokens, index experts) {
  matrix<T, cpu> u = random_matrix<T>(random, tokens, experts, 3.0);
  for (index n = 0; n < tokens; ++n) {
    for (index e = 0; e < experts; ++e) {
      if (n % 3 == 0) u(n, e) = static_cast<T>(random.below(4)) / T{2};
      if (n % 4 == 1 && random.below(3) == 0 && e != n % experts) {
        u(n, e) = -std::numeric_limits<T>::infinity();
      }
    }
  }
  return u;
}

template <class T>
std::vector<double> widened_row(const matrix<T, cpu>& m, index n) {
  std::vector<double> row;
  for (index e = 0; e < m.cols(); ++e) row.push_back(static_cast<double>(m(n, e)));
  return row;
}

/// Largest minus smallest finite value.
inline double spread_of_row(const std::vector<double>& u) {
  double low = std::numeric_limits<double>::infinity(), high = -low;
  for (const double v : u) {
    if (!std::isfinite(v)) continue;
    low = std::min(low, v);
    high = std::max(high, v);
  }
  return high - low;
}

}  // namespace talpa::support
