// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/matrix.hpp>
#include <talpa/cpu/tiled_product.hpp>
#include <talpa/ops/packed_gemm.hpp>

#include <cstddef>

namespace talpa {

/// Panels [K, 16] of floats or [K, 8] of doubles, one after the other, the last one filled up with
/// zeros; a row of a panel is a cache line.
template <class T>
class packed_matrix<T, cpu> {
 public:
  using scalar = T;

  packed_matrix() = default;
  packed_matrix(context<cpu>& ctx, matrix_view<const T, cpu> b, transpose tb)
      : panels_(detail::packed_size<T>(detail::rows_of(b, tb), detail::cols_of(b, tb))),
        rows_(detail::rows_of(b, tb)),
        cols_(detail::cols_of(b, tb)) {
    detail::pack_panels<T>(ctx, b, tb, 0, cols_, 0, rows_, panels_.data());
  }

  /// K and N of op(b).
  index rows() const { return rows_; }
  index cols() const { return cols_; }
  /// Bytes that it owns: K times N rounded up to a cache line, times that of a scalar.
  std::size_t bytes() const { return static_cast<std::size_t>(panels_.size()) * sizeof(T); }
  const T* panels() const { return panels_.data(); }

 private:
  vector<T, cpu> panels_;
  index rows_ = 0;
  index cols_ = 0;
};

}  // namespace talpa

namespace talpa::ops {

template <>
struct packed_gemm_impl<cpu> {
  template <class T>
  static void run(context<cpu>& ctx, T alpha, matrix_view<const T, cpu> a, transpose ta,
                  const packed_matrix<T, cpu>& b, T beta, matrix_view<T, cpu> c) {
    if (c.empty()) return;
    if (b.rows() == 0) {
      for (index i = 0; i < c.rows; ++i) {
        T* const row = c.row(i);
        for (index j = 0; j < c.cols; ++j) row[j] = beta == T{0} ? T{0} : beta * row[j];
      }
      return;
    }
    detail::panel_product<T>(ctx, alpha, a, ta, b.panels(), b.rows(), beta, c);
  }
};

}  // namespace talpa::ops
