// SPDX-License-Identifier: Apache-2.0
//
// Selectors whose number of experts follows from probabilities; route.hpp says what is measured.
#include "selectors/route.hpp"

namespace {

using namespace talpa;
using bench::plain_row;
using talpa::index;
namespace measured = bench::measured;

/// Experts from a fixed probability on, renormalised.
struct plain_threshold {
  void operator()(const plain_row& row) const {
    const float least = 1.0f / static_cast<float>(row.experts);
    for (index e = 0; e < row.experts; ++e) {
      row.gates[e] = row.probability[e] >= least ? row.probability[e] : 0.0f;
    }
    bench::plain_renormalise(row);
  }
};

/// The most likely experts up to a cumulative probability, with or without the one that crosses it.
struct plain_top_p {
  float p;
  index min_k;
  bool keeps_crossing;
  bench::plain_order order{};

  void operator()(const plain_row& row) {
    const std::vector<int>& sorted = order.first(row.logits, row.experts, row.experts);
    float mass = 0.0f;
    for (index i = 0; i < row.experts; ++i) {
      const int e = sorted[static_cast<std::size_t>(i)];
      const bool open = mass <= p;
      mass += row.probability[e];
      const bool on = i < min_k || (keeps_crossing ? open : mass <= p);
      if (!on) break;
      row.gates[e] = row.probability[e];
    }
  }
};

/// The same, but all experts where the Tsallis entropy is high.
struct plain_dynamic_entropy {
  float q = 1.1f, threshold = 0.9f;
  plain_top_p certain{0.75f, 2, false};

  void operator()(const plain_row& row) {
    float sum = 0.0f;
    for (index e = 0; e < row.experts; ++e) sum += std::pow(row.probability[e], q);
    const float greatest = 1.0f - std::pow(static_cast<float>(row.experts), 1.0f - q);
    if ((1.0f - sum) / greatest > threshold) {
      std::copy_n(row.probability, row.experts, row.gates);
    } else {
      certain(row);
    }
  }
};

/// Top-k, but all experts where the entropy is high and the sequence has slots left.
struct plain_broadcast {
  float threshold = 0.8f;
  index most = std::numeric_limits<index>::max();
  bench::plain_top_k certain{};
  index sequence_length = 0, used = 0;

  void begin(const bench::plain_batch& batch) { sequence_length = batch.sequence_length; }
  void operator()(const plain_row& row) {
    if (row.token % sequence_length == 0) used = 0;
    const float h = row.entropy / std::log(static_cast<float>(row.experts));
    if (h >= threshold && used < most) {
      ++used;
      std::copy_n(row.probability, row.experts, row.gates);
    } else {
      certain(row);
    }
  }
};

struct plain_loops {
  auto operator()(measured::threshold) const { return plain_threshold{}; }
  auto operator()(measured::top_p) const { return plain_top_p{0.4f, 1, true}; }
  auto operator()(measured::dynamic_entropy) const { return plain_dynamic_entropy{}; }
  auto operator()(measured::broadcast) const { return plain_broadcast{}; }
  auto operator()(measured::broadcast_slots) const { return plain_broadcast{.most = 8}; }
};

const int registered = [] {
  bench::add_routes(bench::mass_selectors{}, plain_loops{});
  bench::add_routes(bench::broadcast_selectors{}, plain_loops{});
  return 0;
}();

}  // namespace
