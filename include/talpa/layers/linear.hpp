// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/autograd/affine.hpp>
#include <talpa/routing/routing.hpp>

#include <string>

namespace talpa {

/// Layer that is one linear map, trained or frozen: y = x W^T (+ b). The base of `mole_linear`.
///
/// Backward: dx = dy W, dW += dy^T x, db += column sums of dy; what is frozen gets none.
/// Shapes: x [N, D], W [O, D], b [1, O], y [N, O].
/// Initialisation: W and b uniform in +-1 / sqrt(D).
/// Cost: 2 N D O flop forward, as much for dx and for dW. Saves nothing.
/// Determinism: same bits for any number of threads.
/// Throws: shape_error.
struct linear {
  static constexpr const char* name = "linear";

  bool bias = true;

  template <class T, class B>
  using params = affine_params<T, B>;

  template <class T, class B>
  struct saved {};

  template <class T, class B>
  params<T, B> init(index inputs, index outputs, generator& random,
                    const std::string& prefix) const {
    return init_affine<T, B>(inputs, outputs, bias, false, random, prefix);
  }

  template <class T, class B>
  index output_width(const params<T, B>& p) const {
    return p.weight.rows();
  }

  template <class T, class B>
  saved<T, B> forward(context<B>& ctx, const params<T, B>& p, input<T, B> x, output<T, B> y, mode,
                      const batch_info<T, B>& = {}) const {
    check_shape(name, "x", x, x.rows, p.weight.cols(), "tokens, input width of the weight");
    check_shape(name, "y", y, x.rows, p.weight.rows(), "tokens, output width of the weight");
    affine_forward(ctx, p, x, y);
    return {};
  }

  template <class T, class B>
  void backward(context<B>& ctx, params<T, B>& p, const saved<T, B>&, input<T, B> x, input<T, B> dy,
                output<T, B> dx, grad_mode dx_mode,
                const std::type_identity_t<routed_gradient<T, B>>* = nullptr) const {
    check_shape(name, "dy", dy, x.rows, p.weight.rows(), "tokens, output width of the weight");
    if (dx_mode != grad_mode::ignore) check_shape(name, "dx", dx, x.rows, x.cols, "shape of x");
    affine_backward(ctx, p, x, dy, dx, dx_mode);
  }
};

}  // namespace talpa
