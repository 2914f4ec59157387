// SPDX-License-Identifier: Apache-2.0
#include "cuda/laboratory/presets.cuh"
#include "cuda/work.cuh"

#include <cmath>

namespace talpa::bench {
namespace {

using S = bfloat16;
constexpr index tokens = 4096, width = 2048;

/// A preset of PERFT as a fused_perft_block, without its dropout, beside its frozen base.
template <class Block>
void measure_perft(laboratory& lab, const std::string& name, const Block& of,
                   const token_kind& kind) {
  context<gpu>& ctx = lab.ctx;
  using base_layer = fused_moe_ffn<top_k<gate::raw>, S>;
  auto adapter = of.adapter;
  adapter.dropout = 0.0;
  const index hidden = of.base.expert.hidden, experts = of.base.experts;
  const fused_perft_block<base_layer, decltype(of.placement), lora> layer{
      {of.base.router.selector, hidden, experts}, of.placement, adapter, of.adapters};
  generator random(1);
  const float inward = 1.0f / std::sqrt(static_cast<float>(width));
  const float outward = 1.0f / std::sqrt(static_cast<float>(hidden));
  const auto gate = normal_matrix<S>(ctx, experts * hidden, width, inward, 5);
  const auto up = normal_matrix<S>(ctx, experts * hidden, width, inward, 6);
  const auto down = normal_matrix<S>(ctx, experts * hidden, width, outward, 7);
  auto base = layer.base.init(ctx, gate.view(), up.view(), down.view(), random);
  base.freeze();
  auto params = layer.init(ctx, std::move(base), random);
  if (kind.skew != 0) {
    add_mean_logits(params.base.router, mean_logits(experts, kind, random));
    if (params.router.exists()) {
      add_mean_logits(params.router, mean_logits(of.adapters, kind, random));
    }
    layer.refresh(ctx, params);
  }
  const auto x = device_tokens<S>(ctx, tokens, width, kind);
  const auto dy = device_tokens<S>(ctx, tokens, width, {});
  matrix<S, gpu> y(tokens, width), dx(tokens, width);
  const workspace<gpu>::scope scope(ctx.memory);
  constexpr bool routes = decltype(layer)::routes;
  const auto load = make_statistics<float>(ctx.memory, routes ? of.adapters : experts);
  const auto step = [&](const auto& one, auto& with) {
    const workspace<gpu>::scope in_step(ctx.memory);
    const auto kept = one.forward(ctx, with, x.view(), y.view(), mode::training);
    one.backward(ctx, with, kept, x.view(), dy.view(), dx.view(), grad_mode::overwrite,
                 mode::training);
  };
  const auto look = [&] {
    const workspace<gpu>::scope in_step(ctx.memory);
    const auto kept = layer.forward(ctx, params, x.view(), y.view(), mode::training);
    measure(ctx, routes ? kept.routed : kept.base.routed, load, grad_mode::overwrite);
  };
  preset_line(lab, name, tokens,
              {[&] { step(layer, params); }, [&] { step(layer.base, params.base); }, look, load});
}

template <class Block>
void perft_lines(laboratory& lab, const std::string& name, const Block& of) {
  const std::string sizes =
      network_sizes(of.base.expert.hidden, of.base.experts, of.adapters, of.adapter.rank);
  for (const token_kind& kind : token_kinds) {
    const std::string full =
        preset_name(name, "fused_step", tokens, width, sizes, kind) + "/bf16/gpu";
    if (lab.wants(full)) lab.attempt(full, [&] { measure_perft(lab, full, of, kind); });
  }
}

}  // namespace

void fused_network_preset_lines(laboratory& lab) {
  perft_lines(lab, "perft_r", presets::perft_r);
  perft_lines(lab, "perft_e", presets::perft_e);
  perft_lines(lab, "perft_d", presets::perft_d);
  perft_lines(lab, "perft_s", presets::perft_s);
}

}  // namespace talpa::bench
