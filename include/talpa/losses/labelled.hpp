// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/check.hpp>
#include <talpa/losses/explain.hpp>
#include <talpa/routing/routing.hpp>

#include <cstdint>
#include <span>
#include <type_traits>

namespace talpa {

/// The loss Loss of one layer as if the experts of `labels` had been chosen for its tokens: its
/// mask is put in the place of the router's. For tape::apply_loss, where the routing is the layer's
/// own.
///
/// Forward, backward, cost, determinism: Loss.
/// Shapes: labels [N, ceil(E / 32)], which live until backward.
/// Throws: value_error for another number of layers than one, shape_error.
template <class Loss, backend B = cpu>
struct labelled {
  static_assert(detail::explain_loss<Loss>());

  static constexpr const char* name = "labelled";

  Loss loss{};
  matrix_view<const std::uint32_t, B> labels{};  ///< a bit for each expert that ought to be on

  template <class T, class Other>
  using saved = typename Loss::template saved<T, Other>;

  template <class T>
  saved<T, B> forward(context<B>& ctx, std::span<const routed_view<T, B>> layers) const {
    const routed_view<T, B> layer = with_labels(layers);
    return loss.forward(ctx, std::span<const routed_view<T, B>>(&layer, 1));
  }
  template <class T>
  void backward(context<B>& ctx, std::type_identity_t<std::span<const routed_view<T, B>>> layers,
                const saved<T, B>& kept, input<T, B> dvalue,
                std::type_identity_t<std::span<const routed_gradient<T, B>>> out,
                grad_mode mode) const {
    const routed_view<T, B> layer = with_labels(layers);
    loss.template backward<T, B>(ctx, std::span<const routed_view<T, B>>(&layer, 1), kept, dvalue,
                                 out, mode);
  }

 private:
  template <class T>
  routed_view<T, B> with_labels(std::span<const routed_view<T, B>> layers) const {
    check_range(name, "layers", static_cast<index>(layers.size()), 1, 1, "layer of the labels");
    routed_view<T, B> layer = layers[0];
    check_shape(name, "labels", labels, layer.logits.rows, mask_words(layer.logits.cols),
                "tokens, mask words of the experts");
    layer.routing.mask = labels;
    return layer;
  }
};

}  // namespace talpa
