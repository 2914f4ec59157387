// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/half.hpp>
#include <talpa/cuda/context.cuh>
#include <talpa/cuda/loops.hpp>
#include <talpa/ops/gemm.hpp>

#include <algorithm>
#include <cstdint>
#include <cublasLt.h>
#include <type_traits>

namespace talpa::detail {

template <class T>
inline constexpr cudaDataType_t cuda_type = CUDA_R_32F;
template <>
inline constexpr cudaDataType_t cuda_type<double> = CUDA_R_64F;
template <>
inline constexpr cudaDataType_t cuda_type<bfloat16> = CUDA_R_16BF;
template <>
inline constexpr cudaDataType_t cuda_type<float16> = CUDA_R_16F;

/// What cuBLASLt makes, with what destroys it.
struct matmul_description {
  cublasLtMatmulDesc_t handle = nullptr;
  matmul_description(cublasComputeType_t compute, cudaDataType_t scale) {
    check_cublas(cublasLtMatmulDescCreate(&handle, compute, scale), "ops::gemm");
  }
  matmul_description(const matmul_description&) = delete;
  matmul_description& operator=(const matmul_description&) = delete;
  ~matmul_description() { cublasLtMatmulDescDestroy(handle); }
};
struct matrix_layout {
  cublasLtMatrixLayout_t handle = nullptr;
  matrix_layout(cudaDataType_t type, index rows, index cols, index stride) {
    check_cublas(cublasLtMatrixLayoutCreate(&handle, type, static_cast<std::uint64_t>(rows),
                                            static_cast<std::uint64_t>(cols), stride),
                 "ops::gemm");
  }
  matrix_layout(const matrix_layout&) = delete;
  matrix_layout& operator=(const matrix_layout&) = delete;
  ~matrix_layout() { cublasLtMatrixLayoutDestroy(handle); }
};
struct matmul_preference {
  cublasLtMatmulPreference_t handle = nullptr;
  matmul_preference() { check_cublas(cublasLtMatmulPreferenceCreate(&handle), "ops::gemm"); }
  matmul_preference(const matmul_preference&) = delete;
  matmul_preference& operator=(const matmul_preference&) = delete;
  ~matmul_preference() { cublasLtMatmulPreferenceDestroy(handle); }
  template <class V>
  void set(cublasLtMatmulPreferenceAttributes_t attribute, V value) {
    check_cublas(cublasLtMatmulPreferenceSetAttribute(handle, attribute, &value, sizeof(value)),
                 "ops::gemm");
  }
};

/// Greatest power of two up to 256 that divides an address.
inline int alignment_of(const void* p) {
  const auto address = reinterpret_cast<std::uintptr_t>(p) | 256u;
  return static_cast<int>(address & (~address + 1u));
}

}  // namespace talpa::detail

namespace talpa::ops {

/// Products by cuBLASLt. A row-major c = op(a) op(b) is the column-major c^T = op(b)^T op(a)^T, so
/// the operands change places.
///
/// float is computed in float, never in TF32. Reductions of a split K go through the workspace in a
/// fixed order.
template <>
struct gemm_impl<gpu> {
  template <class S, class C>
  static void run(context<gpu>& ctx, sum_type<S> alpha, matrix_view<const S, gpu> a, transpose ta,
                  matrix_view<const S, gpu> b, transpose tb, sum_type<S> beta,
                  matrix_view<C, gpu> c) {
    if (c.empty()) return;
    const index k = detail::cols_of(a, ta);
    if (k == 0) {
      kernels::for_each_element(ctx, c.rows, c.cols,
                                kernels::scale_in_place<C, sum_type<S>, gpu>{beta, c});
      return;
    }
    using sum = sum_type<S>;
    constexpr cublasComputeType_t compute =
        std::same_as<sum, double> ? CUBLAS_COMPUTE_64F : CUBLAS_COMPUTE_32F;
    const detail::matmul_description product(compute, detail::cuda_type<sum>);
    const cublasOperation_t first = tb == transpose::no ? CUBLAS_OP_N : CUBLAS_OP_T;
    const cublasOperation_t second = ta == transpose::no ? CUBLAS_OP_N : CUBLAS_OP_T;
    set(product.handle, CUBLASLT_MATMUL_DESC_TRANSA, first);
    set(product.handle, CUBLASLT_MATMUL_DESC_TRANSB, second);
    const detail::matrix_layout first_layout(detail::cuda_type<S>, b.cols, b.rows,
                                             std::max(b.stride, b.cols));
    const detail::matrix_layout second_layout(detail::cuda_type<S>, a.cols, a.rows,
                                              std::max(a.stride, a.cols));
    const detail::matrix_layout result_layout(detail::cuda_type<C>, c.cols, c.rows,
                                              std::max(c.stride, c.cols));

    const detail::product_shape shape{detail::cuda_type<S>,
                                      detail::cuda_type<C>,
                                      compute,
                                      c.cols,
                                      c.rows,
                                      k,
                                      b.stride,
                                      a.stride,
                                      c.stride,
                                      first,
                                      second,
                                      detail::alignment_of(b.data),
                                      detail::alignment_of(a.data),
                                      detail::alignment_of(c.data),
                                      beta != sum{0}};
    const detail::product_plan& plan = plan_for(ctx, shape, product.handle, first_layout.handle,
                                                second_layout.handle, result_layout.handle);
    detail::check_cublas(
        cublasLtMatmul(ctx.handle(), product.handle, &alpha, b.data, first_layout.handle, a.data,
                       second_layout.handle, &beta, c.data, result_layout.handle, c.data,
                       result_layout.handle, &plan.algorithm, ctx.product_workspace(),
                       plan.workspace_bytes, ctx.stream),
        "ops::gemm");
  }

 private:
  template <class V>
  static void set(cublasLtMatmulDesc_t product, cublasLtMatmulDescAttributes_t attribute, V value) {
    detail::check_cublas(cublasLtMatmulDescSetAttribute(product, attribute, &value, sizeof(value)),
                         "ops::gemm");
  }

  /// The algorithm for a shape: what cuBLASLt proposes first, kept from the first call on.
  static const detail::product_plan& plan_for(context<gpu>& ctx, const detail::product_shape& shape,
                                              cublasLtMatmulDesc_t product,
                                              cublasLtMatrixLayout_t first,
                                              cublasLtMatrixLayout_t second,
                                              cublasLtMatrixLayout_t result) {
    for (const detail::product_plan& plan : ctx.product_plans()) {
      if (plan.shape == shape) return plan;
    }
    detail::matmul_preference preference;
    preference.set(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                   std::uint64_t{context<gpu>::product_workspace_bytes});
    preference.set(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
                   std::uint32_t{CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE});
    preference.set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
                   static_cast<std::uint32_t>(shape.alignment_a));
    preference.set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
                   static_cast<std::uint32_t>(shape.alignment_b));
    preference.set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
                   static_cast<std::uint32_t>(shape.alignment_c));
    preference.set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
                   static_cast<std::uint32_t>(shape.alignment_c));
    cublasLtMatmulHeuristicResult_t found{};
    int count = 0;
    detail::check_cublas(
        cublasLtMatmulAlgoGetHeuristic(ctx.handle(), product, first, second, result, result,
                                       preference.handle, 1, &found, &count),
        "ops::gemm");
    if (count == 0) {
      throw device_error(detail::concat("talpa::ops::gemm: cuBLASLt has no algorithm for ",
                                        detail::shape_text(shape.n, shape.m),
                                        " with K = ", std::to_string(shape.k)));
    }
    ctx.product_plans().push_back({shape, found.algo, found.workspaceSize});
    return ctx.product_plans().back();
  }
};

}  // namespace talpa::ops
