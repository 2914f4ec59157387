// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/check.hpp>
#include <talpa/core/mode.hpp>
#include <talpa/core/scalar.hpp>
#include <talpa/core/view.hpp>

#include <cstdint>

namespace talpa::ops {

template <class B>
struct sequence_rows_impl {
  static_assert(detail::always_false<B>,
                "talpa: ops::repeat_rows, lookup_rows and attend_rows have no implementation for "
                "this backend here, include "
                "talpa/cpu/sequence_rows.hpp for cpu, talpa/cuda/sequence_rows.hpp for gpu "
                "(docs/architecture.md)");
};

/// Gives every token the row of its sequence: y[s L + i] = x[s] for i < L.
///
/// Backward: sum_rows.
/// Shapes: x [S, D], y [S L, D].
/// Cost: writes y.
/// Throws: shape_error when the rows of y are no multiple of those of x.
template <class B, floating T>
void repeat_rows(context<B>& ctx, input<T, B> x, matrix_view<T, B> y) {
  const index length = x.rows > 0 ? y.rows / x.rows : 0;
  check_shape("ops::repeat_rows", "y", y, length * x.rows, x.cols,
              "a multiple of the rows of x, columns of x");
  sequence_rows_impl<B>::repeat(ctx, x, y, length);
}

/// Adds up the rows of each sequence: y[s] = sum over i < L of x[s L + i].
///
/// Shapes: x [S L, D], y [S, D].
/// Determinism: in order of i; same bits for any number of threads.
/// Throws: shape_error when the rows of x are no multiple of those of y.
template <class B, floating T>
void sum_rows(context<B>& ctx, input<T, B> x, matrix_view<T, B> y) {
  const index length = y.rows > 0 ? x.rows / y.rows : 0;
  check_shape("ops::sum_rows", "x", x, length * y.rows, y.cols,
              "a multiple of the rows of y, columns of y");
  sequence_rows_impl<B>::sum(ctx, x, y, length);
}

/// Takes rows of a table by label: y[s] = table[labels[s]].
///
/// Backward: lookup_rows_backward.
/// Shapes: labels [S], table [M, D], y [S, D].
/// Throws: shape_error; value_error, as function `name`, for a label outside 0..M-1.
template <class B, floating T>
void lookup_rows(context<B>& ctx, const char* name, vector_input<std::int32_t, B> labels,
                 input<T, B> table, matrix_view<T, B> y) {
  check_size("ops::lookup_rows", "labels", labels, y.rows, "one a row of y");
  check_shape("ops::lookup_rows", "y", y, labels.size, table.cols, "labels, columns of table");
  sequence_rows_impl<B>::lookup(ctx, name, labels, table, y);
}

/// Adds gradients of rows to those of a table: dtable[labels[s] - first] += dy[s] for the labels in
/// [first, first + rows of dtable).
///
/// Shapes: labels [S], dy [S, D], dtable [any, D].
/// Determinism: in order of s; same bits for any number of threads.
/// Throws: shape_error.
template <class B, floating T>
void lookup_rows_backward(context<B>& ctx, vector_input<std::int32_t, B> labels, input<T, B> dy,
                          index first, matrix_view<T, B> dtable) {
  check_shape("ops::lookup_rows_backward", "dy", dy, labels.size, dtable.cols,
              "labels, columns of dtable");
  sequence_rows_impl<B>::lookup_backward(ctx, labels, dy, first, dtable);
}

/// One query a sequence attends to the rows of its sequence, which are keys and values at once:
/// a_s = softmax over the present rows j of (scale q_s . h_sj), u_s = sum_j a_sj h_sj.
///
/// Shapes: q and u [S, C], h [S L, C], present [S L] or empty (all are), a [S, L].
/// Edges: an absent row has a = 0 and is not read; a sequence without present rows, L = 0 included,
/// has u = 0.
/// Cost: 4 S L C flop.
/// Determinism: same bits for any number of threads.
/// Throws: shape_error.
template <class B, floating T>
void attend_rows(context<B>& ctx, T scale, input<T, B> q, input<T, B> h,
                 vector_input<std::uint8_t, B> present, output<T, B> a, matrix_view<T, B> u) {
  check_shape("ops::attend_rows", "q", q, u.rows, u.cols, "shape of u");
  check_shape("ops::attend_rows", "h", h, a.rows * a.cols, u.cols,
              "rows of a sequence, width of q");
  check_shape("ops::attend_rows", "a", a, u.rows, a.cols, "sequences, rows of each");
  if (!present.empty()) {
    check_size("ops::attend_rows", "present", present, h.rows, "one flag a row of h");
  }
  sequence_rows_impl<B>::attend(ctx, scale, q, h, present, a, u);
}

/// Gradient of attend_rows: with r_sj = du_s . h_sj and t_sj = a_sj (r_sj - sum_i a_si r_si),
/// dq_s = scale sum_j t_sj h_sj as dq_mode says, dh_sj += a_sj du_s + scale t_sj q_s unless dh is
/// empty.
///
/// Shapes: q, du and dq [S, C], h and dh [S L, C], a [S, L].
/// Throws: shape_error.
template <class B, floating T>
void attend_rows_backward(context<B>& ctx, T scale, input<T, B> q, input<T, B> h, input<T, B> a,
                          input<T, B> du, output<T, B> dq, grad_mode dq_mode, output<T, B> dh) {
  check_shape("ops::attend_rows_backward", "du", du, q.rows, q.cols, "shape of q");
  check_shape("ops::attend_rows_backward", "h", h, a.rows * a.cols, q.cols,
              "rows of a sequence, width of q");
  check_shape("ops::attend_rows_backward", "a", a, q.rows, a.cols, "sequences, rows of each");
  if (dq_mode != grad_mode::ignore) {
    check_shape("ops::attend_rows_backward", "dq", dq, q.rows, q.cols, "shape of q");
  }
  if (!dh.empty()) {
    check_shape("ops::attend_rows_backward", "dh", dh, h.rows, h.cols, "shape of h");
  }
  sequence_rows_impl<B>::attend_backward(ctx, scale, q, h, a, du, dq, dq_mode, dh);
}

}  // namespace talpa::ops
