// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/check.hpp>
#include <talpa/core/mode.hpp>
#include <talpa/core/scalar.hpp>

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

}  // namespace talpa::ops
