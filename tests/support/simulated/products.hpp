// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/testing/simulated_gemm.hpp>
