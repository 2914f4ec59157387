// SPDX-License-Identifier: Apache-2.0
// What cuda_kernels.sh looks at: the kernels of a training step, never run.
#include <talpa/cuda.cuh>

#include <utility>

namespace {

using talpa::gpu;

template <class Selector>
void fused(talpa::context<gpu>& ctx, const Selector& selector) {
  using S = talpa::bfloat16;
  const talpa::fused_mole_linear<Selector, S> layer{selector, {}, 8};
  talpa::generator random(1);
  talpa::matrix<S, gpu> base(64, 64), x(8, layer.padded_inputs(64)), y(8, 64),
      dy(8, layer.padded_outputs(64)), dx(8, 64);
  auto p = layer.init(ctx, std::as_const(base).view(), random);
  const auto kept = layer.forward(ctx, p, x.view(), y.view(), talpa::mode::training);
  layer.backward(ctx, p, kept, x.view(), dy.view(), dx.view(), talpa::grad_mode::overwrite,
                 talpa::mode::training);
}

void ffn(talpa::context<gpu>& ctx) {
  using S = talpa::bfloat16;
  const talpa::fused_moe_ffn<talpa::top_k<talpa::gate::renormalised>, S> layer{{2}, 64, 8};
  talpa::generator random(1);
  const talpa::matrix<S, gpu> bank(8 * 64, 64), x(8, 64);
  talpa::matrix<S, gpu> y(8, 64), dx(8, 64);
  auto p = layer.init(ctx, bank.view(), bank.view(), bank.view(), random);
  layer.train_experts(ctx, p);
  const auto kept = layer.forward(ctx, p, x.view(), y.view(), talpa::mode::training);
  layer.backward(ctx, p, kept, x.view(), x.view(), dx.view(), talpa::grad_mode::overwrite,
                 talpa::mode::training);
}

template <class Placement>
void perft(talpa::context<gpu>& ctx, const Placement& placement) {
  using S = talpa::bfloat16;
  using base_type = talpa::fused_moe_ffn<talpa::top_k<talpa::gate::renormalised>, S>;
  const talpa::fused_perft_block<base_type, Placement, talpa::parallel_adapter<>> layer{
      {{2}, 64, 8}, placement, {}, 8};
  talpa::generator random(1);
  const talpa::matrix<S, gpu> bank(8 * 64, 64), x(8, 64);
  talpa::matrix<S, gpu> y(8, 64), dx(8, 64);
  auto p =
      layer.init(ctx, layer.base.init(ctx, bank.view(), bank.view(), bank.view(), random), random);
  const auto kept = layer.forward(ctx, p, x.view(), y.view(), talpa::mode::training);
  layer.backward(ctx, p, kept, x.view(), x.view(), dx.view(), talpa::grad_mode::overwrite,
                 talpa::mode::training);
}

/// The routing of a forward that measures, whose registers are those of the selector and more.
template <class Selector>
void measured(talpa::context<gpu>& ctx, const Selector& selector) {
  const auto statistics = talpa::make_statistics<float>(ctx.memory, 8);
  talpa::ops::mole_route(ctx, selector, talpa::mole_rows<talpa::bfloat16, gpu>{},
                         statistics.wanted(talpa::grad_mode::overwrite));
}

/// Rows of W * 16 experts by a selector, which says how many registers it needs for them.
template <int W, class Selector>
void selected(talpa::context<gpu>& ctx, const Selector& selector) {
  const talpa::kernels::select_one_row<false, Selector, float, gpu> row{selector, {}, {},
                                                                        {},       {}, {}};
  const talpa::kernels::group_loop<W, 16, decltype(row)> loop{row, 8, W * 16};
  talpa::detail::launch<talpa::kernels::row_threads>(ctx, 1, 0, loop);
}

template <class T>
void grouped(talpa::context<gpu>& ctx) {
  using router = talpa::router<talpa::linear_scorer, talpa::top_p<talpa::gate::raw>>;
  const talpa::mole_linear<router, talpa::lora> layer{.experts = 8,
                                                      .execution = talpa::strategy::grouped};
  talpa::generator random(1);
  auto base = talpa::init_affine<T, gpu>(64, 64, true, false, random, "base.");
  base.freeze();
  auto p = layer.template init<T, gpu>(std::move(base), random);
  talpa::matrix<T, gpu> x(8, 64), y(8, 64), dx(8, 64), dvalue(1, 1);
  const auto kept = layer.forward(ctx, p, x, y.view(), talpa::mode::training);
  const talpa::load_balance<talpa::balance::per_selection, talpa::balance::per_layer> even;
  const auto loss = even.forward(ctx, kept.routed);
  talpa::routed_gradient<T, gpu> from_losses;
  from_losses.dlogits = dx.view().col_range(0, 8);
  from_losses.dgates = y.view().col_range(0, 8);
  even.backward(ctx, kept.routed, loss, dvalue, from_losses, talpa::grad_mode::overwrite);
  layer.backward(ctx, p, kept, x, y, dx.view(), talpa::grad_mode::overwrite, &from_losses);
  talpa::parameter_group<T, gpu> group;
  group.add(p.router).add(p.expert);
  talpa::adamw<T, gpu> optimiser({group});
  optimiser.step(ctx);
}

}  // namespace

int main() {
  talpa::context<gpu> ctx;
  fused(ctx, talpa::top_k<talpa::gate::renormalised>{2});
  fused(ctx, talpa::dynamic_entropy<>{});
  ffn(ctx);
  using router = talpa::router<talpa::linear_scorer, talpa::top_k<talpa::gate::renormalised>>;
  perft(ctx, talpa::placement::base_weighted<router>{{{}, {2}}});
  measured(ctx, talpa::dynamic_entropy<>{});
  selected<4>(ctx, talpa::dynamic_entropy<>{});
  selected<4>(ctx, talpa::top_k<talpa::gate::softmax_probability>{2});
  selected<8>(ctx, talpa::top_k<talpa::gate::renormalised>{8});
  selected<8>(ctx, talpa::straight_through{2});
  selected<8>(ctx, talpa::threshold<talpa::gate::renormalised>{});
  selected<8>(ctx, talpa::biased_top_k<talpa::score::sigmoid, talpa::gate::renormalised>{2});
  selected<8>(ctx, talpa::broadcast<talpa::top_k<talpa::gate::raw>>{{2}});
  grouped<float>(ctx);
}
