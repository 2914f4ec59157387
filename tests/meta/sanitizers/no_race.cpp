// SPDX-License-Identifier: Apache-2.0
// Correct loops that only a sanitizer blind to OpenMP's barriers would complain about.
#include <cstddef>
#include <cstdio>
#include <vector>

int main() {
  constexpr std::size_t n = 10000;
  std::vector<double> first(n), second(n);
  double sum = 0;
  for (int round = 0; round < 20; ++round) {
#pragma omp parallel for num_threads(4) schedule(static)
    for (std::size_t i = 0; i < n; ++i) first[i] = static_cast<double>(i);
#pragma omp parallel for num_threads(4) schedule(dynamic, 16) reduction(+ : sum)
    for (std::size_t i = 0; i < n; ++i) {
      second[i] = first[n - 1 - i];
      sum += second[i];
    }
#pragma omp parallel num_threads(4)
    {
      std::vector<double> own(64, 1.0);
#pragma omp for schedule(dynamic, 16) nowait
      for (std::size_t i = 0; i < n; ++i) first[i] = second[n - 1 - i] + own[i % own.size()];
#pragma omp barrier
#pragma omp single
      sum += first[0];
    }
  }
  std::printf("%g\n", sum);
}
