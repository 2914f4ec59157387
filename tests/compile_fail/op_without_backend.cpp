// SPDX-License-Identifier: Apache-2.0
// An op used without the header of its implementation says which header that is.
// expect: talpa: ops::gemm has no implementation for this backend here, include talpa/cpu/gemm.hpp for cpu, talpa/cuda/gemm.cuh for gpu
#include <talpa/cpu/context.hpp>
#include <talpa/ops/gemm.hpp>
#ifndef TALPA_MISTAKE
#include <talpa/cpu/gemm.hpp>
#endif

void product(talpa::context<talpa::cpu>& ctx, talpa::matrix_view<const float, talpa::cpu> a,
             talpa::matrix_view<const float, talpa::cpu> b,
             talpa::matrix_view<float, talpa::cpu> c) {
  talpa::ops::gemm(ctx, a, talpa::transpose::no, b, talpa::transpose::no, 0.0f, c);
}
