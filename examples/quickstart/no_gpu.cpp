// SPDX-License-Identifier: Apache-2.0
// What stands for on_gpu.cu in a build without CUDA.
#include "on_gpu.hpp"

#include <talpa/core/error.hpp>

namespace talpa::examples {

std::string gpu_text() {
  throw value_error(
      "talpa::examples::parse_options: '--device' is 'gpu', expected cpu = this program was built "
      "without CUDA (-DTALPA_ENABLE_CUDA=ON)");
}

void run_on_gpu(const assignment&) { gpu_text(); }

}  // namespace talpa::examples
