// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/layers/lora_linear.hpp>
#include <talpa/layers/mole_linear.hpp>
#include <talpa/ops/gemm.hpp>

#include <string>

namespace talpa {

namespace detail {

/// W += s B^T A for the one expert of a bank: A [R, D], B transposed [R, O], W [O, D].
template <class T, class B>
void add_low_rank(context<B>& ctx, double scale, const parameter<T, B>& a, const parameter<T, B>& b,
                  parameter<T, B>& weight) {
  ops::gemm(ctx, static_cast<T>(scale), b.value(), transpose::yes, a.value(), transpose::no, T{1},
            weight.value());
}

/// An affine map with values of its own, trainable as the original.
template <class T, class B>
affine_params<T, B> copy_affine(const affine_params<T, B>& from) {
  affine_params<T, B> to;
  const auto copy = [](const parameter<T, B>& p) {
    parameter<T, B> c(p.name(), matrix<T, B>(p.value()));
    if (!p.trainable()) c.freeze();
    return c;
  };
  to.weight = copy(from.weight);
  if (from.bias.exists()) to.bias = copy(from.bias);
  return to;
}

}  // namespace detail

/// The linear map that a base and its adapter are together, for inference without an adapter:
/// W' = W + s B A, b' = b. The parameters are left as they are.
///
/// Shapes: W' [O, D]. Cost: 2 D O R flop and a copy of W. Determinism: same bits for any number of
/// threads; W' x and W x + s B A x differ by rounding. Dropout of training is no part of it.
template <floating T, backend B>
affine_params<T, B> merge(context<B>& ctx, const lora_linear& layer,
                          const lora_linear::params<T, B>& p) {
  layer.adapter.validate();
  affine_params<T, B> merged = detail::copy_affine(p.base);
  detail::add_low_rank(ctx, layer.adapter.scale(), p.adapter.a, p.adapter.b, merged.weight);
  return merged;
}

/// The same of a mixture whose gate is constant: one LoRA expert behind gates that sum to one.
///
/// Edges: padding, which gets the base alone in the layer, is a token like any other here.
/// Throws: value_error for more than one expert, whose share of the sum depends on the token.
template <backend B, class Router, class Params>
auto merge(context<B>& ctx, const mole_linear<Router, lora>& layer, const Params& p) {
  static_assert(
      decltype(layer.router.selector)::unit_mass,
      "talpa: merge needs gates that sum to one, so that those of one expert are constant "
      "(docs/policies/selector.md)");
  layer.validate();
  check_range("merge", "experts", layer.experts, 1, 1,
              "experts whose gate does not depend on the token");
  auto merged = detail::copy_affine(p.base);
  detail::add_low_rank(ctx, layer.expert.scale(), p.expert.a, p.expert.b, merged.weight);
  return merged;
}

}  // namespace talpa
