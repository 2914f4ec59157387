// SPDX-License-Identifier: Apache-2.0
//
// Selectors without a parameter of their own; route.hpp says what is measured.
#include "selectors/route.hpp"

namespace {

using namespace talpa;
using bench::plain_row;
using talpa::index;
namespace measured = bench::measured;

/// Gates are the positive logits.
struct plain_rectified {
  void operator()(const plain_row& row) const {
    for (index e = 0; e < row.experts; ++e) row.gates[e] = std::max(row.logits[e], 0.0f);
  }
};

/// One for the largest logits.
struct plain_hard {
  bench::plain_order order{};

  void operator()(const plain_row& row) {
    const std::vector<int>& sorted = order.first(row.logits, row.experts, row.k);
    for (index i = 0; i < row.k; ++i) row.gates[sorted[static_cast<std::size_t>(i)]] = 1.0f;
  }
};

/// Softmax of the k largest probabilities.
struct plain_flat {
  bench::plain_order order{};

  void operator()(const plain_row& row) {
    const std::vector<int>& sorted = order.first(row.logits, row.experts, row.k);
    for (index i = 0; i < row.k; ++i) {
      const int e = sorted[static_cast<std::size_t>(i)];
      row.gates[e] = std::exp(row.probability[e]);
    }
    bench::plain_renormalise(row);
  }
};

/// Top-k without expert 0, and with the last one raised to the best of the others.
struct plain_intervened {
  bench::plain_order order{};
  std::vector<float> logits{};

  void operator()(const plain_row& row) {
    logits.assign(row.logits, row.logits + row.experts);
    logits[0] = -std::numeric_limits<float>::infinity();
    const float top = *std::max_element(logits.begin(), logits.end());
    logits.back() = top;
    const std::vector<int>& sorted = order.first(logits.data(), row.experts, row.k);
    for (index i = 0; i < row.k; ++i) {
      const auto e = static_cast<std::size_t>(sorted[static_cast<std::size_t>(i)]);
      row.gates[e] = std::exp(logits[e] - top);
    }
    bench::plain_renormalise(row);
  }
};

/// Experts whose score + bias is largest, weighed by their scores; of the best groups where there
/// are several.
struct plain_biased_top_k {
  index n_groups = 1, topk_groups = 1;
  bench::plain_order order{}, group_order{};
  std::vector<float> score{}, choice{}, rank{};

  void operator()(const plain_row& row) {
    score.resize(static_cast<std::size_t>(row.experts));
    choice.resize(score.size());
    for (index e = 0; e < row.experts; ++e) {
      const auto i = static_cast<std::size_t>(e);
      score[i] = 1.0f / (1.0f + std::exp(-row.logits[e]));
      choice[i] = score[i] + row.bias[e];
    }
    if (topk_groups < n_groups) keep_groups(row.experts / n_groups);
    const std::vector<int>& sorted = order.first(choice.data(), row.experts, row.k);
    for (index i = 0; i < row.k; ++i) {
      const auto e = static_cast<std::size_t>(sorted[static_cast<std::size_t>(i)]);
      row.gates[e] = score[e];
    }
    bench::plain_renormalise(row);
  }

 private:
  void keep_groups(index size) {
    constexpr float masked = -std::numeric_limits<float>::infinity();
    rank.resize(static_cast<std::size_t>(n_groups));
    for (index q = 0; q < n_groups; ++q) {
      float best = masked, second = masked;
      for (index e = q * size; e < (q + 1) * size; ++e) {
        const float c = choice[static_cast<std::size_t>(e)];
        second = std::max(second, std::min(best, c));
        best = std::max(best, c);
      }
      rank[static_cast<std::size_t>(q)] = size > 1 ? best + second : best;
    }
    const std::vector<int>& groups = group_order.first(rank.data(), n_groups, topk_groups);
    for (index i = topk_groups; i < n_groups; ++i) {
      const auto first = choice.begin() + groups[static_cast<std::size_t>(i)] * size;
      std::fill(first, first + size, masked);
    }
  }
};

struct plain_loops {
  auto operator()(measured::top_k_raw) const { return bench::plain_top_k{}; }
  auto operator()(measured::top_k_renormalised) const { return bench::plain_top_k{true}; }
  auto operator()(measured::top_k_softmax_selected) const { return bench::plain_top_k{true}; }
  auto operator()(measured::top_k_softmax_probability) const { return plain_flat{}; }
  auto operator()(measured::top_k_hard) const { return plain_hard{}; }
  auto operator()(measured::dense) const { return bench::plain_dense{}; }
  auto operator()(measured::rectified) const { return plain_rectified{}; }
  auto operator()(measured::straight_through) const { return plain_hard{}; }
  auto operator()(measured::intervene) const { return plain_intervened{}; }
  auto operator()(measured::biased_top_k) const { return plain_biased_top_k{}; }
  auto operator()(measured::biased_top_k_groups) const { return plain_biased_top_k{8, 4}; }
};

const int registered = [] {
  bench::add_routes(bench::top_k_selectors{}, plain_loops{});
  bench::add_routes(bench::row_selectors{}, plain_loops{});
  return 0;
}();

}  // namespace
