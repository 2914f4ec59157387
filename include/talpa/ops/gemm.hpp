// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/check.hpp>
#include <talpa/core/half.hpp>
#include <talpa/core/scalar.hpp>
#include <talpa/core/view.hpp>

namespace talpa {

/// Whether an operand of a product is read as stored or transposed.
enum class transpose { no, yes };

namespace detail {
template <class T, class B>
index rows_of(const matrix_view<T, B>& m, transpose t) {
  return t == transpose::no ? m.rows : m.cols;
}
template <class T, class B>
index cols_of(const matrix_view<T, B>& m, transpose t) {
  return t == transpose::no ? m.cols : m.rows;
}

template <class S, class C, class B>
void check_product(const char* function, const matrix_view<const S, B>& a, transpose ta,
                   const matrix_view<const S, B>& b, transpose tb, const matrix_view<C, B>& c) {
  const index m = rows_of(a, ta), k = cols_of(a, ta), n = cols_of(b, tb);
  if (rows_of(b, tb) != k) {
    throw_shape(function, "b", shape_text(b.rows, b.cols),
                tb == transpose::no ? concat("[", std::to_string(k), ", ...]")
                                    : concat("[..., ", std::to_string(k), "]"),
                "inner size of a");
  }
  check_shape(function, "c", c, m, n, "rows of op(a), columns of op(b)");
}

}  // namespace detail

}  // namespace talpa

namespace talpa::ops {

template <class B>
struct gemm_impl {
  static_assert(detail::always_false<B>,
                "talpa: ops::gemm has no implementation for this backend here, include "
                "talpa/cpu/gemm.hpp for cpu, talpa/cuda/gemm.cuh for gpu "
                "(docs/architecture.md)");
};

/// Computes c = alpha op(a) op(b) + beta c.
///
/// Backward, with dc given: da = alpha dc op(b)^T, db = alpha op(a)^T dc (transposed where op is):
/// calls of the same op.
/// Shapes: op(a) [M, K], op(b) [K, N], c [M, N]; views may be strided.
/// Edges: beta == 0 ignores what c held, NaN included; K == 0 leaves beta c; M == 0 or N == 0 does
/// nothing. c must not overlap a or b.
/// Cost: 2 M N K flop.
/// Determinism: the same bits for any number of threads; K is never split between threads. The
/// order of a sum depends on the shape, on the CPU and on a device.
/// Throws: shape_error when the shapes do not fit.
template <class B, floating T>
void gemm(context<B>& ctx, T alpha, input<T, B> a, transpose ta, input<T, B> b, transpose tb,
          T beta, matrix_view<T, B> c) {
  detail::check_product<T, T, B>("ops::gemm", a, ta, b, tb, c);
  gemm_impl<B>::run(ctx, alpha, a, ta, b, tb, beta, c);
}

/// The product of stored numbers, half or whole, with sums in `sum_type<S>` and one rounding to C
/// at the end: c = alpha op(a) op(b) + beta c.
///
/// Shapes, edges and cost as gemm. C is S, or float for half S (master gradients, logits).
/// Determinism: the same bits on every run.
/// Throws: shape_error when the shapes do not fit.
template <class B, storage_scalar S, class C>
requires(std::same_as<C, S> ||
         std::same_as<C, sum_type<S>>) void mixed_gemm(context<B>& ctx, sum_type<S> alpha,
                                                       matrix_view<const S, B> a, transpose ta,
                                                       matrix_view<const S, B> b, transpose tb,
                                                       sum_type<S> beta, matrix_view<C, B> c) {
  detail::check_product("ops::mixed_gemm", a, ta, b, tb, c);
  gemm_impl<B>::run(ctx, alpha, a, ta, b, tb, beta, c);
}

/// c = op(a) op(b) + beta c.
template <class B, floating T>
void gemm(context<B>& ctx, input<T, B> a, transpose ta, input<T, B> b, transpose tb, T beta,
          matrix_view<T, B> c) {
  gemm(ctx, T{1}, a, ta, b, tb, beta, c);
}

}  // namespace talpa::ops
