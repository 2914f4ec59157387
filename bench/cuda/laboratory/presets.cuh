// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cuda/laboratory/laboratory.cuh"
#include "presets/measured_presets.hpp"

#include <talpa/cuda.cuh>

#include <functional>
#include <string>
#include <utility>

namespace talpa::bench {

/// The sizes of networks: neurons of one, experts, adapters and their ranks where there are some.
inline std::string network_sizes(index hidden, index experts, index adapters, index rank) {
  return "/H:" + std::to_string(hidden) + "/E:" + std::to_string(experts) +
         (adapters > 0 ? "/M:" + std::to_string(adapters) : std::string()) +
         (rank > 0 ? "/R:" + std::to_string(rank) : std::string());
}

/// A layer and what it adapts, forward and backward.
struct preset_steps {
  std::function<void()> layer;
  std::function<void()> beside;   ///< what it adapts alone, frozen
  std::function<void()> measure;  ///< a forward that leaves the load in `load`
  routing_statistics<float, gpu> load;
};
/// The line of a layer.
void preset_line(laboratory& lab, const std::string& name, index tokens, const preset_steps& steps);

/// Tokens [N, D] of a kind.
template <class S>
matrix<S, gpu> device_tokens(context<gpu>& ctx, index tokens, index width, const token_kind& kind);

/// The line of a layer in float, of which `routed` experts or adapters are chosen from, over
/// `frozen`, what it adapts.
template <class Layer, class Params, class Frozen, class FrozenParams>
void measure_step(laboratory& lab, const std::string& name, const Layer& layer, Params& params,
                  index routed, const Frozen& frozen, FrozenParams& frozen_params, index tokens,
                  index width, const token_kind& kind) {
  context<gpu>& ctx = lab.ctx;
  generator noise(2);
  const auto x = device_tokens<float>(ctx, tokens, width, kind);
  const auto dy = device_tokens<float>(ctx, tokens, width, {});
  matrix<float, gpu> y(tokens, width), dx(tokens, width);
  const workspace<gpu>::scope scope(ctx.memory);
  const auto load = make_statistics<float>(ctx.memory, routed);
  const batch_info<float, gpu> batch{.random = &noise};
  const auto step = [&](const auto& of, auto& with) {
    const workspace<gpu>::scope in_step(ctx.memory);
    const auto kept = of.forward(ctx, with, x.view(), y.view(), mode::training, batch);
    of.backward(ctx, with, kept, x.view(), dy.view(), dx.view(), grad_mode::overwrite);
  };
  const auto look = [&] {
    const workspace<gpu>::scope in_step(ctx.memory);
    const auto kept = layer.forward(ctx, params, x.view(), y.view(), mode::training, batch);
    measure(ctx, routing_of(kept), load, grad_mode::overwrite);
  };
  preset_line(lab, name, tokens,
              {[&] { step(layer, params); }, [&] { step(frozen, frozen_params); }, look, load});
}

template <class Layer>
void measure_layer(laboratory& lab, const std::string& name, const Layer& layer, index tokens,
                   index width, const token_kind& kind) {
  generator random(1);
  const linear map{.bias = false};
  auto base = map.init<float, gpu>(width, width, random, "base.");
  base.freeze();
  auto params = layer.template init<float, gpu>(std::move(base), random);
  if (kind.skew != 0) {
    add_mean_logits(params.router.scorer, mean_logits(layer.experts, kind, random));
  }
  measure_step(lab, name, layer, params, layer.experts, map, params.base, tokens, width, kind);
}

/// A mole_linear in half storage, rows with room, without its dropout.
template <class Selector>
void measure_fused(laboratory& lab, const std::string& name,
                   const mole_linear<router<linear_scorer, Selector>, lora>& of, index tokens,
                   index width, const token_kind& kind) {
  using S = bfloat16;
  context<gpu>& ctx = lab.ctx;
  const fused_mole_linear<Selector, S> layer{
      of.router.selector, {.rank = of.expert.rank, .alpha = of.expert.alpha}, of.experts};
  generator random(1);
  const auto base = linear{.bias = false}.init<float, gpu>(width, width, random, "base.");
  matrix<S, gpu> weight(width, width);
  ops::convert(ctx, base.weight.value(), weight.view());
  auto params = layer.init(ctx, std::as_const(weight).view(), random);
  if (kind.skew != 0) {
    add_mean_logits(params.router, mean_logits(layer.experts, kind, random));
    layer.refresh(ctx, params);
  }
  auto x = device_tokens<S>(ctx, tokens, layer.padded_inputs(width), kind);
  auto dy = device_tokens<S>(ctx, tokens, layer.padded_outputs(width), {});
  matrix<S, gpu> x_close(tokens, width), dy_close(tokens, width), y(tokens, width),
      dx(tokens, width);
  ops::convert(ctx, std::as_const(x).view().col_range(0, width), x_close.view());
  ops::convert(ctx, std::as_const(dy).view().col_range(0, width), dy_close.view());
  const workspace<gpu>::scope scope(ctx.memory);
  const auto load = make_statistics<float>(ctx.memory, layer.experts);
  const auto forward = [&] {
    return layer.forward(ctx, params, x.view(), y.view(), mode::training);
  };
  const auto step = [&] {
    const workspace<gpu>::scope in_step(ctx.memory);
    const auto kept = forward();
    layer.backward(ctx, params, kept, x.view(), dy.view(), dx.view(), grad_mode::overwrite,
                   mode::training);
  };
  const auto linear_step = [&] {
    ops::mixed_gemm(ctx, 1.0f, std::as_const(x_close).view(), transpose::no,
                    std::as_const(weight).view(), transpose::yes, 0.0f, y.view());
    ops::mixed_gemm(ctx, 1.0f, std::as_const(dy_close).view(), transpose::no,
                    std::as_const(weight).view(), transpose::no, 0.0f, dx.view());
  };
  const auto look = [&] {
    const workspace<gpu>::scope in_step(ctx.memory);
    measure(ctx, forward().routed, load, grad_mode::overwrite);
  };
  preset_line(lab, name, tokens, {step, linear_step, look, load});
}

/// measure(name, layer, tokens, width, kind) for each size of each preset; `form` as preset_name
/// has it, `storage` the end of names.
template <class... Measured, class Measure>
void preset_lines(laboratory& lab, preset_list<Measured...>, const char* form, const char* storage,
                  const Measure& measure) {
  const auto lines = [&]<class M>(M) {
    for (const index width : {768, 2048}) {
      const auto layer = M::layer(width);
      for (const index tokens : {4096, 16384}) {
        for (const token_kind& kind : token_kinds) {
          const std::string name =
              preset_name(M::name, form, tokens, width, ranked_sizes(layer), kind) + "/" + storage +
              "/gpu";
          if (!lab.wants(name)) continue;
          lab.attempt(name, [&] { measure(name, layer, tokens, width, kind); });
        }
      }
    }
  };
  (lines(Measured{}), ...);
}
template <class... Measured>
void layer_lines(laboratory& lab, preset_list<Measured...> presets) {
  preset_lines(lab, presets, "step", "f32", [&](const auto&... of) { measure_layer(lab, of...); });
}
template <class... Measured>
void fused_lines(laboratory& lab, preset_list<Measured...> presets) {
  preset_lines(lab, presets, "fused_step", "bf16",
               [&](const auto&... of) { measure_fused(lab, of...); });
}

}  // namespace talpa::bench
