// SPDX-License-Identifier: Apache-2.0
//
// The frozen linear map by OpenBLAS, beside the packed one; layers/frozen_linear.hpp says what is
// measured. Environment variables that choose its kernels are the caller's business:
// OPENBLAS_CORETYPE set to an older processor slows it.
#include "layers/frozen_linear.hpp"

#include <cblas.h>

namespace {

using namespace talpa;

const int registered = [] {
  bench::add_linear("openblas/frozen_linear",
                    [](benchmark::State& state, bench::linear_load& load) {
                      openblas_set_num_threads(load.ctx.threads);
                      const auto n = static_cast<blasint>(load.x.rows());
                      const auto d = static_cast<blasint>(load.x.cols());
                      const auto pass = [&load, n, d] {
                        cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, n, d, d, 1.0f,
                                    load.x.data(), d, load.w.data(), d, 0.0f, load.y.data(), d);
                      };
                      bench::time_linear(state, load, {load.with_packed(), {"openblas", pass}});
                      state.SetLabel(openblas_get_corename());
                      state.counters["openblas_threads"] = openblas_get_num_threads();
                    });
  return 0;
}();

}  // namespace
