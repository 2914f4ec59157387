// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/check.hpp>
#include <talpa/core/mode.hpp>
#include <talpa/core/scalar.hpp>
#include <talpa/core/view.hpp>

#include <type_traits>

namespace talpa {

/// What layer_norm_backward reads beside x. It lies in the context's workspace.
template <class T, class B>
struct layer_norm_saved {
  vector_view<T, B> mean;  // [N]
  vector_view<T, B> rstd;  // [N], 1 / sqrt(variance + epsilon)
};

}  // namespace talpa

namespace talpa::ops {

template <class B>
struct layer_norm_impl {
  static_assert(detail::always_false<B>,
                "talpa: ops::layer_norm has no implementation for this backend here, include "
                "talpa/cpu/layer_norm.hpp for cpu, talpa/cuda/layer_norm.hpp for gpu "
                "(docs/architecture.md)");
};

/// Normalises every row to mean 0 and variance 1, then scales and shifts:
/// y = gamma xhat + beta, xhat = (x - mean) / sqrt(variance + epsilon).
///
/// The variance is the mean of squared distances from the mean (divisor D), taken in a second pass,
/// so that a large mean costs no digits.
/// Shapes: x and y [N, D], gamma and beta [1, D]; y may be the same view as x, but then backward
/// has lost x.
/// Parameters: epsilon > 0.
/// Edges: a constant row gives beta.
/// Cost: reads x three times from cache, writes y; saves two numbers a row in the workspace, valid
/// until the caller rewinds it.
/// Throws: shape_error when the shapes do not fit; value_error when epsilon is not > 0 and finite.
/// Source: Ba, Kiros, Hinton, 2016, Layer Normalization, equation 3.
template <class B, floating T>
layer_norm_saved<T, B> layer_norm(context<B>& ctx, input<T, B> x, input<T, B> gamma,
                                  input<T, B> beta, std::type_identity_t<T> epsilon,
                                  matrix_view<T, B> y) {
  check_shape("ops::layer_norm", "gamma", gamma, 1, x.cols, "one row, columns of x");
  check_shape("ops::layer_norm", "beta", beta, 1, x.cols, "one row, columns of x");
  check_shape("ops::layer_norm", "y", y, x.rows, x.cols, "shape of x");
  check_value(epsilon > T{0} && epsilon * T{0} == T{0}, "ops::layer_norm", "epsilon",
              static_cast<double>(epsilon), "a number > 0");
  const layer_norm_saved<T, B> saved{ctx.memory.template take<T>(x.rows),
                                     ctx.memory.template take<T>(x.rows)};
  layer_norm_impl<B>::forward(ctx, x, gamma, beta, epsilon, saved, y);
  return saved;
}

/// Gradients of layer_norm:
/// dx = rstd (g - mean(g) - xhat mean(g xhat)) with g = dy gamma,
/// dgamma = sum over n of dy xhat, dbeta = sum over n of dy, each as its mode says.
///
/// Shapes: x, dy and dx [N, D], gamma, dgamma and dbeta [1, D]; dx may be the same view as dy or x
/// when dgamma and dbeta are ignored. An ignored output may be an empty view.
/// Cost: reads x and dy twice for dx and once for each of dgamma and dbeta.
/// Determinism: dgamma and dbeta like column_sum.
/// Throws: shape_error when the shapes do not fit.
template <class B, floating T>
void layer_norm_backward(context<B>& ctx, const layer_norm_saved<T, B>& saved, input<T, B> x,
                         input<T, B> gamma, input<T, B> dy, output<T, B> dx, grad_mode dx_mode,
                         output<T, B> dgamma, grad_mode dgamma_mode, output<T, B> dbeta,
                         grad_mode dbeta_mode) {
  constexpr const char* name = "ops::layer_norm_backward";
  check_size(name, "saved", saved.mean, x.rows, "rows of x");
  check_shape(name, "gamma", gamma, 1, x.cols, "one row, columns of x");
  check_shape(name, "dy", dy, x.rows, x.cols, "shape of x");
  if (dx_mode != grad_mode::ignore) {
    check_shape(name, "dx", dx, x.rows, x.cols, "shape of x");
  }
  if (dgamma_mode != grad_mode::ignore) {
    check_shape(name, "dgamma", dgamma, 1, x.cols, "one row, columns of x");
  }
  if (dbeta_mode != grad_mode::ignore) {
    check_shape(name, "dbeta", dbeta, 1, x.cols, "one row, columns of x");
  }
  layer_norm_impl<B>::backward(ctx, saved, x, gamma, dy, dx, dx_mode, dgamma, dgamma_mode, dbeta,
                               dbeta_mode);
}

}  // namespace talpa::ops
