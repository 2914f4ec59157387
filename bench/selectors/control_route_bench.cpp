// SPDX-License-Identifier: Apache-2.0
//
// Selectors that read a number a token, and projections; route.hpp says what is measured. The
// number comes ready made: what its scorer costs is no part of this.
#include "selectors/route.hpp"

namespace {

using namespace talpa;
using bench::plain_row;
using talpa::index;
namespace measured = bench::measured;

/// Experts above a threshold of the token, weighed by how far.
struct plain_learned_threshold {
  void operator()(const plain_row& row) const {
    const float bar = 1.0f / (static_cast<float>(row.experts) * (1.0f + std::exp(-row.control)));
    for (index e = 0; e < row.experts; ++e) {
      row.gates[e] = std::max(row.probability[e] - bar, 0.0f);
    }
    bench::plain_renormalise(row);
  }
};

/// Sparsegen by sorting, as its papers write it.
struct plain_projection {
  bool controlled;
  std::vector<float> sorted{};

  void operator()(const plain_row& row) {
    const float size = controlled ? std::log1p(std::exp(-row.control)) + 0.01f : 1.0f;
    sorted.assign(row.logits, row.logits + row.experts);
    std::sort(sorted.begin(), sorted.end(), std::greater<>());
    float sum = 0.0f, tau = 0.0f, count = 0.0f;
    for (const float u : sorted) {
      sum += u;
      count += 1.0f;
      if (size + count * u <= sum) break;
      tau = (sum - size) / count;
    }
    for (index e = 0; e < row.experts; ++e) {
      row.gates[e] = std::max(row.logits[e] - tau, 0.0f) / size;
    }
  }
};

struct plain_loops {
  auto operator()(measured::learned_threshold) const { return plain_learned_threshold{}; }
  auto operator()(measured::sparsegen) const { return plain_projection{true}; }
  auto operator()(measured::fixed_sparsegen) const { return plain_projection{false}; }
};

const int registered = (bench::add_routes(bench::control_selectors{}, plain_loops{}), 0);

}  // namespace
