// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/cuda/slot_product.hpp>
#include <talpa/ops/grouped_gemm.hpp>

#include <cstdint>
#include <span>

namespace talpa::ops {

template <kernel_backend B>
struct grouped_gemm_impl<B> {
  template <class T>
  static void product(context<B>& ctx, vector_view<const index, B> offsets,
                      matrix_view<const T, B> a, matrix_view<const T, B> bank, index rows,
                      transpose tb, matrix_view<T, B> c, grad_mode c_mode) {
    kernels::multiply_slots(ctx, offsets, kernels::equal_blocks{rows}, kernels::slot_rows<T, B>{a},
                            bank, tb, c, c_mode == grad_mode::accumulate);
  }

  template <class S, class C>
  static void mixed(context<B>& ctx, vector_view<const index, B> offsets, matrix_view<const S, B> a,
                    vector_view<const std::int32_t, B> row_of_slot, matrix_view<const S, B> bank,
                    index rows, transpose tb, matrix_view<C, B> c, grad_mode c_mode) {
    kernels::multiply_slots(ctx, offsets, kernels::equal_blocks{rows},
                            kernels::slot_rows<S, B>{a, row_of_slot.data}, bank, tb, c,
                            c_mode == grad_mode::accumulate);
  }
  template <class S>
  static void mixed_gradient(context<B>& ctx, vector_view<const index, B> offsets,
                             matrix_view<const S, B> a, matrix_view<const S, B> b,
                             vector_view<const std::int32_t, B> row_of_slot,
                             std::span<const row_run> runs, matrix_view<float, B> dbank) {
    if (a.cols == 0) return;
    for (const row_run& run : runs) {
      kernels::add_slot_products(ctx, offsets, kernels::equal_blocks{a.cols}, a,
                                 kernels::slot_rows<S, B>{b, row_of_slot.data}, run, dbank,
                                 run.first / a.cols, run.rows / a.cols);
    }
  }

  template <class T>
  static void gradient(context<B>& ctx, vector_view<const index, B> offsets,
                       matrix_view<const T, B> a, matrix_view<const T, B> b,
                       std::span<const row_run> runs, matrix_view<T, B> dbank) {
    if (a.cols == 0) return;
    for (const row_run& run : runs) {
      kernels::add_slot_products(ctx, offsets, kernels::equal_blocks{a.cols}, a,
                                 kernels::slot_rows<T, B>{b}, run, dbank, run.first / a.cols,
                                 run.rows / a.cols);
    }
  }
};

}  // namespace talpa::ops
