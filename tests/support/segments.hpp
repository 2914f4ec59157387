// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "support/routed.hpp"

#include <talpa/cpu/segments.hpp>

namespace talpa::support {

/// The slots of a layer's routing, with places for `extra` more than there are.
template <class T>
segments<cpu> segments_of(context<cpu>& ctx, const routed_layer<T>& layer, index extra = 0) {
  const index count = ops::count_slots(ctx, layer.mask, layer.experts()) + extra;
  const segments<cpu> s = make_segments(ctx.memory, layer.tokens(), layer.experts(), count);
  ops::build_segments(ctx, layer.mask, layer.gates, s, ctx.memory.take<T>(count));
  return s;
}

}  // namespace talpa::support
