// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/autograd/bank.hpp>
#include <talpa/autograd/initialise.hpp>
#include <talpa/autograd/parameter.hpp>
#include <talpa/ops/bias.hpp>
#include <talpa/ops/reduce.hpp>

#include <cmath>
#include <string>

namespace talpa {

/// Parameters of an affine map y = x W^T + b: what linear layers and linear routers share.
template <class T, class B>
struct affine_params {
  parameter<T, B> weight;  // [O, D]
  parameter<T, B> bias;    // [1, O], absent without bias

  template <class F>
  void visit(F f) {
    f(weight);
    if (bias.exists()) f(bias);
  }
  void freeze() {
    visit([](parameter<T, B>& p) { p.freeze(); });
  }
  void train() {
    visit([](parameter<T, B>& p) { p.train(); });
  }
  /// Packs a frozen weight once for many products: `parameter::pack`.
  void pack(context<B>& ctx, packing which = packing::both,
            weight_storage storage = weight_storage::exact) {
    weight.pack(ctx, which, storage);
  }
  bool trainable() const { return weight.trainable() || bias.trainable(); }
};

/// W uniform in +-1 / sqrt(D) (Kaiming with a = sqrt 5); the bias, where wanted, in the same range
/// or zero. Names are `prefix`weight and `prefix`bias.
template <class T, class B>
affine_params<T, B> init_affine(index inputs, index outputs, bool bias, bool zero_bias,
                                generator& random, const std::string& prefix) {
  const double bound = 1.0 / std::sqrt(static_cast<double>(inputs));
  affine_params<T, B> p;
  matrix<T, B> weight(outputs, inputs);  // [O, D]
  fill_uniform(weight.view(), bound, random);
  p.weight = parameter<T, B>(prefix + "weight", std::move(weight));
  if (bias) {
    matrix<T, B> b(1, outputs);
    if (!zero_bias) fill_uniform(b.view(), bound, random);
    p.bias = parameter<T, B>(prefix + "bias", std::move(b));
  }
  return p;
}

/// y = x W^T (+ b). Shapes: x [N, D], y [N, O].
template <class B, floating T>
void affine_forward(context<B>& ctx, const affine_params<T, B>& p, input<T, B> x, output<T, B> y) {
  apply_weight(ctx, p.weight, x, y);
  if (p.bias.exists()) ops::add_bias(ctx, y, p.bias.value(), y);
}

/// dW += dy^T x and db += column sums of dy for what trains; dx = dy W as dx_mode says.
template <class B, floating T>
void affine_backward(context<B>& ctx, affine_params<T, B>& p, input<T, B> x, input<T, B> dy,
                     output<T, B> dx, grad_mode dx_mode) {
  add_gradient(ctx, p.weight, dy, x);
  if (p.bias.trainable()) ops::column_sum(ctx, dy, T{1}, p.bias.grad());
  input_gradient(ctx, p.weight, dy, dx, dx_mode);
}

}  // namespace talpa
