// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "workloads.hpp"

#include <benchmark/benchmark.h>
#include <torch/torch.h>

namespace talpa::bench {

/// How many threads PyTorch takes while a benchmark runs. Debian's library leaves OpenMP with one
/// when it is loaded, so that talpa's contexts, which ask for theirs in each region, are not
/// concerned, but PyTorch has to be told.
class torch_threads {
 public:
  explicit torch_threads(int count) { at::set_num_threads(count); }
  void enter(benchmark::State& state) const {
    state.counters["torch_threads"] = at::get_num_threads();
  }
};

/// A copy of a matrix.
inline torch::Tensor to_torch(matrix_view<const float, cpu> m) {
  torch::Tensor t = torch::empty({m.rows, m.cols});
  for (index n = 0; n < m.rows; ++n) {
    std::copy_n(m.row(n), m.cols, t.data_ptr<float>() + n * m.cols);
  }
  return t;
}

}  // namespace talpa::bench
