// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/cuda/slot_product.hpp>
#include <talpa/ops/ragged_gemm.hpp>

#include <span>

namespace talpa::ops {

template <kernel_backend B>
struct ragged_gemm_impl<B> {
  template <class T>
  static void product(context<B>& ctx, vector_view<const index, B> offsets,
                      vector_view<const index, B> blocks, matrix_view<const T, B> a,
                      matrix_view<const T, B> bank, transpose tb, matrix_view<T, B> c,
                      grad_mode c_mode) {
    kernels::multiply_slots(ctx, offsets, kernels::unequal_blocks{blocks.data},
                            kernels::slot_rows<T, B>{a}, bank, tb, c,
                            c_mode == grad_mode::accumulate);
  }

  /// Which groups a run touches only the device knows: all are tried.
  template <class T>
  static void gradient(context<B>& ctx, vector_view<const index, B> offsets,
                       vector_view<const index, B> blocks, matrix_view<const T, B> a,
                       matrix_view<const T, B> b, std::span<const row_run> runs,
                       matrix_view<T, B> dbank) {
    for (const row_run& run : runs) {
      kernels::add_slot_products(ctx, offsets, kernels::unequal_blocks{blocks.data}, a,
                                 kernels::slot_rows<T, B>{b}, run, dbank, index{0},
                                 offsets.size - 1);
    }
  }
};

}  // namespace talpa::ops
