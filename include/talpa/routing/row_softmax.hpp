// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/lanes.hpp>
#include <talpa/ops/select.hpp>

#include <cstdint>
#include <limits>
#include <utility>

namespace talpa {

/// The logits of a row, read once; -inf beyond the row.
template <class T, class G>
TALPA_HD auto row_logits(const G& g, row_pointer<const T> logits) {
  return g.load_row(logits, -std::numeric_limits<T>::infinity());
}

/// What the softmax of one row leaves behind, per lane group.
template <class T, class G>
struct row_exponentials {
  decltype(std::declval<const G&>().template elements<T>()) weight;  ///< exp(u_e - max u)
  typename G::template value<T> top;                                 ///< max u
  typename G::template value<T> sum;                                 ///< over all experts
  typename G::template value<bool> valid;                            ///< the sum is a number
  typename G::template value<bool> invalid;  ///< NaN or +inf among the logits, or -inf everywhere
};

/// Computes exp(u_e - max_j u_j) for each expert of a row and their canonical sum; the softmax is
/// weight / sum. An expert with logit -inf has weight 0. For an invalid row the sum is NaN. `top`
/// is max_j u_j, and anything where a logit is NaN.
template <class T, class G, class Logits>
TALPA_HD row_exponentials<T, G> exponentials(const G& g, const Logits& logits,
                                             const typename G::template value<T>& top) {
  auto weight = g.template elements<T>();
  const auto sum = g.template sum_of<T>(
      detail::exp_nonpositive_of{}, [&](auto e) { return logits[e] - top; },
      [&](auto e, const auto& x) { return weight[e] = x; });
  const auto valid = sum == sum;
  return {weight, top, sum, valid, !valid};
}
template <class T, class G, class Logits>
TALPA_HD row_exponentials<T, G> exponentials(const G& g, const Logits& logits) {
  const auto top = g.template max<T>([&](auto e) { return logits[e]; });
  return exponentials<T>(g, logits, top);
}

/// The probabilities weight / sum of a row as an array; NaN for an invalid row.
template <class T, class G>
TALPA_HD auto probabilities(const G& g, const row_exponentials<T, G>& exponential) {
  const auto quotient = g.quotients(exponential.weight, exponential.sum);
  auto p = g.template elements<T>();
  g.for_each([&](auto e) { p[e] = quotient[e]; });
  return p;
}

/// The probabilities of a row with their logarithms, for sums over them: p[e] = weight times the
/// rounded 1 / sum, and log(e) = ln p_e = (u_e - top) - ln sum; one division and one logarithm for
/// the row; log is -inf for a masked expert, all is NaN for an invalid row.
template <class T, class G, class Logits>
struct logged_probabilities {
  Logits logits;
  decltype(std::declval<const G&>().template elements<T>()) weight;
  typename G::template value<T> top, scale, log_sum;

  template <class Element>
  TALPA_HD auto operator[](Element e) const {
    return math::fma(weight[e], scale, G::template uniform<T>(T{0}));  // mul: none is negative
  }
  template <class Element>
  TALPA_HD auto log(Element e) const {
    return (logits[e] - top) - log_sum;
  }
};
template <class T, class G, class Logits>
TALPA_HD logged_probabilities<T, G, Logits> log_probabilities(
    const G& g, const Logits& logits, const row_exponentials<T, G>& exponential) {
  return {logits, exponential.weight, exponential.top, g.uniform(T{1}) / exponential.sum,
          math::log(exponential.sum)};
}

/// Whether a row cannot be routed: NaN or +inf among its logits, or -inf everywhere.
/// `top` is the largest logit, and anything where one is NaN.
template <class T, class G, class Logits>
TALPA_HD typename G::template value<bool> row_invalid(const G& g, const Logits& logits,
                                                      const typename G::template value<T>& top) {
  const auto infinity = g.uniform(std::numeric_limits<T>::infinity());
  const auto unordered = g.some([&](auto e) { return !(logits[e] == logits[e]); });
  const auto endless = top == infinity, empty = top == -infinity;
  return unordered | (endless | empty);
}
template <class T, class G, class Logits>
TALPA_HD typename G::template value<bool> row_invalid(const G& g, const Logits& logits) {
  const auto top = g.template max<T>([&](auto e) { return logits[e]; });
  return row_invalid<T>(g, logits, top);
}

}  // namespace talpa
