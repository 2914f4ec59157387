// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "support/sanitized.hpp"

// The scalars of a TEST_CASE_TEMPLATE, as a macro because they are no one type. Under a sanitizer
// only float, of which a register holds most: memory is reached by the same code for both, and the
// second would double what is compiled and run. TALPA_HALVES: likewise the storage of 16 bits.
#if TALPA_SANITIZED
#define TALPA_SCALARS float
#define TALPA_HALVES bfloat16
#else
#define TALPA_SCALARS float, double
#define TALPA_HALVES bfloat16, float16
#endif
