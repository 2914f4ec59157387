// SPDX-License-Identifier: Apache-2.0
//
// The frozen linear map by oneDNN, with W in the layout that it chooses for this product, packed
// once as talpa's is, beside the latter; layers/frozen_linear.hpp says what is measured.
#include "layers/frozen_linear.hpp"

#include <oneapi/dnnl/dnnl.hpp>

#include <omp.h>

namespace {

using namespace talpa;

/// Its threads are those that OpenMP has; what was there comes back.
class omp_threads {
 public:
  explicit omp_threads(int count) : before_(omp_get_max_threads()) { omp_set_num_threads(count); }
  omp_threads(const omp_threads&) = delete;
  omp_threads& operator=(const omp_threads&) = delete;
  ~omp_threads() { omp_set_num_threads(before_); }

 private:
  int before_;
};

void run(benchmark::State& state, bench::linear_load& load) {
  using memory = dnnl::memory;
  const omp_threads threads(load.ctx.threads);
  const memory::dim n = load.x.rows(), d = load.x.cols();
  dnnl::engine engine(dnnl::engine::kind::cpu, 0);
  dnnl::stream stream(engine);
  const auto row_major = memory::format_tag::ab;
  const memory::desc x_desc({n, d}, memory::data_type::f32, row_major);
  const memory::desc any({d, d}, memory::data_type::f32, memory::format_tag::any);
  const memory::desc wt_desc({d, d}, memory::data_type::f32, memory::format_tag::ba);  // W^T
  const dnnl::matmul::primitive_desc product(dnnl::matmul::desc(x_desc, any, x_desc), engine);
  memory x(x_desc, engine, load.x.data()), y(x_desc, engine, load.y.data());
  memory wt(wt_desc, engine, load.w.data()), w(product.weights_desc(), engine);
  dnnl::reorder(wt, w).execute(stream, wt, w);
  stream.wait();
  const dnnl::matmul matmul(product);
  const auto pass = [&] {
    matmul.execute(stream, {{DNNL_ARG_SRC, x}, {DNNL_ARG_WEIGHTS, w}, {DNNL_ARG_DST, y}});
    stream.wait();
  };
  bench::time_linear(state, load, {load.with_packed(), {"onednn", pass}});
  state.SetLabel(product.impl_info_str());
  state.counters["onednn_threads"] = omp_get_max_threads();
}

const int registered = (bench::add_linear("onednn/frozen_linear", run), 0);

}  // namespace
