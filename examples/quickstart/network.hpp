// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "tasks.hpp"

#include <talpa/talpa.hpp>

#include <array>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace talpa::examples {

inline constexpr index hidden_width = 64;
inline constexpr std::size_t depth = 3;
inline constexpr std::array<const char*, depth> layer_names{"hidden 1", "hidden 2", "head"};
inline constexpr std::array<index, depth + 1> widths{input_width, hidden_width, hidden_width,
                                                     class_count};

/// Three layers of one kind with ReLU between them. The base and its adapted forms differ in the
/// kind of layer only: linear, lora_linear, mole_linear.
template <class Layer>
struct network {
  using params_type = typename Layer::template params<float, cpu>;

  Layer layer{};                            // the same numbers at every depth
  std::array<params_type, depth> params{};  // [O, D] each, and what the layer adds

  template <class F>
  void visit(F f) {
    for (params_type& p : params) p.visit(f);
  }
};

using base_network = network<linear>;

inline base_network make_base(generator& random) {
  base_network net;
  for (std::size_t l = 0; l < depth; ++l) {
    net.params[l] = net.layer.init<float, cpu>(widths[l], widths[l + 1], random,
                                               std::string(layer_names[l]) + ".");
  }
  return net;
}

/// A copy of `base`, frozen, with an adapter on each of its layers.
template <class Layer>
network<Layer> adapt(const base_network& base, const Layer& layer, generator& random) {
  network<Layer> net;
  net.layer = layer;
  for (std::size_t l = 0; l < depth; ++l) {
    affine_params<float, cpu> frozen = base.params[l];
    frozen.freeze();
    net.params[l] = layer.init(std::move(frozen), random, std::string(layer_names[l]) + ".");
  }
  return net;
}

/// Whether a layer has a router, whose routing can be looked at.
template <class Layer>
inline constexpr bool has_router =
    requires(const typename Layer::template saved<float, cpu>& saved) {
  saved.routed;
};

/// Weights that train: those of adapters and those of routers.
struct trainable_counts {
  index adapters = 0;
  index routers = 0;
};

template <class Layer>
trainable_counts count_trainable(network<Layer>& net) {
  trainable_counts count;
  net.visit([&](const parameter<float, cpu>& p) { count.adapters += p.trained_size(); });
  if constexpr (has_router<Layer>) {
    for (auto& p : net.params) {
      p.router.visit([&](const parameter<float, cpu>& w) { count.routers += w.trained_size(); });
    }
  }
  count.adapters -= count.routers;
  return count;
}

/// Questions as the network reads them.
struct question_batch {
  matrix<float, cpu> x;               // [N, input_width]
  vector<std::int32_t, cpu> answers;  // [N]

  explicit question_batch(index size) : x(size, input_width), answers(size) {}

  void set(index row, const digits& data, example e) {
    write_input(data, e, x.data() + row * input_width);
    answers[row] = answer_of(data, e);
  }
};

/// What a forward leaves on the tape.
struct recorded_forward {
  variable<float, cpu> logits;                        // [N, class_count]
  std::vector<routed_variable<float, cpu>> routed{};  // one a layer with a router
};

/// Runs the network on a tape; training and evaluation take this same path.
template <class Layer>
recorded_forward forward(tape<float, cpu>& t, network<Layer>& net, matrix_view<const float, cpu> x,
                         mode m) {
  recorded_forward result;
  variable<float, cpu> h = t.constant(x);
  for (std::size_t l = 0; l < depth; ++l) {
    const auto applied = t.apply(net.layer, net.params[l], h, m);
    if constexpr (has_router<Layer>) result.routed.push_back(applied.routed);
    h = l + 1 < depth ? t.activation(relu{}, applied.y) : applied.y;
  }
  result.logits = h;
  return result;
}

}  // namespace talpa::examples
