// SPDX-License-Identifier: Apache-2.0
//
// Selectors whose choice for one token depends on the others; route.hpp says what is measured.
// sinkhorn runs on 1024 tokens and base_assignment on 512, because they take long.
#include "selectors/route.hpp"

namespace {

using namespace talpa;
using bench::plain_batch;
using bench::plain_row;
using talpa::index;
namespace measured = bench::measured;

/// Renormalised top-k of which every expert keeps its share, the earlier tokens first.
struct plain_capacity_by_position {
  bench::plain_top_k free{true};
  index places = 0;
  std::vector<index> taken{};

  void begin(const plain_batch& batch) {
    taken.assign(static_cast<std::size_t>(batch.logits.cols), 0);
    places = ceil_div(batch.logits.rows * batch.k, batch.logits.cols);
  }
  void operator()(const plain_row& row) {
    free(row);
    for (index e = 0; e < row.experts; ++e) {
      if (row.gates[e] != 0.0f && taken[static_cast<std::size_t>(e)]++ >= places) {
        row.gates[e] = 0.0f;
      }
    }
  }
};

/// Gates [N, E] of which every expert keeps its largest.
class plain_limit {
 public:
  float* row(index n) { return gates_.data() + n * experts_; }
  void reset(index tokens, index experts) {
    experts_ = experts;
    gates_.assign(static_cast<std::size_t>(tokens * experts), 0.0f);
  }
  void keep(index places) {
    for (index e = 0; e < experts_; ++e) {
      asking_.clear();
      for (index n = 0; n * experts_ < static_cast<index>(gates_.size()); ++n) {
        if (row(n)[e] != 0.0f) asking_.push_back(static_cast<int>(n));
      }
      if (static_cast<index>(asking_.size()) <= places) continue;
      std::nth_element(asking_.begin(), asking_.begin() + places, asking_.end(), [&](int a, int b) {
        return row(a)[e] > row(b)[e] || (row(a)[e] == row(b)[e] && a < b);
      });
      for (auto n = asking_.begin() + places; n != asking_.end(); ++n) row(*n)[e] = 0.0f;
    }
  }

 private:
  index experts_ = 0;
  std::vector<float> gates_;
  std::vector<int> asking_;
};

/// Renormalised top-k of which every expert keeps its share, the larger gates first.
struct plain_capacity_by_probability {
  bench::plain_top_k free{true};
  plain_limit limit{};

  void assign(const plain_batch& batch, const std::vector<float>& probability) {
    const index tokens = batch.logits.rows, experts = batch.logits.cols;
    limit.reset(tokens, experts);
    for (index n = 0; n < tokens; ++n) {
      free(plain_row{.token = n,
                     .logits = batch.logits.row(n),
                     .probability = probability.data() + n * experts,
                     .entropy = 0.0f,
                     .control = 0.0f,
                     .bias = nullptr,
                     .experts = experts,
                     .k = batch.k,
                     .gates = limit.row(n)});
    }
    limit.keep(ceil_div(tokens * batch.k, experts));
  }
  void operator()(const plain_row& row) {
    std::copy_n(limit.row(row.token), row.experts, row.gates);
  }
};

/// Every expert takes the tokens that like it most, two a token in the mean.
struct plain_expert_choice {
  plain_limit limit{};

  void assign(const plain_batch& batch, const std::vector<float>& probability) {
    const index tokens = batch.logits.rows, experts = batch.logits.cols;
    limit.reset(tokens, experts);
    std::copy(probability.begin(), probability.end(), limit.row(0));
    limit.keep(2 * tokens / experts);
  }
  void operator()(const plain_row& row) {
    std::copy_n(limit.row(row.token), row.experts, row.gates);
  }
};

float sigmoid(float x) { return 1.0f / (1.0f + std::exp(-x)); }

/// Scales rows and columns of exp(logits) in turn, then takes the largest of each row.
struct plain_sinkhorn {
  float tolerance = 1e-4f;
  int iterations = 1000;
  bench::plain_order order{};
  std::vector<float> plan{}, column{}, next{}, score{};

  void assign(const plain_batch& batch, const std::vector<float>&) {
    const index tokens = batch.logits.rows, experts = batch.logits.cols;
    const auto width = static_cast<std::size_t>(experts);
    plan.resize(static_cast<std::size_t>(tokens) * width);
    for (index n = 0; n < tokens; ++n) {
      const float* u = batch.logits.row(n);
      const float top = *std::max_element(u, u + experts);
      for (index e = 0; e < experts; ++e) row(n, width)[e] = std::exp(u[e] - top);
    }
    column.assign(width, 1.0f);
    for (int i = 0; i < iterations; ++i) {
      next.assign(width, 0.0f);
      for (index n = 0; n < tokens; ++n) {
        float sum = 0.0f;
        for (std::size_t e = 0; e < width; ++e) sum += row(n, width)[e] * column[e];
        const float scale = 1.0f / (static_cast<float>(tokens) * sum);
        for (std::size_t e = 0; e < width; ++e) next[e] += row(n, width)[e] * scale;
      }
      float change = 0.0f;
      for (std::size_t e = 0; e < width; ++e) {
        next[e] = 1.0f / (static_cast<float>(experts) * next[e]);
        change += std::abs(next[e] - column[e]);
      }
      std::swap(column, next);
      if (change <= tolerance * static_cast<float>(experts)) break;
    }
  }
  void operator()(const plain_row& r) {
    const auto width = static_cast<std::size_t>(r.experts);
    score.resize(width);
    for (std::size_t e = 0; e < width; ++e) score[e] = row(r.token, width)[e] * column[e];
    const std::vector<int>& sorted = order.first(score.data(), r.experts, r.k);
    for (index i = 0; i < r.k; ++i) {
      const int e = sorted[static_cast<std::size_t>(i)];
      r.gates[e] = r.k == 1 ? sigmoid(r.logits[e]) : r.probability[e];
    }
  }

 private:
  float* row(index n, std::size_t width) {
    return plan.data() + static_cast<std::size_t>(n) * width;
  }
};

/// An auction, as in the code of BASE layers: tokens bid for places until each has one. The sum of
/// scores ends within `step` a token of the largest.
struct plain_auction {
  struct place {
    float price;
    int token;
  };
  float step = 1e-3f;
  std::vector<place> places{};
  std::vector<int> owner{}, waiting{};

  void assign(const plain_batch& batch, const std::vector<float>&) {
    const index tokens = batch.logits.rows, experts = batch.logits.cols;
    const index share = tokens / experts;
    places.assign(static_cast<std::size_t>(tokens), place{0.0f, -1});
    owner.assign(static_cast<std::size_t>(tokens), -1);
    waiting.resize(static_cast<std::size_t>(tokens));
    for (index n = 0; n < tokens; ++n) {
      waiting[static_cast<std::size_t>(n)] = static_cast<int>(tokens - 1 - n);
    }
    const auto dearer = [](const place& a, const place& b) { return a.price > b.price; };
    while (!waiting.empty()) {
      const int n = waiting.back();
      waiting.pop_back();
      const float* u = batch.logits.row(n);
      // The places of an expert are a heap with the cheapest in front.
      float best = -std::numeric_limits<float>::infinity(), second = best;
      index chosen = 0;
      for (index e = 0; e < experts; ++e) {
        const float value = u[e] - places[static_cast<std::size_t>(e * share)].price;
        if (value > best) {
          second = best;
          best = value;
          chosen = e;
        } else {
          second = std::max(second, value);
        }
      }
      const auto first = places.begin() + chosen * share, last = first + share;
      std::pop_heap(first, last, dearer);
      place& cheapest = *(last - 1);
      if (cheapest.token >= 0) waiting.push_back(cheapest.token);
      cheapest = {cheapest.price + (best - second) + step, n};
      owner[static_cast<std::size_t>(n)] = static_cast<int>(chosen);
      std::push_heap(first, last, dearer);
    }
  }
  void operator()(const plain_row& row) const {
    const int e = owner[static_cast<std::size_t>(row.token)];
    row.gates[e] = sigmoid(row.logits[e]);
  }
};

struct plain_loops {
  auto operator()(measured::capacity_top_k_position) const { return plain_capacity_by_position{}; }
  auto operator()(measured::capacity_top_k_probability) const {
    return plain_capacity_by_probability{};
  }
  auto operator()(measured::expert_choice) const { return plain_expert_choice{}; }
  auto operator()(measured::sinkhorn) const { return plain_sinkhorn{}; }
  auto operator()(measured::base_assignment) const { return plain_auction{}; }
};

const int registered = [] {
  bench::add_routes(bench::capacity_selectors{}, plain_loops{});
  bench::add_routes(bench::coupled_selectors{}, plain_loops{});
  return 0;
}();

}  // namespace
