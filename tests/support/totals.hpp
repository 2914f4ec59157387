// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/matrix.hpp>
#include <talpa/ops/routing_sums.hpp>

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <type_traits>

namespace talpa::support {

/// Every total that can be wanted, owned; begins as `fill`.
template <class T>
struct all_totals {
  vector<index, cpu> tokens;
  matrix<index, cpu> counts;
  matrix<T, cpu> probability, importance;
  vector<T, cpu> squared_logsumexp, entropy;

  all_totals(index groups, index experts, index fill)
      : tokens(groups),
        counts(groups, experts),
        probability(groups, experts),
        importance(groups, experts),
        squared_logsumexp(groups),
        entropy(groups) {
    const auto begin_as = [fill](auto& m) {
      std::fill_n(m.data(), m.size(), static_cast<std::decay_t<decltype(*m.data())>>(fill));
    };
    begin_as(tokens), begin_as(counts), begin_as(probability), begin_as(importance);
    begin_as(squared_logsumexp), begin_as(entropy);
  }
  routing_totals<T, cpu> view() {
    return {tokens, counts, probability, importance, squared_logsumexp, entropy};
  }
  /// Of the bits.
  bool operator==(const all_totals& other) const {
    const auto same = [](const auto& a, const auto& b) {
      // Of nothing there is no address.
      return a.size() == 0 ||
             std::memcmp(a.data(), b.data(),
                         static_cast<std::size_t>(a.size()) * sizeof(*a.data())) == 0;
    };
    return same(tokens, other.tokens) && same(counts, other.counts) &&
           same(probability, other.probability) && same(importance, other.importance) &&
           same(squared_logsumexp, other.squared_logsumexp) && same(entropy, other.entropy);
  }
};

}  // namespace talpa::support
