// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/autograd/affine.hpp>
#include <talpa/scorers/explain.hpp>

#include <string>

namespace talpa {

/// Scorer that is one linear map: logits = x W^T (+ b).
///
/// Backward: dx = dlogits W, dW += dlogits^T x, db += column sums of dlogits.
/// Shapes: x [N, D], W [E, D], b [1, E], logits [N, E].
/// Initialisation: W uniform in +-1 / sqrt(D) (Kaiming with a = sqrt 5), b zero.
/// Cost: 2 N D E flop forward, twice that backward; nothing is saved.
/// Determinism: same bits for any number of threads.
/// Throws: shape_error from the front doors of ops.
/// Source: the router of Shazeer et al. 2017 (arXiv 1701.06538); initialisation as MoLA and
/// DynMoLE.
struct linear_scorer {
  static constexpr const char* name = "linear_scorer";

  bool bias = false;  ///< whether the router has a bias (FactorLLM has, most have not)

  template <class T, class B>
  using params = affine_params<T, B>;

  template <class T, class B>
  struct saved {};

  /// Parameters named `prefix`weight and `prefix`bias.
  template <class T, class B>
  params<T, B> init(index inputs, index experts, generator& random,
                    const std::string& prefix) const {
    return init_affine<T, B>(inputs, experts, bias, true, random, prefix);
  }

  template <class T, class B>
  saved<T, B> forward(context<B>& ctx, const params<T, B>& p, input<T, B> x, output<T, B> logits,
                      mode, const batch_info<T, B>&) const {
    affine_forward(ctx, p, x, logits);
    return {};
  }

  template <class T, class B>
  void backward(context<B>& ctx, params<T, B>& p, const saved<T, B>&, input<T, B> x,
                input<T, B> dlogits, output<T, B> dx, grad_mode dx_mode) const {
    affine_backward(ctx, p, x, dlogits, dx, dx_mode);
  }
};

static_assert(scorer_policy<linear_scorer>);

}  // namespace talpa
