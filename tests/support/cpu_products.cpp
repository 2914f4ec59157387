// SPDX-License-Identifier: Apache-2.0
#include "support/cpu_products.hpp"

namespace talpa::detail {

TALPA_TEST_CPU_PRODUCTS(, float)
TALPA_TEST_CPU_PRODUCTS(, double)

}  // namespace talpa::detail
