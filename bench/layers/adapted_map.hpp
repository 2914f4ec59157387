// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "workloads.hpp"

#include <talpa/talpa.hpp>

namespace talpa::bench {

/// A frozen, packed linear map D -> D, a layer that adapts it, and what both are run on.
template <class Layer>
struct adapted_map {
  adapted_map(context<cpu>& ctx_, const Layer& layer_, index tokens, index width, bool backward_,
              bool base_bias = false)
      : ctx(ctx_),
        layer(layer_),
        backward(backward_),
        random(1),
        params(layer.template init<float, cpu>(frozen(width, base_bias, random), random)),
        x(normal_matrix(tokens, width, 1.0, random)),
        dy(normal_matrix(tokens, width, 1.0, random)),
        y(tokens, width),
        dx(tokens, width) {
    fill_normal(params.expert.b.value(), 0.1, random);
    params.base.pack(ctx, backward ? packing::both : packing::forward);
  }

  void linear_pass() {
    affine_forward<cpu, float>(ctx, params.base, x, y);
    if (backward) affine_backward<cpu, float>(ctx, params.base, x, dy, dx, grad_mode::overwrite);
  }
  void layer_pass() {
    const workspace<cpu>::scope scope(ctx.memory);
    const auto saved = layer.forward(ctx, params, x, y, mode::training);
    if (backward) layer.backward(ctx, params, saved, x, dy, dx, grad_mode::overwrite);
  }

  context<cpu>& ctx;
  Layer layer;
  bool backward;
  generator random;
  typename Layer::template params<float, cpu> params;
  matrix<float, cpu> x, dy;  // [N, D]
  matrix<float, cpu> y, dx;  // [N, D]

 private:
  static affine_params<float, cpu> frozen(index width, bool bias, generator& random) {
    auto base = linear{.bias = bias}.init<float, cpu>(width, width, random, "base.");
    base.freeze();
    return base;
  }
};

}  // namespace talpa::bench
