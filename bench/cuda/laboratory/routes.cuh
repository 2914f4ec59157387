// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cuda/laboratory/laboratory.cuh"
#include "selectors/measured_selectors.hpp"

#include <talpa/core/matrix.hpp>
#include <talpa/cuda/route.hpp>
#include <talpa/ops/segments.hpp>

#include <cstdint>
#include <functional>
#include <string>

namespace talpa::bench {

/// What is routed, and where it goes.
struct device_routing {
  matrix<float, gpu> logits;   // [N, E]
  matrix<float, gpu> control;  // [N, 1]
  matrix<float, gpu> bias;     // [1, E]
  index sequence_length;
  matrix<float, gpu> gates;         // [N, E]
  matrix<std::uint32_t, gpu> mask;  // [N, ceil(E / 32)]
  routing_statistics<float, gpu> statistics;
  segments<gpu> slots;
  vector_view<float, gpu> gate_of_slot;  // [N E]
};
using route_step = std::function<void(context<gpu>&, device_routing&)>;

/// From logits to gates, mask and statistics.
template <class Selector>
void route(context<gpu>& ctx, const Selector& selector, device_routing& at) {
  const select_inputs<float, gpu> more{at.control.view(), at.bias.view(), at.sequence_length};
  ops::route(ctx, selector, at.logits.view(), {}, at.gates.view(), at.mask.view(),
             at.statistics.wanted(grad_mode::overwrite), more);
}

/// The lines of a selector; `make(experts, k)` gives its step.
void route_lines(laboratory& lab, const std::string& name, const route_sizes& sizes,
                 const std::function<route_step(index, index)>& make);

template <class... Measured>
void route_lines(laboratory& lab, selector_list<Measured...>) {
  const auto lines = [&]<class M>(M) {
    route_lines(lab, M::name, M::sizes(), [](index experts, index k) -> route_step {
      return [selector = M::make(experts, k)](context<gpu>& ctx, device_routing& at) {
        route(ctx, selector, at);
      };
    });
  };
  (lines(Measured{}), ...);
}

}  // namespace talpa::bench
