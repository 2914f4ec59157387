// SPDX-License-Identifier: Apache-2.0
//
// W packed once, as floats and as bfloat16, ops::gemm and Eigen's product, which is timed on one
// thread only: from two on it opens regions of its own. frozen_linear.hpp says what is measured.
#include "layers/frozen_linear.hpp"

namespace {

using namespace talpa;

const int registered = [] {
  bench::add_linear("layers/frozen_linear", [](benchmark::State& state, bench::linear_load& load) {
    std::vector<bench::linear_form> forms{load.with_packed()};
    const packed_matrix<float, cpu> rounded(load.ctx, load.w, transpose::yes,
                                            weight_storage::bfloat16);
    forms.push_back({"bfloat16", [&] {
                       ops::gemm(load.ctx, load.x, transpose::no, rounded, 0.0f, load.y.view());
                     }});
    forms.push_back({"gemm", [&] {
                       ops::gemm(load.ctx, load.x, transpose::no, load.w, transpose::yes, 0.0f,
                                 load.y.view());
                     }});
    if (load.ctx.threads == 1) {
      forms.push_back({"eigen", [&] {
                         detail::eigen_product<float>(1.0f, load.x.view(), transpose::no,
                                                      load.w.view(), transpose::yes, 0.0f,
                                                      load.y.view());
                       }});
    }
    bench::time_linear(state, load, forms);
  });
  return 0;
}();

}  // namespace
