// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/check.hpp>
#include <talpa/core/mode.hpp>
#include <talpa/core/scalar.hpp>
#include <talpa/core/view.hpp>

namespace talpa::ops {

template <class B>
struct ragged_gate_impl {
  static_assert(detail::always_false<B>,
                "talpa: ops::ragged_gate and its fellows have no implementation for this backend "
                "here, include "
                "talpa/cpu/ragged_gate.hpp for cpu, talpa/cuda/ragged_gate.hpp for gpu "
                "(docs/architecture.md)");
};

/// Gates in rank space where each expert has a number of ranks and a scale of its own:
/// z[n, j] = (scales[e] gates[n, e]) u[n, j] for blocks[e] <= j < blocks[e + 1].
///
/// Backward: see ragged_gate_backward.
/// Shapes: blocks [E + 1], ascending from 0 to P; scales [E]; gates [N, E]; u and z [N, P]; z may
/// be u.
/// Cost: N P multiplications. Determinism: same bits for any number of threads.
/// Throws: shape_error.
template <class B, floating T>
void ragged_gate(context<B>& ctx, vector_input<index, B> blocks, vector_input<T, B> scales,
                 input<T, B> gates, input<T, B> u, matrix_view<T, B> z) {
  check_size("ops::ragged_gate", "blocks", blocks, gates.cols + 1, "experts + 1");
  check_size("ops::ragged_gate", "scales", scales, gates.cols, "experts");
  check_shape("ops::ragged_gate", "u", u, gates.rows, u.cols, "tokens, ranks of all experts");
  check_shape("ops::ragged_gate", "z", z, u.rows, u.cols, "shape of u");
  ragged_gate_impl<B>::forward(ctx, blocks, scales, gates, u, z);
}

/// Backward of ragged_gate: du[n, j] = (scales[e] gates[n, e]) dz[n, j] and
/// dgates[n, e] = scales[e] sum_j dz[n, j] u[n, j] over the block of e.
///
/// Shapes: as ragged_gate, du may be dz. dgates [N, E] is overwritten. Throws: shape_error.
template <class B, floating T>
void ragged_gate_backward(context<B>& ctx, vector_input<index, B> blocks, vector_input<T, B> scales,
                          input<T, B> gates, input<T, B> u, input<T, B> dz, matrix_view<T, B> du,
                          output<T, B> dgates) {
  check_size("ops::ragged_gate_backward", "blocks", blocks, gates.cols + 1, "experts + 1");
  check_size("ops::ragged_gate_backward", "scales", scales, gates.cols, "experts");
  check_shape("ops::ragged_gate_backward", "dz", dz, u.rows, u.cols, "shape of u");
  check_shape("ops::ragged_gate_backward", "du", du, u.rows, u.cols, "shape of u");
  check_shape("ops::ragged_gate_backward", "dgates", dgates, u.rows, gates.cols, "tokens, experts");
  ragged_gate_impl<B>::backward(ctx, blocks, scales, gates, u, dz, du, dgates);
}

/// The same over slots: z[s, r] = (scales[e] gates[s]) u[s, r] for the slots s of expert e and
/// r < blocks[e + 1] - blocks[e].
///
/// Shapes: offsets and blocks [E + 1], scales [E], gates [S], u and z [S, R] with R the most ranks
/// of an expert; z may be u. What lies beyond the ranks of a slot's expert is left as it was.
/// Throws: shape_error.
template <class B, floating T>
void ragged_slot_gate(context<B>& ctx, vector_input<index, B> offsets,
                      vector_input<index, B> blocks, vector_input<T, B> scales,
                      vector_input<T, B> gates, input<T, B> u, matrix_view<T, B> z) {
  check_size("ops::ragged_slot_gate", "blocks", blocks, offsets.size, "size of offsets");
  check_size("ops::ragged_slot_gate", "scales", scales, offsets.size - 1, "experts");
  check_size("ops::ragged_slot_gate", "gates", gates, u.rows, "rows of u");
  check_shape("ops::ragged_slot_gate", "z", z, u.rows, u.cols, "shape of u");
  ragged_gate_impl<B>::slot_forward(ctx, offsets, blocks, scales, gates, u, z);
}

/// Backward of ragged_slot_gate: du[s, r] = (scales[e] gates[s]) dz[s, r] and
/// dgates[s] = scales[e] sum_r dz[s, r] u[s, r] over the ranks of the expert of s.
///
/// Shapes: as ragged_slot_gate, du may be dz. dgates [S] is overwritten. Throws: shape_error.
template <class B, floating T>
void ragged_slot_gate_backward(context<B>& ctx, vector_input<index, B> offsets,
                               vector_input<index, B> blocks, vector_input<T, B> scales,
                               vector_input<T, B> gates, input<T, B> u, input<T, B> dz,
                               matrix_view<T, B> du, vector_output<T, B> dgates) {
  check_size("ops::ragged_slot_gate_backward", "blocks", blocks, offsets.size, "size of offsets");
  check_size("ops::ragged_slot_gate_backward", "scales", scales, offsets.size - 1, "experts");
  check_size("ops::ragged_slot_gate_backward", "gates", gates, u.rows, "rows of u");
  check_size("ops::ragged_slot_gate_backward", "dgates", dgates, u.rows, "rows of u");
  check_shape("ops::ragged_slot_gate_backward", "dz", dz, u.rows, u.cols, "shape of u");
  check_shape("ops::ragged_slot_gate_backward", "du", du, u.rows, u.cols, "shape of u");
  ragged_gate_impl<B>::slot_backward(ctx, offsets, blocks, scales, gates, u, dz, du, dgates);
}

}  // namespace talpa::ops
