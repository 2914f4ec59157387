// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/transfer.hpp>
#include <talpa/cuda/context.cuh>

namespace talpa::support {

using device = gpu;

constexpr index device_size(index, index many) { return many; }

}  // namespace talpa::support
