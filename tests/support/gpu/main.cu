// SPDX-License-Identifier: Apache-2.0
// The main function of the tests of a device: 77 where none answers.
#define DOCTEST_CONFIG_IMPLEMENT
#include <doctest/doctest.h>

#include <cstdio>
#include <cuda_runtime_api.h>

int main(int count, char** arguments) {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::puts("no CUDA device answers: skipped");
    return 77;
  }
  doctest::Context context;
  context.applyCommandLine(count, arguments);
  return context.run();
}
