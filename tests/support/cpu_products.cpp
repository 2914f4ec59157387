// SPDX-License-Identifier: Apache-2.0
#include "support/cpu_products.hpp"

namespace talpa::detail {

TALPA_TEST_CPU_PRODUCTS(, float)
TALPA_TEST_CPU_PRODUCTS(, double)
template void panel_product<float>(context<cpu>&, float, matrix_view<const float, cpu>, transpose,
                                   const bfloat16*, index, float, matrix_view<float, cpu>);

}  // namespace talpa::detail
