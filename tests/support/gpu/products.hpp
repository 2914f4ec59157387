// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/cuda/gemm.cuh>
