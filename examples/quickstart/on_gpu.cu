// SPDX-License-Identifier: Apache-2.0
#include "on_gpu.hpp"

#include <talpa/cuda.cuh>

#include <cuda_runtime_api.h>
#include <string>

namespace talpa::examples {

std::string gpu_text() {
  int devices = 0;
  const cudaError_t status = cudaGetDeviceCount(&devices);
  if (status != cudaSuccess || devices == 0) {
    throw device_error(std::string("no CUDA device answers (") +
                       (status != cudaSuccess ? cudaGetErrorString(status) : "there is none") +
                       "): run with --device cpu");
  }
  cudaDeviceProp properties;
  talpa::detail::check_cuda(cudaGetDeviceProperties(&properties, 0), "quickstart");
  return properties.name;
}

void run_on_gpu(const assignment& given) {
  context<gpu> ctx;
  run_methods(ctx, given);
}

}  // namespace talpa::examples
