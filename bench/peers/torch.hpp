// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "workloads.hpp"

#include <benchmark/benchmark.h>
#include <torch/torch.h>

#include <algorithm>
#include <chrono>
#include <thread>

// Null where PyTorch brings another BLAS.
extern "C" {
[[gnu::weak]] void openblas_set_num_threads(int);
[[gnu::weak]] int openblas_get_num_threads(void);
}

namespace talpa::bench {

/// How many threads PyTorch takes while a benchmark runs, and the BLAS behind it where that is
/// OpenBLAS, which has threads of its own and does not hear of PyTorch's. Debian's library leaves
/// OpenMP with one thread when it is loaded; talpa's contexts ask for theirs in each region.
class torch_threads {
 public:
  explicit torch_threads(int count) : count_(count) {
    at::set_num_threads(count);
    if (openblas_set_num_threads != nullptr) openblas_set_num_threads(count);
  }
  /// Until threads that wait for more work in a loop have gone to sleep: else they take the time of
  /// what runs next.
  void rest() const {
    if (count_ > 1) std::this_thread::sleep_for(std::chrono::milliseconds(60));
  }
  void enter(benchmark::State& state) const {
    state.counters["torch_threads"] = at::get_num_threads();
    if (openblas_get_num_threads != nullptr) {
      state.counters["torch_blas_threads"] = openblas_get_num_threads();
    }
  }

 private:
  int count_;
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
