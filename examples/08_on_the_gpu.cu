// SPDX-License-Identifier: Apache-2.0
// Why: a whole training step of a MoLE layer on a CUDA device, captured once in a graph and
// replayed: nothing waits, nothing is allocated, and the router decides anew in each replay.
//
// How: the target is the frozen map and one more low-rank map for each half of the tokens. The
// layer keeps its weights in bfloat16 and trains float masters of A, B and the router with AdamW.
//
// To try: dynamic_entropy for top_k, float16 for bfloat16, more experts: the time stays the same.

#include <talpa/cuda.cuh>

#include <cstdio>
#include <utility>

namespace {

using talpa::gpu;
using storage = talpa::bfloat16;
using layer_type = talpa::fused_mole_linear<talpa::top_k<talpa::gate::renormalised>, storage>;

constexpr talpa::index tokens = 2048, inputs = 256, outputs = 256;
constexpr int replays = 300;

talpa::matrix<storage, gpu> normal_matrix(talpa::context<gpu>& ctx, talpa::index rows,
                                          talpa::index cols, double deviation,
                                          talpa::generator& random) {
  talpa::matrix<float, gpu> exact(rows, cols);
  talpa::fill_normal(exact.view(), deviation, random);
  talpa::matrix<storage, gpu> m(rows, cols);
  talpa::ops::convert(ctx, std::as_const(exact).view(), m.view());
  ctx.synchronise();
  return m;
}

/// dy = y - target, the gradient of |y - target|^2 / 2, into the first columns of dy.
void difference(talpa::context<gpu>& ctx, const talpa::matrix<storage, gpu>& y,
                const talpa::matrix<storage, gpu>& target, talpa::matrix_view<storage, gpu> dy) {
  const talpa::matrix_view<const storage, gpu> found = y.view(), wanted = target.view();
  talpa::kernels::for_each_element(
      ctx, tokens, outputs, [=] TALPA_DEVICE(talpa::index n, talpa::index o) {
        dy(n, o) = static_cast<storage>((float(found(n, o)) - float(wanted(n, o))) / tokens);
      });
}

double mean_square(const talpa::matrix<storage, gpu>& a, const talpa::matrix<storage, gpu>& b) {
  const auto x = talpa::to_host(a.view()), y = talpa::to_host(b.view());
  double sum = 0.0;
  for (talpa::index i = 0; i < x.size(); ++i) {
    const double d = double(float(x.data()[i])) - double(float(y.data()[i]));
    sum += d * d;
  }
  return sum / static_cast<double>(x.size());
}

void train() {
  // [region start]
  talpa::context<gpu> ctx;
  talpa::generator random(1);
  const layer_type layer{.selector = {.k = 2}, .expert = {.rank = 8}, .experts = 4};
  const auto base = normal_matrix(ctx, outputs, inputs, 1.0 / 16, random);
  auto params = layer.init(ctx, base.view(), random);
  // [end start]

  // Tokens lie in rows with room behind them, and so do the gradients of y.
  const auto compact = normal_matrix(ctx, tokens, inputs, 1.0, random);
  talpa::matrix<storage, gpu> x(tokens, layer.padded_inputs(inputs)), y(tokens, outputs),
      dy(tokens, layer.padded_outputs(outputs)), dx(tokens, inputs), target(tokens, outputs);
  talpa::ops::convert(ctx, compact.view(), x.view().col_range(0, inputs));
  const auto rank_one = normal_matrix(ctx, outputs, inputs, 1.0 / 32, random);
  for (const talpa::index half : {0, 1}) {
    const auto rows = compact.view().row_range(half * tokens / 2, tokens / 2);
    const auto to = target.view().row_range(half * tokens / 2, tokens / 2);
    talpa::ops::mixed_gemm(ctx, 1.0F, rows, talpa::transpose::no, base.view(),
                           talpa::transpose::yes, 0.0F, to);
    talpa::ops::mixed_gemm(ctx, half == 0 ? 1.0F : -1.0F, rows.col_range(0, 8),
                           talpa::transpose::no, rank_one.view().col_range(0, 8),
                           talpa::transpose::yes, 1.0F, to);
  }

  talpa::parameter_group<float, gpu> group{.learning_rate = 3e-3};
  group.add(params);
  talpa::adamw<float, gpu> optimiser({group});
  const auto step = [&] {
    const talpa::workspace<gpu>::scope scope(ctx.memory);
    const auto kept = layer.forward(ctx, params, x.view(), y.view(), talpa::mode::training);
    difference(ctx, y, target, dy.view());
    layer.backward(ctx, params, kept, x.view(), dy.view(), dx.view(), talpa::grad_mode::ignore,
                   talpa::mode::training);
    optimiser.step(ctx);
    optimiser.zero_grad(ctx);
    layer.refresh(ctx, params);
  };
  step();  // settles memory and the algorithms of products
  ctx.synchronise();
  std::printf("mean square of the error: %.5f before", mean_square(y, target));

  // [region capture]
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t whole_step = nullptr;
  cudaStreamBeginCapture(ctx.stream, cudaStreamCaptureModeGlobal);
  step();
  cudaStreamEndCapture(ctx.stream, &graph);
  cudaGraphInstantiate(&whole_step, graph, 0);
  for (int i = 0; i < replays; ++i) cudaGraphLaunch(whole_step, ctx.stream);
  ctx.synchronise();
  // [end capture]
  cudaGraphExecDestroy(whole_step);
  cudaGraphDestroy(graph);
  std::printf(", %.5f after %d replays of one captured step\n", mean_square(y, target), replays);
}

}  // namespace

int main() {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::puts("No CUDA device answers: there is nothing to run this on.");
    return 77;
  }
  try {
    train();
  } catch (const talpa::error& e) {
    std::fprintf(stderr, "%s\n", e.what());
    return 1;
  }
}
