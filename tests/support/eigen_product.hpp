// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/cpu/gemm.hpp>
#include <talpa/cpu/indexed_gemm.hpp>

// Products take seconds to instantiate; tests share one instantiation of each.
namespace talpa::detail {

extern template void eigen_product<float>(float, matrix_view<const float, cpu>, transpose,
                                          matrix_view<const float, cpu>, transpose, float,
                                          matrix_view<float, cpu>);
extern template void eigen_product<double>(double, matrix_view<const double, cpu>, transpose,
                                           matrix_view<const double, cpu>, transpose, double,
                                           matrix_view<double, cpu>);
extern template void panel_product<float>(context<cpu>&, float, matrix_view<const float, cpu>,
                                          transpose, const float*, index, float,
                                          matrix_view<float, cpu>);
extern template void tiled_product<float>(context<cpu>&, float, matrix_view<const float, cpu>,
                                          transpose, matrix_view<const float, cpu>, transpose,
                                          float, matrix_view<float, cpu>);
extern template void panel_product<double>(context<cpu>&, double, matrix_view<const double, cpu>,
                                           transpose, const double*, index, double,
                                           matrix_view<double, cpu>);
extern template void tiled_product<double>(context<cpu>&, double, matrix_view<const double, cpu>,
                                           transpose, matrix_view<const double, cpu>, transpose,
                                           double, matrix_view<double, cpu>);
extern template void indexed_inner<float>(context<cpu>&, const segments<cpu>&,
                                          matrix_view<const float, cpu>,
                                          matrix_view<const float, cpu>, matrix_view<float, cpu>);
extern template void indexed_sum<float>(context<cpu>&, const segments<cpu>&,
                                        matrix_view<const float, cpu>,
                                        matrix_view<const float, cpu>, matrix_view<float, cpu>,
                                        bool);
extern template void indexed_outer<float>(context<cpu>&, const segments<cpu>&,
                                          matrix_view<const float, cpu>,
                                          matrix_view<const float, cpu>, const row_run&,
                                          matrix_view<float, cpu>);
extern template void indexed_inner<double>(context<cpu>&, const segments<cpu>&,
                                           matrix_view<const double, cpu>,
                                           matrix_view<const double, cpu>,
                                           matrix_view<double, cpu>);
extern template void indexed_sum<double>(context<cpu>&, const segments<cpu>&,
                                         matrix_view<const double, cpu>,
                                         matrix_view<const double, cpu>, matrix_view<double, cpu>,
                                         bool);
extern template void indexed_outer<double>(context<cpu>&, const segments<cpu>&,
                                           matrix_view<const double, cpu>,
                                           matrix_view<const double, cpu>, const row_run&,
                                           matrix_view<double, cpu>);
extern template void inner_product<float>(context<cpu>&, float, matrix_view<const float, cpu>,
                                          matrix_view<const float, cpu>, float,
                                          matrix_view<float, cpu>);
extern template void outer_product<float>(context<cpu>&, float, matrix_view<const float, cpu>,
                                          matrix_view<const float, cpu>, float,
                                          matrix_view<float, cpu>);
extern template void inner_product<double>(context<cpu>&, double, matrix_view<const double, cpu>,
                                           matrix_view<const double, cpu>, double,
                                           matrix_view<double, cpu>);
extern template void outer_product<double>(context<cpu>&, double, matrix_view<const double, cpu>,
                                           matrix_view<const double, cpu>, double,
                                           matrix_view<double, cpu>);

}  // namespace talpa::detail
