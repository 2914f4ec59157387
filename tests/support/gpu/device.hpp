// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/transfer.hpp>
#include <talpa/cuda/context.cuh>

#include <cstdlib>
#include <string_view>

namespace talpa::support {

using device = gpu;

/// Many, but under a sanitizer, which asks for few: TALPA_DEVICE_SIZES=small.
inline index device_size(index few, index many) {
  const char* const wanted = std::getenv("TALPA_DEVICE_SIZES");
  return wanted != nullptr && std::string_view(wanted) == "small" ? few : many;
}

}  // namespace talpa::support
