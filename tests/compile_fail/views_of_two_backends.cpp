// SPDX-License-Identifier: Apache-2.0
// A host context takes no device view, and the compiler names both backends.
// expect: no known conversion
// expect: talpa::gpu>
// expect: talpa::cpu>
#include <talpa/cpu/gemm.hpp>

#ifdef TALPA_MISTAKE
using other = talpa::gpu;
#else
using other = talpa::cpu;
#endif

void product(talpa::context<talpa::cpu>& ctx, talpa::matrix_view<const float, other> a,
             talpa::matrix_view<const float, talpa::cpu> b,
             talpa::matrix_view<float, talpa::cpu> c) {
  talpa::ops::gemm(ctx, a, talpa::transpose::no, b, talpa::transpose::no, 0.0f, c);
}
