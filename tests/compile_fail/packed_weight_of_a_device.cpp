// SPDX-License-Identifier: Apache-2.0
// Weights are packed on the CPU alone.
// expect: talpa: packed_matrix has no implementation for this backend here, include talpa/cpu/packed_gemm.hpp for cpu
#include <talpa/autograd/parameter.hpp>
#include <talpa/cpu/packed_gemm.hpp>

#ifdef TALPA_MISTAKE
using where = talpa::gpu;
#else
using where = talpa::cpu;
#endif

void pack(talpa::context<where>& ctx, talpa::parameter<float, where>& weight) { weight.pack(ctx); }
