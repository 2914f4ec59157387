// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/cpu/gemm.hpp>

// Eigen's products take seconds to instantiate; tests share one instantiation of each.
namespace talpa::detail {

extern template void eigen_product<float>(float, matrix_view<const float, cpu>, transpose,
                                          matrix_view<const float, cpu>, transpose, float,
                                          matrix_view<float, cpu>);
extern template void eigen_product<double>(double, matrix_view<const double, cpu>, transpose,
                                           matrix_view<const double, cpu>, transpose, double,
                                           matrix_view<double, cpu>);

}  // namespace talpa::detail
