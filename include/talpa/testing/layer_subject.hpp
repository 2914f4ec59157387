// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/mode.hpp>
#include <talpa/core/random.hpp>
#include <talpa/cpu/context.hpp>
#include <talpa/layers/infer.hpp>
#include <talpa/routing/routing.hpp>
#include <talpa/testing/parameters.hpp>

#include <cstdint>
#include <utility>
#include <vector>

// A layer behind virtual functions: what the laws do to a layer is compiled once, not for each.

namespace talpa::testing::detail {

template <floating T>
class layer_subject {
 public:
  virtual ~layer_subject() = default;
  virtual parameter_bag<T> init(generator& random) const = 0;
  virtual index output_width(parameter_bag<T>& p) const = 0;
  /// One forward, then `repetitions` of backward. Whether backward handed all its memory back. The
  /// masks of all routings are put behind `masks`.
  virtual bool run(context<cpu>& ctx, parameter_bag<T>& p, const batch_info<T, cpu>& batch,
                   input<T, cpu> x, output<T, cpu> y, input<T, cpu> dy, output<T, cpu> dx,
                   grad_mode dx_mode, int repetitions, std::vector<std::uint32_t>& masks) const = 0;
  /// forward in mode m without backward, or infer where `keep_nothing`.
  virtual void run_inference(context<cpu>& ctx, parameter_bag<T>& p,
                             const batch_info<T, cpu>& batch, input<T, cpu> x, output<T, cpu> y,
                             bool keep_nothing) const = 0;
};

template <class T>
void append_mask(const routing_view<const T, cpu>& r, std::vector<std::uint32_t>& masks) {
  for (index n = 0; n < r.mask.rows; ++n) {
    masks.insert(masks.end(), r.mask.row(n), r.mask.row(n) + r.mask.cols);
  }
}

/// `init.template operator()<T>(generator)` makes the params of the layer.
template <floating T, class Layer, class Init>
class layer_model final : public layer_subject<T> {
 public:
  layer_model(const Layer& layer, const Init& make) : layer_(layer), make_(make) {}

  parameter_bag<T> init(generator& random) const override {
    return parameter_bag<T>(make_.template operator()<T>(random));
  }
  index output_width(parameter_bag<T>& p) const override { return layer_.output_width(params(p)); }
  bool run(context<cpu>& ctx, parameter_bag<T>& bag, const batch_info<T, cpu>& batch,
           input<T, cpu> x, output<T, cpu> y, input<T, cpu> dy, output<T, cpu> dx,
           grad_mode dx_mode, int repetitions, std::vector<std::uint32_t>& masks) const override {
    auto& p = params(bag);
    const auto kept = layer_.forward(ctx, p, x, y, mode::training, batch);
    if constexpr (requires { kept.routed.routing; }) append_mask<T>(kept.routed.routing, masks);
    if constexpr (requires { kept.base.routed.routing; }) {
      append_mask<T>(kept.base.routed.routing, masks);
    }
    if constexpr (requires { kept.placement.routing; }) {
      append_mask<T>(kept.placement.routing, masks);
    }
    const auto memory = ctx.memory.used(), scratch = ctx.scratch.used();
    for (int i = 0; i < repetitions; ++i) layer_.backward(ctx, p, kept, x, dy, dx, dx_mode);
    return ctx.memory.used() == memory && ctx.scratch.used() == scratch;
  }
  void run_inference(context<cpu>& ctx, parameter_bag<T>& bag, const batch_info<T, cpu>& batch,
                     input<T, cpu> x, output<T, cpu> y, bool keep_nothing) const override {
    if (keep_nothing) {
      infer(ctx, layer_, params(bag), x, y, batch);
    } else {
      layer_.forward(ctx, params(bag), x, y, mode::inference, batch);
    }
  }

 private:
  using made =
      decltype(std::declval<const Init&>().template operator()<T>(std::declval<generator&>()));
  static made& params(parameter_bag<T>& bag) { return bag.template as<made>(); }

  Layer layer_;
  Init make_;
};

}  // namespace talpa::testing::detail
