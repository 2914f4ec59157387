// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "support/parity.hpp"
#include "support/routed.hpp"

#include <algorithm>
#include <cmath>
#include <concepts>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

// Losses of a device beside those of the host.

namespace talpa::support {

using loss_layer = routed_layer<float>;

/// A routing with everything that a loss may read: padding, sequences of 3 tokens with labels, a
/// control, noise that is zero for some experts. Of many experts most get no token.
inline loss_layer make_loss_layer(test_random& random, index tokens, index experts) {
  loss_layer layer = random_layer<float>(random, tokens, experts, std::min<index>(experts, 2), 5);
  layer.sequence_length = tokens > 0 ? 3 : 0;
  layer.control = random_matrix<float>(random, tokens, 1);
  layer.labels = vector<std::int32_t, cpu>(tokens / 3);
  for (index s = 0; s < layer.labels.size(); ++s)
    layer.labels[s] = static_cast<std::int32_t>(s % 2);
  layer.clean = random_matrix<float>(random, tokens, experts);
  layer.deviation = random_matrix<float>(random, tokens, experts);
  for (index i = 0; i < layer.deviation.size(); ++i) {
    const float d = std::abs(layer.deviation.data()[i]);
    layer.deviation.data()[i] = i % 11 == 0 ? 0.0F : d;
    layer.clean.data()[i] = layer.logits.data()[i] - d;
  }
  return layer;
}

/// A layer of the host on B, and room for its gradients, filled with one.
template <class B>
struct loss_layer_on {
  explicit loss_layer_on(const loss_layer& from)
      : logits(to_device<B>(from.logits.view())),
        gates(to_device<B>(from.gates.view())),
        control(to_device<B>(from.control.view())),
        clean(to_device<B>(from.clean.view())),
        deviation(to_device<B>(from.deviation.view())),
        mask(to_device<B>(from.mask.view())),
        padding(to_device<B>(as_column(from.padding.view()))),
        labels(to_device<B>(as_column(from.labels.view()))),
        sequence_length(from.sequence_length) {
    const auto like = [](const matrix<float, B>& m) {
      matrix<float, cpu> ones(m.rows(), m.cols());
      std::fill_n(ones.data(), ones.size(), 1.0F);
      return to_device<B>(ones.view());
    };
    for (auto* const m : {&logits, &gates, &control, &clean, &deviation}) {
      gradients.push_back(like(*m));
    }
  }
  routed_view<float, B> view() const {
    return {logits.view(),
            {gates.view(), mask.view()},
            {padding.data(), padding.rows()},
            sequence_length,
            control.view(),
            {labels.data(), labels.rows()},
            {clean.view(), deviation.view()}};
  }
  routed_gradient<float, B> gradient() {
    return {gradients[0].view(),
            gradients[1].view(),
            gradients[2].view(),
            {gradients[3].view(), gradients[4].view()}};
  }
  matrix<float, B> logits, gates, control, clean, deviation;
  matrix<std::uint32_t, B> mask;
  matrix<std::uint8_t, B> padding;
  matrix<std::int32_t, B> labels;
  index sequence_length;
  std::vector<matrix<float, B>> gradients;
};

/// Value and gradients of a loss of `layers` on B, on the host.
template <class B, class Loss>
std::vector<matrix<float, cpu>> run_loss(context<B>& ctx, const Loss& loss,
                                         const std::vector<loss_layer>& layers, grad_mode mode) {
  std::vector<loss_layer_on<B>> there;
  std::vector<routed_view<float, B>> views;
  std::vector<routed_gradient<float, B>> gradients;
  there.reserve(layers.size());
  for (const loss_layer& layer : layers) {
    there.emplace_back(layer);
    views.push_back(there.back().view());
    gradients.push_back(there.back().gradient());
  }
  matrix<float, cpu> half(1, 1);
  half(0, 0) = 0.5F;
  const auto dvalue = to_device<B>(half.view());
  const typename workspace<B>::scope scope(ctx.memory);
  const auto kept = loss.forward(ctx, std::span<const routed_view<float, B>>(views));
  loss.backward(ctx, views, kept, dvalue, gradients, mode);
  if constexpr (!std::same_as<B, cpu>) ctx.synchronise();
  std::vector<matrix<float, cpu>> out;
  out.push_back(to_host(matrix_view<const float, B>(kept.value)));
  for (const loss_layer_on<B>& layer : there) {
    for (const auto& gradient : layer.gradients) out.push_back(to_host(gradient.view()));
  }
  return out;
}

/// Empty when two runs have the same bits, and gradients that are not all equal.
inline std::string loss_difference(const std::vector<matrix<float, cpu>>& found,
                                   const std::vector<matrix<float, cpu>>& expected, bool trivial) {
  std::string text;
  for (std::size_t i = 0; i < expected.size(); ++i) {
    text += bit_difference(found[i], expected[i]);
    for (index j = 1; i > 0 && j < expected[i].size(); ++j) {
      trivial = trivial || expected[i].data()[j] != expected[i].data()[0];
    }
  }
  return trivial ? text : text + "all gradients are equal and prove nothing";
}

/// Two layers, more experts than a word of a mask holds, one expert where the loss knows what to do
/// then, no tokens.
template <class Loss>
std::string loss_difference(const Loss& loss, bool one_expert = true) {
  test_random random(31);
  const index few = device_size(24, 1200);
  context<cpu> host(1);
  context<device> ctx;
  std::string text;
  const auto compare = [&](const std::vector<loss_layer>& given, grad_mode mode, bool trivial) {
    text += loss_difference(run_loss<device>(ctx, loss, given, mode),
                            run_loss<cpu>(host, loss, given, mode), trivial);
  };
  compare({make_loss_layer(random, few, 6), make_loss_layer(random, few, 6)}, grad_mode::overwrite,
          false);
  compare({make_loss_layer(random, 12, 40)}, grad_mode::accumulate, false);
  if (one_expert) compare({make_loss_layer(random, 6, 1)}, grad_mode::overwrite, true);
  compare({make_loss_layer(random, 0, 6)}, grad_mode::overwrite, true);
  return text;
}

}  // namespace talpa::support
