// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/check.hpp>
#include <talpa/core/half.hpp>
#include <talpa/core/mode.hpp>
#include <talpa/core/scalar.hpp>
#include <talpa/ops/activation.hpp>

#include <string>

namespace talpa::detail {

/// u must hold the same number of columns for every expert of gates.
template <class T, class B>
void check_ranks(const char* function, const matrix_view<const T, B>& gates,
                 const matrix_view<const T, B>& u) {
  if (gates.cols == 0 || u.cols % gates.cols != 0 || u.rows != gates.rows) {
    throw_shape(function, "u", shape_text(u.rows, u.cols),
                concat("[", std::to_string(gates.rows), ", R * ", std::to_string(gates.cols), "]"),
                "tokens, ranks of all experts");
  }
}

/// m must have a column for each rank of u, and may have more.
template <class T, class U, class B>
void check_ranks_or_wider(const char* function, const char* argument, const matrix_view<T, B>& m,
                          const matrix_view<U, B>& u) {
  if (m.rows != u.rows || m.cols < u.cols) {
    throw_shape(function, argument, m.rows, m.cols, u.rows, u.cols, "shape of u, or wider");
  }
}

}  // namespace talpa::detail

namespace talpa::ops {

template <class B>
struct rank_gate_impl {
  static_assert(detail::always_false<B>,
                "talpa: ops::rank_gate has no implementation for this backend here, include "
                "talpa/cpu/rank_gate.hpp for cpu, talpa/cuda/rank_gate.hpp for gpu "
                "(docs/architecture.md)");
};

/// Gates in rank space: scales the R columns of every expert by its gate.
///
/// Forward: z[n, e R + r] = (scale * gates[n, e]) * u[n, e R + r].
/// Backward: see rank_gate_backward.
/// Shapes: gates [N, E], u [N, E R], z [N, E R]; z may be u.
/// Cost: N E R multiplications. Determinism: same bits for any number of threads.
/// Throws: shape_error.
template <class B, floating T>
void rank_gate(context<B>& ctx, T scale, input<T, B> gates, input<T, B> u, matrix_view<T, B> z) {
  detail::check_ranks("ops::rank_gate", gates, u);
  check_shape("ops::rank_gate", "z", z, u.rows, u.cols, "shape of u");
  rank_gate_impl<B>::forward(ctx, scale, gates, u, z);
}

/// Backward of rank_gate: du[n, e R + r] = (scale * gates[n, e]) * dz[n, e R + r] and
/// dgates[n, e] = scale * sum_r dz[n, e R + r] * u[n, e R + r].
///
/// Shapes: gates, dgates [N, E]; u, dz, du [N, E R]; du may be dz. dgates is overwritten.
/// Throws: shape_error.
template <class B, floating T>
void rank_gate_backward(context<B>& ctx, T scale, input<T, B> gates, input<T, B> u, input<T, B> dz,
                        matrix_view<T, B> du, output<T, B> dgates) {
  detail::check_ranks("ops::rank_gate_backward", gates, u);
  check_shape("ops::rank_gate_backward", "dgates", dgates, gates.rows, gates.cols,
              "shape of gates");
  check_shape("ops::rank_gate_backward", "dz", dz, u.rows, u.cols, "shape of u");
  check_shape("ops::rank_gate_backward", "du", du, u.rows, u.cols, "shape of u");
  rank_gate_impl<B>::backward(ctx, scale, gates, u, dz, du, dgates);
}

/// Gates an activation in rank space, in float and rounded once to the storage: what a bottleneck
/// of halves multiplies next.
///
/// Forward: z[n, e R + r] = (scale * gates[n, e]) * f(u[n, e R + r]).
/// Backward: see mixed_rank_gate_backward.
/// Shapes: gates [N, E], u [N, E R], z [N, >= E R]; what is beyond E R becomes zero.
/// Edges: a gate that is zero gives zero, whatever u is.
/// Cost: one launch; reads N E R numbers, writes the columns of z.
/// Determinism: the same bits on every run.
/// Throws: shape_error.
template <activation_function F, class B, storage_scalar S>
void mixed_rank_gate(context<B>& ctx, const F& f, float scale, input<float, B> gates,
                     input<float, B> u, matrix_view<S, B> z) {
  detail::check_ranks("ops::mixed_rank_gate", gates, u);
  detail::check_ranks_or_wider("ops::mixed_rank_gate", "z", z, u);
  rank_gate_impl<B>::mixed(ctx, f, scale, gates, u, z);
}

/// Backward of mixed_rank_gate: du[n, e R + r] = (scale * gates[n, e]) * dz[n, e R + r]
/// f'(u[n, e R + r]), rounded once, and dgates[n, e] = scale * sum_r dz[n, e R + r]
/// f(u[n, e R + r]).
///
/// Shapes: gates, dgates [N, E]; u [N, E R]; dz and du [N, >= E R]; what of du is beyond E R
/// becomes zero. dgates is overwritten.
/// Edges: a gate that is zero gives du zero, whatever dz is.
/// Cost: one launch; reads 2 N E R numbers, writes the columns of du.
/// Determinism: the same bits on every run; a sum of R terms runs in order.
/// Throws: shape_error.
template <activation_function F, class B, storage_scalar S>
void mixed_rank_gate_backward(context<B>& ctx, const F& f, float scale, input<float, B> gates,
                              input<float, B> u, input<float, B> dz, matrix_view<S, B> du,
                              output<float, B> dgates) {
  constexpr const char* function = "ops::mixed_rank_gate_backward";
  detail::check_ranks(function, gates, u);
  check_shape(function, "dgates", dgates, gates.rows, gates.cols, "shape of gates");
  detail::check_ranks_or_wider(function, "dz", dz, u);
  detail::check_ranks_or_wider(function, "du", du, u);
  rank_gate_impl<B>::mixed_backward(ctx, f, scale, gates, u, dz, du, dgates);
}

}  // namespace talpa::ops
