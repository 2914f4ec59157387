// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/cuda/slot_product.hpp>
#include <talpa/ops/grouped_gemm.hpp>

#include <span>

namespace talpa::ops {

template <kernel_backend B>
struct grouped_gemm_impl<B> {
  template <class T>
  static void product(context<B>& ctx, vector_view<const index, B> offsets,
                      matrix_view<const T, B> a, matrix_view<const T, B> bank, index rows,
                      transpose tb, matrix_view<T, B> c, grad_mode c_mode) {
    kernels::multiply_slots(ctx, offsets, kernels::equal_blocks{rows}, a, bank, tb, c,
                            c_mode == grad_mode::accumulate);
  }

  template <class T>
  static void gradient(context<B>& ctx, vector_view<const index, B> offsets,
                       matrix_view<const T, B> a, matrix_view<const T, B> b,
                       std::span<const row_run> runs, matrix_view<T, B> dbank) {
    if (a.cols == 0) return;
    for (const row_run& run : runs) {
      kernels::add_slot_products(ctx, offsets, kernels::equal_blocks{a.cols}, a, b, run, dbank,
                                 run.first / a.cols, run.rows / a.cols);
    }
  }
};

}  // namespace talpa::ops
