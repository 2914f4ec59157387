// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "support/cpu_products.hpp"

#include <talpa/testing/simulated_gemm.hpp>
