// SPDX-License-Identifier: Apache-2.0
// Threads add to one variable without a reduction.
#include <cstdio>

int main() {
  double sum = 0;
#pragma omp parallel for num_threads(4) schedule(static)
  for (int i = 0; i < 10000; ++i) sum += i;
  std::printf("%g\n", sum);
}
