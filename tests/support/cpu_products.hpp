// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/cpu/gemm.hpp>
#include <talpa/cpu/grouped_gemm.hpp>
#include <talpa/cpu/indexed_gemm.hpp>
#include <talpa/cpu/routed_linear.hpp>

// Products take seconds to instantiate; tests share one instantiation of each. `storage` is extern
// here, and nothing where they are made.
#define TALPA_TEST_CPU_PRODUCTS(storage, T)                                                        \
  storage template void eigen_product<T>(T, matrix_view<const T, cpu>, transpose,                  \
                                         matrix_view<const T, cpu>, transpose, T,                  \
                                         matrix_view<T, cpu>);                                     \
  storage template void panel_product<T>(context<cpu>&, T, matrix_view<const T, cpu>, transpose,   \
                                         const T*, index, T, matrix_view<T, cpu>);                 \
  storage template void tiled_product<T>(context<cpu>&, T, matrix_view<const T, cpu>, transpose,   \
                                         matrix_view<const T, cpu>, transpose, T,                  \
                                         matrix_view<T, cpu>);                                     \
  storage template void inner_product<T>(context<cpu>&, T, matrix_view<const T, cpu>,              \
                                         matrix_view<const T, cpu>, T, matrix_view<T, cpu>);       \
  storage template void outer_product<T>(context<cpu>&, T, matrix_view<const T, cpu>,              \
                                         matrix_view<const T, cpu>, T, matrix_view<T, cpu>);       \
  storage template void streamed_product<T>(context<cpu>&, vector_view<const index, cpu>,          \
                                            matrix_view<const T, cpu>, matrix_view<const T, cpu>,  \
                                            index, transpose, matrix_view<T, cpu>, bool);          \
  storage template void streamed_gradient<T>(context<cpu>&, vector_view<const index, cpu>,         \
                                             matrix_view<const T, cpu>, matrix_view<const T, cpu>, \
                                             const row_run&, matrix_view<T, cpu>);                 \
  storage template void indexed_inner<T>(context<cpu>&, const segments<cpu>&,                      \
                                         matrix_view<const T, cpu>, matrix_view<const T, cpu>,     \
                                         matrix_view<T, cpu>);                                     \
  storage template void indexed_sum<T>(context<cpu>&, const segments<cpu>&,                        \
                                       matrix_view<const T, cpu>, matrix_view<const T, cpu>,       \
                                       matrix_view<T, cpu>, bool, const dropout_bits<cpu>&);       \
  storage template void product_and_sum<T>(context<cpu>&, const packed_product<T, cpu>&,           \
                                           const token_terms<T>&, const summed_rows<T>&,           \
                                           matrix_view<T, cpu>, bool, const row_function&);        \
  storage template void routed_forward<T>::run(index, index, int) const;                           \
  storage template void routed_backward<T>::run(index, index, int) const;                          \
  storage template T gate_backward<T>(T, T, const T*, index, T*);                                  \
  storage template void indexed_outer<T>(context<cpu>&, const segments<cpu>&,                      \
                                         matrix_view<const T, cpu>, matrix_view<const T, cpu>,     \
                                         const row_run&, matrix_view<T, cpu>);

namespace talpa::detail {

TALPA_TEST_CPU_PRODUCTS(extern, float)
TALPA_TEST_CPU_PRODUCTS(extern, double)
extern template void panel_product<float>(context<cpu>&, float, matrix_view<const float, cpu>,
                                          transpose, const bfloat16*, index, float,
                                          matrix_view<float, cpu>);

}  // namespace talpa::detail
