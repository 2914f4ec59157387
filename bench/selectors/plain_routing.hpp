// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/matrix.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <vector>

// Routing as one writes it without a library: a loop over tokens, std::exp, std::sort. What the
// benchmarks of selectors are compared with. Buffers are kept from one pass to the next.

namespace talpa::bench {

/// Tokens as a plain policy sees them.
struct plain_batch {
  matrix_view<const float, cpu> logits;   // [N, E]
  matrix_view<const float, cpu> control;  // [N, 1]
  matrix_view<const float, cpu> bias;     // [1, E]
  index sequence_length;
  index k;
};

/// One of them.
struct plain_row {
  index token;
  const float* logits;       // [E]
  const float* probability;  // [E], softmax of the logits
  float entropy;             // of the probabilities, in nats
  float control;
  const float* bias;  // [E]
  index experts;
  index k;
  float* gates;  // [E], zero; what a policy writes
};

/// The experts of a row, of which the first `count` come in the order (score descending, index
/// ascending).
class plain_order {
 public:
  const std::vector<int>& first(const float* score, index experts, index count) {
    order_.resize(static_cast<std::size_t>(experts));
    for (std::size_t i = 0; i < order_.size(); ++i) order_[i] = static_cast<int>(i);
    const auto before = [&](int a, int b) {
      return score[a] > score[b] || (score[a] == score[b] && a < b);
    };
    if (count == experts) {
      std::sort(order_.begin(), order_.end(), before);
    } else {
      std::partial_sort(order_.begin(), order_.begin() + count, order_.end(), before);
    }
    return order_;
  }

 private:
  std::vector<int> order_;
};

/// The pairs of tokens and experts, by expert and, of one expert, in the order they were added.
class plain_segments {
 public:
  void begin(index experts) {
    pairs_.clear();
    offset_.assign(static_cast<std::size_t>(experts + 1), 0);
  }
  void add(index token, index expert, float gate) {
    pairs_.push_back({static_cast<int>(token), static_cast<int>(expert), gate});
    ++offset_[static_cast<std::size_t>(expert + 1)];
  }
  void sort() {
    for (std::size_t e = 1; e < offset_.size(); ++e) offset_[e] += offset_[e - 1];
    next_ = offset_;
    token_of_slot_.resize(pairs_.size());
    gate_of_slot_.resize(pairs_.size());
    slot_of_pair_.resize(pairs_.size());
    for (std::size_t i = 0; i < pairs_.size(); ++i) {
      const int slot = next_[static_cast<std::size_t>(pairs_[i].expert)]++;
      token_of_slot_[static_cast<std::size_t>(slot)] = pairs_[i].token;
      gate_of_slot_[static_cast<std::size_t>(slot)] = pairs_[i].gate;
      slot_of_pair_[i] = slot;
    }
  }
  const std::vector<int>& token_of_slot() const { return token_of_slot_; }

 private:
  struct pair {
    int token, expert;
    float gate;
  };
  std::vector<pair> pairs_;
  std::vector<int> offset_, next_, token_of_slot_, slot_of_pair_;
  std::vector<float> gate_of_slot_;
};

/// Runs plain policies and adds up what statistics are made of. A policy is called for each row; a
/// `begin(batch)` of it before the first, an `assign(batch, probabilities [N, E])` after the
/// softmax of all rows.
class plain_router {
 public:
  explicit plain_router(index experts, bool sorts = false)
      : experts_(experts),
        sorts_(sorts),
        gates_(static_cast<std::size_t>(experts)),
        importance_(gates_.size()),
        mass_(gates_.size()),
        counts_(gates_.size()) {}

  template <class Plain>
  void run(const plain_batch& batch, Plain& plain) {
    constexpr bool coupled = requires { plain.assign(batch, probability_); };
    const index tokens = batch.logits.rows;
    probability_.resize(static_cast<std::size_t>(experts_ * (coupled ? tokens : 1)));
    std::fill(importance_.begin(), importance_.end(), 0.0f);
    std::fill(mass_.begin(), mass_.end(), 0.0f);
    std::fill(counts_.begin(), counts_.end(), 0);
    entropy_ = squared_logsumexp_ = 0.0f;
    if (sorts_) slots_.begin(experts_);
    if constexpr (requires { plain.begin(batch); }) plain.begin(batch);
    if constexpr (coupled) {
      for (index n = 0; n < tokens; ++n) softmax(batch.logits.row(n), at(n));
      plain.assign(batch, probability_);
      for (index n = 0; n < tokens; ++n) route(batch, n, at(n), plain);
    } else {
      for (index n = 0; n < tokens; ++n) {
        softmax(batch.logits.row(n), at(0));
        route(batch, n, at(0), plain);
      }
    }
    if (sorts_) slots_.sort();
  }
  float totals() const { return entropy_ + squared_logsumexp_ + importance_[0] + mass_[0]; }
  const std::vector<float>& importance() const { return importance_; }

 private:
  float* at(index n) { return probability_.data() + n * experts_; }
  void softmax(const float* u, float* p) {
    const float top = *std::max_element(u, u + experts_);
    float sum = 0.0f;
    for (index e = 0; e < experts_; ++e) sum += p[e] = std::exp(u[e] - top);
    for (index e = 0; e < experts_; ++e) p[e] /= sum;
    const float z = top + std::log(sum);
    squared_logsumexp_ += z * z;
  }
  template <class Plain>
  void route(const plain_batch& batch, index n, const float* p, Plain& plain) {
    float entropy = 0.0f;
    for (index e = 0; e < experts_; ++e) {
      if (p[e] > 0.0f) entropy -= p[e] * std::log(p[e]);
    }
    std::fill(gates_.begin(), gates_.end(), 0.0f);
    plain(plain_row{n, batch.logits.row(n), p, entropy, batch.control(n, 0), batch.bias.data,
                    experts_, batch.k, gates_.data()});
    for (std::size_t e = 0; e < gates_.size(); ++e) {
      importance_[e] += gates_[e];
      mass_[e] += p[e];
      counts_[e] += gates_[e] != 0.0f ? 1 : 0;
      if (sorts_ && gates_[e] != 0.0f) slots_.add(n, static_cast<index>(e), gates_[e]);
    }
    entropy_ += entropy;
  }

  index experts_;
  bool sorts_;
  plain_segments slots_;
  std::vector<float> probability_, gates_;
  std::vector<float> importance_, mass_;
  std::vector<int> counts_;
  float entropy_ = 0.0f, squared_logsumexp_ = 0.0f;
};

/// Divides the gates by their sum, if they have any.
inline void plain_renormalise(const plain_row& row) {
  float sum = 0.0f;
  for (index e = 0; e < row.experts; ++e) sum += row.gates[e];
  if (sum == 0.0f) return;
  for (index e = 0; e < row.experts; ++e) row.gates[e] /= sum;
}

struct plain_dense {
  void operator()(const plain_row& row) const {
    std::copy_n(row.probability, row.experts, row.gates);
  }
};

struct plain_top_k {
  bool renormalised = false;
  plain_order order{};

  void operator()(const plain_row& row) {
    const std::vector<int>& sorted = order.first(row.logits, row.experts, row.k);
    for (index i = 0; i < row.k; ++i) {
      const int e = sorted[static_cast<std::size_t>(i)];
      row.gates[e] = row.probability[e];
    }
    if (renormalised) plain_renormalise(row);
  }
};

}  // namespace talpa::bench
