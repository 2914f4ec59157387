// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "golden/case.hpp"

#include <talpa/cpu/context.hpp>
#include <talpa/cpu/fill.hpp>
#include <talpa/cpu/group_loss.hpp>
#include <talpa/cpu/routing_sums.hpp>
#include <talpa/cpu/select.hpp>
#include <talpa/losses/entropy.hpp>
#include <talpa/routing/routing.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <string>
#include <vector>

// What the methods that select by cumulative probability, or by entropy, have in common.

namespace talpa::golden {

/// How a selection differs from the file's. Where the file says that it hangs on the last bit of a
/// sum, an expert whose cumulative probability is within rounding of p may be on or off, and with
/// it the experts whose logits are equal.
inline std::string compare_masks(matrix_view<const double, cpu> logits,
                                 const routing_view<const double, cpu>& found, const tensor& mask,
                                 bool sensitive, double p) {
  const index experts = logits.cols;
  for (index n = 0; n < logits.rows; ++n) {
    const double* const u = logits.row(n);
    std::vector<index> order(static_cast<std::size_t>(experts));
    std::iota(order.begin(), order.end(), index{0});
    std::stable_sort(order.begin(), order.end(), [&](index a, index b) { return u[a] > u[b]; });
    double sum = 0.0, reached = 0.0;
    bool number = std::isfinite(u[order[0]]);
    for (index e = 0; e < experts; ++e) {
      number = number && !std::isnan(u[e]);
      sum += std::exp(u[e] - u[order[0]]);
    }
    if (!number) continue;  // NaN gates in both, on other experts
    for (const index e : order) {
      const bool theirs = mask.data[static_cast<std::size_t>(n * experts + e)] != 0.0;
      const double before = reached;
      reached += std::exp(u[e] - u[order[0]]) / sum;
      // Each sum of probabilities has at most 2 E + 4 roundings of numbers below one.
      const double bound = (2.0 * static_cast<double>(experts) + 4.0) * 0x1p-52;
      const bool near = std::abs(before - p) <= bound || std::abs(reached - p) <= bound;
      if (found.on(n, e) == theirs || (sensitive && near)) continue;
      return "token " + std::to_string(n) + ", expert " + std::to_string(e) + " is " +
             (theirs ? "off" : "on");
    }
  }
  return {};
}

/// [N, ceil(E / 32)] of a mask [N][E] of the file.
inline matrix<std::uint32_t, cpu> words_of(const tensor& mask) {
  const index experts = mask.shape.back(), tokens = mask.size() / experts;
  matrix<std::uint32_t, cpu> words(tokens, mask_words(experts));
  for (index i = 0; i < mask.size(); ++i) {
    if (mask.data[static_cast<std::size_t>(i)] == 0.0) continue;
    words(i / experts, i % experts / mask_word_bits) |= 1u << (i % experts % mask_word_bits);
  }
  return words;
}

/// The entropy of each token, [1, N].
template <class Entropy>
matrix<double, cpu> entropies(const Entropy& kind, matrix_view<const double, cpu> logits) {
  context<cpu> ctx(1);
  matrix<double, cpu> h(1, logits.rows);
  const routing<double, cpu> nothing(1, logits.cols);
  for (index n = 0; n < logits.rows; ++n) {
    const routed_view<double, cpu> token{logits.row_range(n, 1), nothing.view()};
    h(0, n) = entropy_loss<Entropy>{.entropy = kind}.forward(ctx, token).value(0, 0);
  }
  return h;
}

/// The value of a loss of one routing, and coefficient times its gradient with respect to logits,
/// added to dlogits: through the gates, with the selector that made them, and directly.
template <class Loss, class Selector>
double add_loss(const Loss& loss, double coefficient, const Selector& selector,
                const routed_view<double, cpu>& routed, matrix_view<double, cpu> dlogits) {
  context<cpu> ctx(1);
  const index tokens = routed.logits.rows, experts = routed.logits.cols;
  const auto kept = loss.forward(ctx, routed);
  matrix<double, cpu> upstream(1, 1), direct(tokens, experts), dgates(tokens, experts);
  matrix<double, cpu> through(tokens, experts);
  upstream(0, 0) = coefficient;
  const routed_gradient<double, cpu> gradient{direct.view(), dgates.view()};
  loss.backward(ctx, routed, kept, upstream, gradient, grad_mode::overwrite);
  ops::select_backward(ctx, selector, routed.logits, routed.routing.gates, routed.routing.mask,
                       dgates, through.view());
  for (index n = 0; n < tokens; ++n) {
    for (index e = 0; e < experts; ++e) dlogits(n, e) += direct(n, e) + through(n, e);
  }
  return kept.value(0, 0);
}

}  // namespace talpa::golden
