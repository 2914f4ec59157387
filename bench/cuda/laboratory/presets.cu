// SPDX-License-Identifier: Apache-2.0
#include "cuda/laboratory/presets.cuh"
#include "cuda/work.cuh"

#include <string>
#include <vector>

namespace talpa::bench {

template <class S>
matrix<S, gpu> device_tokens(context<gpu>& ctx, index tokens, index width, const token_kind& kind) {
  auto x = normal_matrix<S>(ctx, tokens, width, static_cast<float>(kind.deviation), 3);
  if (kind.skew == 0) return x;
  const matrix_view<S, gpu> first = x.view();
  kernels::for_each_element(
      ctx, tokens, 1, [=] TALPA_DEVICE(index n, index) { first(n, 0) = static_cast<S>(1.0f); });
  ctx.synchronise();
  return x;
}
template matrix<float, gpu> device_tokens(context<gpu>&, index, index, const token_kind&);
template matrix<bfloat16, gpu> device_tokens(context<gpu>&, index, index, const token_kind&);

void preset_line(laboratory& lab, const std::string& name, index tokens,
                 const preset_steps& steps) {
  context<gpu>& ctx = lab.ctx;
  steps.measure();
  ctx.synchronise();
  const statistics_report load(steps.load);
  step_graph layer(ctx, steps.layer), beside(ctx, steps.beside);
  const std::vector<double> us = microseconds(ctx, {&layer, &beside}, short_turns);
  const double n = static_cast<double>(tokens);
  report::counters counters{{"overhead_pct", 100.0 * (us[0] / us[1] - 1.0)},
                            {"ns/token", 1e3 * us[0] / n},
                            {"tokens/s", 1e6 * n / us[0]}};
  append_load(counters, load);
  lab.out.line(name, us[0], counters);
  // Arenas never shrink, and what layers of all kinds would leave in them adds up.
  ctx.memory = {};
  ctx.scratch = {};
}

}  // namespace talpa::bench
