// SPDX-License-Identifier: Apache-2.0
#include "support/eigen_product.hpp"

namespace talpa::detail {

template void eigen_product<float>(float, matrix_view<const float, cpu>, transpose,
                                   matrix_view<const float, cpu>, transpose, float,
                                   matrix_view<float, cpu>);
template void eigen_product<double>(double, matrix_view<const double, cpu>, transpose,
                                    matrix_view<const double, cpu>, transpose, double,
                                    matrix_view<double, cpu>);
template void panel_product<float>(context<cpu>&, float, matrix_view<const float, cpu>, transpose,
                                   const float*, index, float, matrix_view<float, cpu>);
template void tiled_product<float>(context<cpu>&, float, matrix_view<const float, cpu>, transpose,
                                   matrix_view<const float, cpu>, transpose, float,
                                   matrix_view<float, cpu>);
template void panel_product<double>(context<cpu>&, double, matrix_view<const double, cpu>,
                                    transpose, const double*, index, double,
                                    matrix_view<double, cpu>);
template void tiled_product<double>(context<cpu>&, double, matrix_view<const double, cpu>,
                                    transpose, matrix_view<const double, cpu>, transpose, double,
                                    matrix_view<double, cpu>);
template void indexed_inner<float>(context<cpu>&, const segments<cpu>&,
                                   matrix_view<const float, cpu>, matrix_view<const float, cpu>,
                                   matrix_view<float, cpu>);
template void indexed_sum<float>(context<cpu>&, const segments<cpu>&, matrix_view<const float, cpu>,
                                 matrix_view<const float, cpu>, matrix_view<float, cpu>, bool);
template void indexed_outer<float>(context<cpu>&, const segments<cpu>&,
                                   matrix_view<const float, cpu>, matrix_view<const float, cpu>,
                                   const row_run&, matrix_view<float, cpu>);
template void indexed_inner<double>(context<cpu>&, const segments<cpu>&,
                                    matrix_view<const double, cpu>, matrix_view<const double, cpu>,
                                    matrix_view<double, cpu>);
template void indexed_sum<double>(context<cpu>&, const segments<cpu>&,
                                  matrix_view<const double, cpu>, matrix_view<const double, cpu>,
                                  matrix_view<double, cpu>, bool);
template void indexed_outer<double>(context<cpu>&, const segments<cpu>&,
                                    matrix_view<const double, cpu>, matrix_view<const double, cpu>,
                                    const row_run&, matrix_view<double, cpu>);
template void inner_product<float>(context<cpu>&, float, matrix_view<const float, cpu>,
                                   matrix_view<const float, cpu>, float, matrix_view<float, cpu>);
template void outer_product<float>(context<cpu>&, float, matrix_view<const float, cpu>,
                                   matrix_view<const float, cpu>, float, matrix_view<float, cpu>);
template void inner_product<double>(context<cpu>&, double, matrix_view<const double, cpu>,
                                    matrix_view<const double, cpu>, double,
                                    matrix_view<double, cpu>);
template void outer_product<double>(context<cpu>&, double, matrix_view<const double, cpu>,
                                    matrix_view<const double, cpu>, double,
                                    matrix_view<double, cpu>);

}  // namespace talpa::detail
