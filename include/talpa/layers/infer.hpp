// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/mode.hpp>
#include <talpa/core/workspace.hpp>

namespace talpa {

/// Writes y as layer.forward in mode::inference and keeps nothing; arguments are those of forward
/// but the mode, the batch may be left out.
///
/// What forward saves is there until this returns, so the peak of memory is that of a forward in
/// training without dropout. Shapes, cost, determinism, errors: those of the layer's forward.
template <class B, class Layer, class Params, class X, class Y, class... Batch>
void infer(context<B>& ctx, const Layer& layer, const Params& p, const X& x, Y&& y,
           const Batch&... batch) {
  static_assert(sizeof...(Batch) <= 1, "talpa: infer takes at most one batch_info behind y");
  const typename workspace<B>::scope scope(ctx.memory);
  layer.forward(ctx, p, x, y, mode::inference, batch...);
}

}  // namespace talpa
