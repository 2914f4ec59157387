// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "experiment.hpp"

#include <string>

namespace talpa::examples {

/// The name of the CUDA device. Throws value_error where the program was built without CUDA
/// (no_gpu.cpp), device_error where no device answers (on_gpu.cu).
std::string gpu_text();

/// run_methods on that device.
void run_on_gpu(const assignment& given);

}  // namespace talpa::examples
