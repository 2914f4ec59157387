// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "tasks.hpp"

#include <talpa/talpa.hpp>

#include <array>
#include <cstdint>
#include <string>
#include <type_traits>
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
template <class Layer, backend B = cpu>
struct network {
  using params_type = typename Layer::template params<float, B>;

  Layer layer{};                            // the same numbers at every depth
  std::array<params_type, depth> params{};  // [O, D] each, and what the layer adds

  template <class F>
  void visit(F f) {
    for (params_type& p : params) p.visit(f);
  }
};

using base_network = network<linear>;

template <backend B = cpu>
network<linear, B> make_base(generator& random) {
  network<linear, B> net;
  for (std::size_t l = 0; l < depth; ++l) {
    net.params[l] = net.layer.template init<float, B>(widths[l], widths[l + 1], random,
                                                      std::string(layer_names[l]) + ".");
  }
  return net;
}

/// The values of a parameter in one of its own.
template <backend B>
parameter<float, B> copy_of(const parameter<float, B>& p) {
  return {p.name(), to_device<B>(to_host(p.value()).view())};
}

/// A copy of `base`, frozen, with an adapter on each of its layers.
template <class Layer, backend B>
network<Layer, B> adapt(const network<linear, B>& base, const Layer& layer, generator& random) {
  network<Layer, B> net;
  net.layer = layer;
  for (std::size_t l = 0; l < depth; ++l) {
    affine_params<float, B> frozen;
    frozen.weight = copy_of(base.params[l].weight);
    if (base.params[l].bias.exists()) frozen.bias = copy_of(base.params[l].bias);
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

template <class Layer, backend B>
trainable_counts count_trainable(network<Layer, B>& net) {
  trainable_counts count;
  net.visit([&](const parameter<float, B>& p) { count.adapters += p.trained_size(); });
  if constexpr (has_router<Layer>) {
    for (auto& p : net.params) {
      p.router.visit([&](const parameter<float, B>& w) { count.routers += w.trained_size(); });
    }
  }
  count.adapters -= count.routers;
  return count;
}

/// Questions as the network reads them, where it runs.
template <backend B = cpu>
class question_batch {
 public:
  template <class Examples>
  question_batch(const digits& data, const Examples& asked) {
    const auto size = static_cast<index>(std::size(asked));
    matrix<float, cpu> x(size, input_width);
    matrix<std::int32_t, cpu> answers(size, 1);
    for (index i = 0; i < size; ++i) {
      const example e = asked[static_cast<std::size_t>(i)];
      write_input(data, e, x.data() + i * input_width);
      answers(i, 0) = answer_of(data, e);
    }
    x_ = to_device<B>(x.view());
    answers_ = to_device<B>(answers.view());
  }

  matrix_view<const float, B> x() const { return x_.view(); }  // [N, input_width]
  vector_view<const std::int32_t, B> answers() const { return {answers_.data(), answers_.rows()}; }

 private:
  matrix<float, B> x_;
  matrix<std::int32_t, B> answers_;  // [N, 1]
};

/// What a forward leaves on the tape.
template <backend B>
struct recorded_forward {
  variable<float, B> logits;                        // [N, class_count]
  std::vector<routed_variable<float, B>> routed{};  // one a layer with a router
};

/// Runs the network on a tape; training and evaluation take this same path.
template <class Layer, backend B>
recorded_forward<B> forward(tape<float, B>& t, network<Layer, B>& net,
                            std::type_identity_t<matrix_view<const float, B>> x, mode m) {
  recorded_forward<B> result;
  variable<float, B> h = t.constant(x);
  for (std::size_t l = 0; l < depth; ++l) {
    const auto applied = t.apply(net.layer, net.params[l], h, m);
    if constexpr (has_router<Layer>) result.routed.push_back(applied.routed);
    h = l + 1 < depth ? t.activation(relu{}, applied.y) : applied.y;
  }
  result.logits = h;
  return result;
}

}  // namespace talpa::examples
