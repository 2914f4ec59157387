// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/autograd/parameter.hpp>
#include <talpa/ops/add.hpp>
#include <talpa/ops/gemm.hpp>
#include <talpa/ops/grouped_gemm.hpp>
#include <talpa/ops/segments.hpp>

#include <algorithm>

// Gradients of a product with a parameter whose rows may train one by one, for all tokens at once
// or slot by slot.

namespace talpa {

/// Gradient of the weight W [P, Q] in u = x W^T: adds du^T x to the rows that train.
///
/// Shapes: du [N, P], x [N, Q]. The same adds z^T dy for the weight in y = z W, with z [N, P] and
/// dy [N, Q].
template <class B, floating T>
void add_gradient(context<B>& ctx, parameter<T, B>& w, input<T, B> du, input<T, B> x) {
  for (const row_run& run : w.trained()) {
    ops::gemm(ctx, du.col_range(run.first, run.rows), transpose::yes, x, transpose::no, T{1},
              w.grad().row_range(run.grad_first, run.rows));
  }
}

/// u = x W^T, with the packed copy of W where there is one.
///
/// Shapes: x [N, Q], W [P, Q], u [N, P].
template <class B, floating T>
void apply_weight(context<B>& ctx, const parameter<T, B>& w, input<T, B> x, output<T, B> u) {
  if constexpr (has_packed_matrix<B>) {
    if (w.packed_transpose() != nullptr) {
      return ops::gemm(ctx, x, transpose::no, *w.packed_transpose(), T{0}, u);
    }
  }
  ops::gemm(ctx, x, transpose::no, w.value(), transpose::yes, T{0}, u);
}

/// Gradient of the input in u = x W^T: dx = du W as dx_mode says.
///
/// Shapes: du [N, P], W [P, Q], dx [N, Q].
template <class B, floating T>
void input_gradient(context<B>& ctx, const parameter<T, B>& w, input<T, B> du, output<T, B> dx,
                    grad_mode dx_mode) {
  if (dx_mode == grad_mode::ignore) return;
  const T kept = dx_mode == grad_mode::accumulate ? T{1} : T{0};
  if constexpr (has_packed_matrix<B>) {
    if (w.packed() != nullptr) return ops::gemm(ctx, du, transpose::no, *w.packed(), kept, dx);
  }
  ops::gemm(ctx, du, transpose::no, w.value(), transpose::no, kept, dx);
}

/// add_gradient of a bank of E blocks, in which each slot belongs to the block of its expert.
///
/// Shapes: bank [E P, Q], du [S, P], x [S, Q].
template <class B, floating T>
void add_slot_gradient(context<B>& ctx, const segments<B>& slots, parameter<T, B>& bank,
                       input<T, B> du, input<T, B> x) {
  if (!bank.trainable()) return;
  ops::grouped_gemm_gradient(ctx, slots.offsets, du, x, bank.trained(), bank.grad());
}

/// Whether one of the rows [first, first + count) trains.
template <class T, class B>
bool trains_rows(const parameter<T, B>& p, index first, index count) {
  for (const row_run& run : p.trained()) {
    if (run.first < first + count && first < run.first + run.rows) return true;
  }
  return false;
}

/// Adds `part`, a gradient of the rows from `first` on, to those of them that train.
///
/// Shapes: part [rows of it, Q] of a parameter [P, Q].
template <class B, floating T>
void add_rows(context<B>& ctx, parameter<T, B>& p, index first, input<T, B> part) {
  for (const row_run& run : p.trained()) {
    const index from = std::max(first, run.first);
    const index to = std::min(first + part.rows, run.first + run.rows);
    if (from >= to) continue;
    ops::axpy(ctx, T{1}, part.row_range(from - first, to - from),
              p.grad().row_range(run.grad_first + from - run.first, to - from));
  }
}

}  // namespace talpa
