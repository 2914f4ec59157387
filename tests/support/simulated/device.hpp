// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/transfer.hpp>
#include <talpa/testing/simulated.hpp>

namespace talpa::support {

/// The device on which tests/cuda run: here one that the host plays. tests/support/gpu has the real
/// one under the same names.
using device = simulated;

/// Rows or elements of a test: few where a thread of the host stands for one of a device.
inline index device_size(index few, index) { return few; }

}  // namespace talpa::support
