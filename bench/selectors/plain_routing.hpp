// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/index.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <vector>

// Routing as one writes it without a library: a loop over tokens, std::exp, std::partial_sort. What
// the benchmarks of selectors are compared with.

namespace talpa::bench {

/// One token as a plain policy sees it.
struct plain_row {
  const float* logits;
  float control;
  index experts;
  index k;
};

/// Runs plain policies and adds up what statistics are made of.
class plain_router {
 public:
  explicit plain_router(index experts)
      : probability_(static_cast<std::size_t>(experts)),
        gates_(static_cast<std::size_t>(experts)),
        order_(static_cast<std::size_t>(experts)),
        importance_(static_cast<std::size_t>(experts)),
        mass_(static_cast<std::size_t>(experts)),
        counts_(static_cast<std::size_t>(experts)) {}

  void begin() {
    std::fill(importance_.begin(), importance_.end(), 0.0f);
    std::fill(mass_.begin(), mass_.end(), 0.0f);
    std::fill(counts_.begin(), counts_.end(), 0);
    entropy_ = squared_logsumexp_ = 0.0f;
  }

  template <class Plain>
  void route(const plain_row& row, const Plain& plain) {
    const auto e = static_cast<std::size_t>(row.experts);
    const float top = *std::max_element(row.logits, row.logits + row.experts);
    float sum = 0.0f;
    for (std::size_t i = 0; i < e; ++i) sum += probability_[i] = std::exp(row.logits[i] - top);
    for (float& p : probability_) p /= sum;
    std::fill(gates_.begin(), gates_.end(), 0.0f);
    for (std::size_t i = 0; i < e; ++i) order_[i] = static_cast<int>(i);
    plain(row, *this);
    for (std::size_t i = 0; i < e; ++i) {
      importance_[i] += gates_[i];
      mass_[i] += probability_[i];
      counts_[i] += gates_[i] != 0.0f ? 1 : 0;
      if (probability_[i] > 0.0f) entropy_ -= probability_[i] * std::log(probability_[i]);
    }
    const float z = top + std::log(sum);
    squared_logsumexp_ += z * z;
  }
  float totals() const { return entropy_ + squared_logsumexp_ + importance_[0] + mass_[0]; }

  std::vector<float>& probability() { return probability_; }
  std::vector<float>& gates() { return gates_; }
  /// The experts; the first `count` by descending logit, ties by index.
  const std::vector<int>& sorted(const plain_row& row, index count) {
    std::partial_sort(order_.begin(), order_.begin() + count, order_.end(), [&](int a, int b) {
      return row.logits[a] > row.logits[b] || (row.logits[a] == row.logits[b] && a < b);
    });
    return order_;
  }

 private:
  std::vector<float> probability_, gates_;
  std::vector<int> order_;
  std::vector<float> importance_, mass_;
  std::vector<int> counts_;
  float entropy_ = 0.0f, squared_logsumexp_ = 0.0f;
};

struct plain_top_k {
  bool renormalised = false;
  void operator()(const plain_row& row, plain_router& r) const {
    const std::vector<int>& order = r.sorted(row, row.k);
    float mass = 0.0f;
    for (index i = 0; i < row.k; ++i) {
      const auto e = static_cast<std::size_t>(order[static_cast<std::size_t>(i)]);
      mass += r.gates()[e] = r.probability()[e];
    }
    if (!renormalised) return;
    for (float& g : r.gates()) g /= mass;
  }
};

struct plain_dense {
  void operator()(const plain_row&, plain_router& r) const { r.gates() = r.probability(); }
};

}  // namespace talpa::bench
