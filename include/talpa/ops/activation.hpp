// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/check.hpp>
#include <talpa/core/math.hpp>
#include <talpa/core/mode.hpp>
#include <talpa/core/scalar.hpp>
#include <talpa/core/view.hpp>

#include <concepts>

namespace talpa {

/// A scalar function with its derivative, both of the input: what an activation is. It is a value
/// with two const members, so that a function with a parameter (a slope) is possible, and a type,
/// so that a loop over it is compiled for it. A user's own activation needs nothing else; mark the
/// members TALPA_HD and it runs on a device too.
template <class A>
concept activation_function = requires(const A& f, float x, double y) {
  { f.value(x) } -> std::same_as<float>;
  { f.value(y) } -> std::same_as<double>;
  { f.derivative(x) } -> std::same_as<float>;
  { f.derivative(y) } -> std::same_as<double>;
};

/// f(x) = x.
struct identity {
  template <floating T>
  TALPA_HD T value(T x) const {
    return x;
  }
  template <floating T>
  TALPA_HD T derivative(T) const {
    return T{1};
  }
};

/// f(x) = max(x, 0); the derivative at 0 is 0.
struct relu {
  template <floating T>
  TALPA_HD T value(T x) const {
    return math::relu(x);
  }
  template <floating T>
  TALPA_HD T derivative(T x) const {
    return math::relu_derivative(x);
  }
};

/// f(x) = x / (1 + e^-x), also called swish.
struct silu {
  template <floating T>
  TALPA_HD T value(T x) const {
    return math::silu(x);
  }
  template <floating T>
  TALPA_HD T derivative(T x) const {
    return math::silu_derivative(x);
  }
};

/// f(x) = x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), the usual approximation of x Phi(x).
struct gelu_tanh {
  template <floating T>
  TALPA_HD T value(T x) const {
    return math::gelu_tanh(x);
  }
  template <floating T>
  TALPA_HD T derivative(T x) const {
    return math::gelu_tanh_derivative(x);
  }
};

/// f(x) = tanh(x).
struct tanh {
  template <floating T>
  TALPA_HD T value(T x) const {
    return math::tanh(x);
  }
  template <floating T>
  TALPA_HD T derivative(T x) const {
    return math::tanh_derivative(x);
  }
};

/// f(x) = 1 / (1 + e^-x).
struct sigmoid {
  template <floating T>
  TALPA_HD T value(T x) const {
    return math::sigmoid(x);
  }
  template <floating T>
  TALPA_HD T derivative(T x) const {
    return math::sigmoid_derivative(x);
  }
};

static_assert(activation_function<identity> && activation_function<relu> &&
              activation_function<silu> && activation_function<gelu_tanh> &&
              activation_function<tanh> && activation_function<sigmoid>);

}  // namespace talpa

namespace talpa::ops {

template <class B>
struct activation_impl {
  static_assert(detail::always_false<B>,
                "talpa: ops::activation has no implementation for this backend here, include "
                "talpa/cpu/activation.hpp for cpu, talpa/cuda/activation.hpp for gpu "
                "(docs/architecture.md)");
};

/// Applies an activation to every element: y = f(x), with f one of relu, silu, gelu_tanh, tanh,
/// sigmoid, identity or a user's own: `ops::activation(ctx, silu{}, x, y)`.
///
/// Backward: dx = dy f'(x).
/// Shapes: x and y of one shape; they may be the same view, but then backward has lost x.
/// Edges: NaN gives NaN; accuracy and limits at infinity are those of talpa::math.
/// Cost: reads one, writes one. Determinism: same bits for any number of threads.
/// Throws: shape_error when the shapes differ.
template <activation_function F, class B, floating T>
void activation(context<B>& ctx, const F& f, input<T, B> x, matrix_view<T, B> y) {
  check_shape("ops::activation", "y", y, x.rows, x.cols, "shape of x");
  activation_impl<B>::forward(ctx, f, x, y);
}

/// Gradient of activation: dx = dy f'(x), as dx_mode says.
///
/// Shapes: x, dy and dx of one shape; dx may be the same view as dy or x.
/// Cost: reads two (accumulate: three), writes one.
/// Determinism: same bits for any number of threads.
/// Throws: shape_error when the shapes differ.
template <activation_function F, class B, floating T>
void activation_backward(context<B>& ctx, const F& f, input<T, B> x, input<T, B> dy,
                         matrix_view<T, B> dx, grad_mode dx_mode) {
  if (dx_mode == grad_mode::ignore) return;
  check_shape("ops::activation_backward", "dy", dy, x.rows, x.cols, "shape of x");
  check_shape("ops::activation_backward", "dx", dx, x.rows, x.cols, "shape of x");
  activation_impl<B>::backward(ctx, f, x, dy, dx, dx_mode);
}

}  // namespace talpa::ops
