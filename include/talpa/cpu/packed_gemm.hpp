// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/check.hpp>
#include <talpa/core/half.hpp>
#include <talpa/core/matrix.hpp>
#include <talpa/cpu/tiled_product.hpp>
#include <talpa/ops/packed_gemm.hpp>

#include <concepts>
#include <cstddef>
#include <type_traits>

namespace talpa {

/// Panels [K, 16] of floats or [K, 8] of doubles, one after the other, the last one filled up with
/// zeros; a row of a panel is a cache line. With weight_storage::bfloat16 two rows are one, element
/// by element side by side: [ceil(K / 2), 16, 2].
template <class T>
class packed_matrix<T, cpu> {
 public:
  using scalar = T;

  packed_matrix() = default;
  /// Throws value_error when doubles are to be stored as bfloat16.
  packed_matrix(context<cpu>& ctx, matrix_view<const T, cpu> b, transpose tb,
                weight_storage storage = weight_storage::exact)
      : rows_(detail::rows_of(b, tb)), cols_(detail::cols_of(b, tb)) {
    const auto pack = [&](auto& panels) {
      using packed = std::remove_reference_t<decltype(panels)>;
      panels = packed(detail::packed_size<T, typename packed::scalar>(rows_, cols_));
      detail::pack_panels<T>(ctx, b, tb, 0, cols_, 0, rows_, panels.data());
    };
    if (storage == weight_storage::exact) {
      pack(exact_);
    } else if constexpr (std::same_as<T, float>) {
      pack(rounded_);
    } else {
      detail::throw_value("packed_matrix", "storage", "bfloat16", "exact = storage of doubles");
    }
  }

  /// K and N of op(b).
  index rows() const { return rows_; }
  index cols() const { return cols_; }
  /// Bytes that it owns: K times N rounded up to whole panels, times those of a stored element.
  std::size_t bytes() const {
    return static_cast<std::size_t>(exact_.size()) * sizeof(T) +
           static_cast<std::size_t>(rounded_.size()) * sizeof(bfloat16);
  }
  /// The panels of weight_storage::exact, null with another.
  const T* panels() const { return exact_.data(); }
  /// f(panels) with a pointer to what the elements are stored as.
  template <class F>
  void visit(F f) const {
    if constexpr (std::same_as<T, float>) {
      if (rounded_.size() > 0) return f(rounded_.data());
    }
    f(exact_.data());
  }

 private:
  // One of them, or neither where there are no elements.
  vector<T, cpu> exact_;
  vector<bfloat16, cpu> rounded_;
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
    b.visit([&](const auto* panels) {
      detail::panel_product<T>(ctx, alpha, a, ta, panels, b.rows(), beta, c);
    });
  }
};

}  // namespace talpa::ops
