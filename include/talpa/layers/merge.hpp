// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/transfer.hpp>
#include <talpa/experts/parallel_adapter.hpp>
#include <talpa/layers/lora_linear.hpp>
#include <talpa/layers/mole_linear.hpp>
#include <talpa/layers/perft_block.hpp>
#include <talpa/ops/gemm.hpp>

#include <cmath>
#include <concepts>
#include <type_traits>
#include <vector>

namespace talpa {

namespace detail {

/// W += s B^T A for the one expert of a bank: A [R, D], B transposed [R, O], W [O, D].
template <class T, class B>
void add_low_rank(context<B>& ctx, double scale, const parameter<T, B>& a, const parameter<T, B>& b,
                  parameter<T, B>& weight) {
  ops::gemm(ctx, static_cast<T>(scale), b.value(), transpose::yes, a.value(), transpose::no, T{1},
            weight.value());
}

/// A parameter with values of its own, of which the same rows train.
template <class T, class B>
parameter<T, B> copy_parameter(const parameter<T, B>& from) {
  parameter<T, B> to(from.name(), copy_of(from.value()));
  std::vector<index> rows;
  for (const row_run& run : from.trained()) {
    for (index row = run.first; row < run.first + run.rows; ++row) rows.push_back(row);
  }
  to.train_blocks(1, rows);
  return to;
}

/// An affine map with values of its own, trainable as the original.
template <class T, class B>
affine_params<T, B> copy_affine(const affine_params<T, B>& from) {
  affine_params<T, B> to;
  to.weight = copy_parameter(from.weight);
  if (from.bias.exists()) to.bias = copy_parameter(from.bias);
  return to;
}

/// The bank of an adapter that can be widened, which is its two factors, with values of its own.
template <class Params>
Params copy_factors(const Params& from) {
  const auto& [in, out] = from;
  return {copy_parameter(in), copy_parameter(out)};
}

/// The adapter of `times` the rank and the same scale, whose bank of one is a bank of `times`.
inline lora widened(lora adapter, index times) {
  const double factor = static_cast<double>(times);
  adapter.alpha *= adapter.scaling == lora_scaling::by_rank ? factor : std::sqrt(factor);
  adapter.rank *= times;
  return adapter;
}
template <class Act>
parallel_adapter<Act> widened(parallel_adapter<Act> adapter, index times) {
  adapter.rank *= times;
  return adapter;
}

template <class Adapter>
concept can_be_widened = requires(const Adapter& adapter, index times) {
  { widened(adapter, times) } -> std::same_as<Adapter>;
};
template <class Placement>
consteval bool has_constant_gates() {
  if constexpr (requires { Placement::constant_gates; }) return Placement::constant_gates;
  return false;
}
template <class Placement>
consteval bool has_unit_mass() {
  if constexpr (requires { Placement::unit_mass; }) return Placement::unit_mass;
  return false;
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

/// One adapter in the place of several, and its bank.
template <class Adapter, class Params>
struct merged_adapter {
  Adapter adapter{};
  Params params{};
};

/// The one adapter that the adapters of a block are together where their gates are constant
/// (PERFT-D and -S): sum_j f_j = f of rank M R and the same scale, whose factors are those of the
/// bank one behind the other. For lora and parallel_adapter.
///
/// The block with it is perft_block<Base, placement::single, Adapter>{.base = layer.base,
/// .adapter = merged.adapter}. The bank is a copy with values of its own, of which the same rows
/// train; the parameters of the layer are left as they are.
/// Shapes: A [M R, D], B transposed [M R, D]. Cost: a copy of the bank.
/// Edges: padding, which gets no adapter behind a router, is a token like any other here. Both
/// blocks differ by rounding.
/// Throws: value_error for more than one adapter behind gates that only sum to one.
/// Source: PERFT (arXiv 2411.08212).
template <class Base, class Placement, class Adapter, class Params>
auto merge(const perft_block<Base, Placement, Adapter>& layer, const Params& p) {
  static_assert(detail::can_be_widened<Adapter>,
                "talpa: merge makes one adapter of several lora or parallel_adapter, whose sum is "
                "one of more ranks (docs/policies/placement.md)");
  static_assert(detail::has_constant_gates<Placement>() || detail::has_unit_mass<Placement>(),
                "talpa: merge needs adapters whose gates do not depend on the token, those of "
                "placement::dense or single, or the one behind a router whose gates sum to one "
                "(docs/policies/placement.md)");
  layer.validate();
  if constexpr (!detail::has_constant_gates<Placement>()) {
    check_range("merge", "adapters", layer.adapters, 1, 1,
                "adapters whose gate does not depend on the token");
  }
  return merged_adapter<Adapter, std::remove_cvref_t<decltype(p.adapter)>>{
      detail::widened(layer.adapter, layer.adapters), detail::copy_factors(p.adapter)};
}

}  // namespace talpa
