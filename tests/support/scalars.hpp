// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "support/sanitized.hpp"

// The scalars of a TEST_CASE_TEMPLATE, as a macro because they are no one type. Under a sanitizer
// only float, of which a register holds most: memory is reached by the same code for both, and the
// second would double what is compiled and run.
#if TALPA_SANITIZED
#define TALPA_SCALARS float
#else
#define TALPA_SCALARS float, double
#endif
