// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/ops/gemm.hpp>

#include <concepts>
#include <type_traits>

namespace talpa {

/// What the elements of a packed matrix are stored as.
enum class weight_storage {
  exact,     ///< as they are
  bfloat16,  ///< floats rounded to bfloat16, in half the memory; sums are formed in float
};

/// A matrix op(b) [K, N] in the layout in which products of backend B read their right operand:
/// frozen weights are packed once and multiplied many times. It holds a copy of the values, its own
/// or in memory of the caller's; later changes of b do not reach it.
///
/// W [O, D] is packed as op(b) = W^T for y = x W^T, and a second time as op(b) = W for dx = dy W.
template <class T, class B>
class packed_matrix {
  static_assert(detail::always_false<B>,
                "talpa: packed_matrix has no implementation for this backend here, include "
                "talpa/cpu/packed_gemm.hpp for cpu (docs/architecture.md)");
};

/// The product a b of rows [N, K] and a packed matrix [K, Q], plus bias [1, Q] in each row where
/// there is one, that somebody will form; none without a b.
template <class T, class B>
struct packed_product {
  matrix_view<const T, B> a;
  const packed_matrix<T, B>* b = nullptr;
  matrix_view<const T, B> bias{};
};

namespace detail {

/// A bias, where there is one, as wide as the product.
template <class T, class B>
void check_product_bias(const char* function, const packed_product<T, B>& product) {
  if (product.bias.empty()) return;
  check_shape(function, "bias", product.bias, 1, product.b->cols(), "one row, columns of b");
}

}  // namespace detail

/// Backends that have packed_matrix.
template <class B>
inline constexpr bool has_packed_matrix = std::same_as<B, cpu>;

}  // namespace talpa

namespace talpa::ops {

template <class B>
struct packed_gemm_impl {
  static_assert(detail::always_false<B>,
                "talpa: ops::gemm of a packed_matrix has no implementation for this backend here, "
                "include talpa/cpu/packed_gemm.hpp for cpu (docs/architecture.md)");
};

/// Computes c = alpha op(a) b + beta c with a packed right operand.
///
/// Shapes: op(a) [M, K], b [K, N], c [M, N]; views may be strided.
/// Edges: beta == 0 ignores what c held, NaN included; K == 0 leaves beta c; M == 0 or N == 0 does
/// nothing. c must not overlap a.
/// Cost: 2 M N K flop.
/// Determinism: the same bits for any number of threads; a row of c depends on its row of op(a)
/// only, not on the other rows or their number.
/// Throws: shape_error when the shapes do not fit.
template <class B, floating T>
void gemm(context<B>& ctx, T alpha, input<T, B> a, transpose ta,
          const std::type_identity_t<packed_matrix<T, B>>& b, T beta, matrix_view<T, B> c) {
  const index m = detail::rows_of(a, ta), k = detail::cols_of(a, ta);
  if (b.rows() != k) {
    detail::throw_shape("ops::gemm", "b", detail::shape_text(b.rows(), b.cols()),
                        detail::concat("[", std::to_string(k), ", ...]"), "inner size of a");
  }
  check_shape("ops::gemm", "c", c, m, b.cols(), "rows of op(a), columns of b");
  packed_gemm_impl<B>::run(ctx, alpha, a, ta, b, beta, c);
}

/// c = op(a) b + beta c.
template <class B, floating T>
void gemm(context<B>& ctx, input<T, B> a, transpose ta,
          const std::type_identity_t<packed_matrix<T, B>>& b, T beta, matrix_view<T, B> c) {
  gemm(ctx, T{1}, a, ta, b, beta, c);
}

}  // namespace talpa::ops
