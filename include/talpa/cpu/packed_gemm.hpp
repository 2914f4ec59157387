// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/check.hpp>
#include <talpa/core/half.hpp>
#include <talpa/core/matrix.hpp>
#include <talpa/core/storage.hpp>
#include <talpa/cpu/tiled_product.hpp>
#include <talpa/ops/packed_gemm.hpp>

#include <concepts>
#include <cstddef>
#include <span>
#include <string>

namespace talpa {

/// Panels [K, 16] of floats or [K, 8] of doubles, one after the other, the last one filled up with
/// zeros; a row of a panel is a cache line. With weight_storage::bfloat16 two rows are one, element
/// by element side by side: [ceil(K / 2), 16, 2].
template <class T>
class packed_matrix<T, cpu> {
 public:
  using scalar = T;

  /// Of panels in memory of the caller's, in bytes.
  static constexpr std::size_t alignment = detail::host_alignment;

  packed_matrix() = default;
  /// Throws value_error when doubles are to be stored as bfloat16.
  packed_matrix(context<cpu>& ctx, matrix_view<const T, cpu> b, transpose tb,
                weight_storage storage = weight_storage::exact)
      : packed_matrix("packed_matrix", detail::rows_of(b, tb), detail::cols_of(b, tb), storage) {
    owned_ = vector<std::byte, cpu>(static_cast<index>(bytes()));
    pack(ctx, b, tb, owned_.data());
  }
  /// Packs into memory of the caller's, which must outlive it and its copies.
  /// Throws also when there are fewer than bytes_for(op(b)) bytes, or not aligned.
  packed_matrix(context<cpu>& ctx, matrix_view<const T, cpu> b, transpose tb,
                std::span<std::byte> memory, weight_storage storage = weight_storage::exact)
      : packed_matrix("packed_matrix", detail::rows_of(b, tb), detail::cols_of(b, tb), storage) {
    check_memory("packed_matrix", "memory", memory.data(), memory.size(), alignment);
    if (memory.size() < bytes()) wrong_size("packed_matrix", memory.size(), ">= ");
    borrowed_ = memory.data();
    pack(ctx, b, tb, memory.data());
  }
  /// The matrix [rows, cols] whose panels lie in `memory` as another one's memory() did, on a
  /// machine with the same order of bytes: a mapped file, memory of several processes. Nothing is
  /// copied.
  /// Throws: value_error unless there are bytes_for(rows, cols, storage) bytes, aligned; for
  /// negative sizes; for doubles as bfloat16.
  static packed_matrix borrow(std::span<const std::byte> memory, index rows, index cols,
                              weight_storage storage = weight_storage::exact) {
    constexpr const char* name = "packed_matrix::borrow";
    check_at_least(name, "rows", rows, 0, "rows of the matrix");
    check_at_least(name, "cols", cols, 0, "columns of the matrix");
    packed_matrix made(name, rows, cols, storage);
    check_memory(name, "memory", memory.data(), memory.size(), alignment);
    if (memory.size() != made.bytes()) made.wrong_size(name, memory.size(), "");
    made.borrowed_ = memory.data();
    return made;
  }

  /// Bytes of the panels of [rows, cols]: a multiple of 64. With weight_storage::exact rows times
  /// columns rounded up to whole panels, times sizeof(T); with bfloat16 rows are rounded up to a
  /// multiple of two, times 2.
  static std::size_t bytes_for(index rows, index cols,
                               weight_storage storage = weight_storage::exact) {
    if (storage == weight_storage::exact) {
      return static_cast<std::size_t>(detail::packed_size<T>(rows, cols)) * sizeof(T);
    }
    return static_cast<std::size_t>(detail::packed_size<T, bfloat16>(rows, cols)) *
           sizeof(bfloat16);
  }

  /// K and N of op(b).
  index rows() const { return rows_; }
  index cols() const { return cols_; }
  weight_storage storage() const { return storage_; }
  /// Bytes of its panels, whoever owns them.
  std::size_t bytes() const { return bytes_for(rows_, cols_, storage_); }
  /// Its panels, to be written to where they will be borrowed from.
  std::span<const std::byte> memory() const {
    return {borrowed_ != nullptr ? borrowed_ : owned_.data(), bytes()};
  }
  /// f(panels) with a pointer to what the elements are stored as.
  template <class F>
  void visit(F f) const {
    const std::byte* const panels = memory().data();
    if constexpr (std::same_as<T, float>) {
      if (storage_ == weight_storage::bfloat16) {
        return f(reinterpret_cast<const bfloat16*>(panels));
      }
    }
    f(reinterpret_cast<const T*>(panels));
  }

 private:
  packed_matrix(const char* name, index rows, index cols, weight_storage storage)
      : rows_(rows), cols_(cols), storage_(storage) {
    if (storage != weight_storage::exact && !std::same_as<T, float>) {
      detail::throw_value(name, "storage", "bfloat16", "exact = storage of doubles");
    }
  }

  void pack(context<cpu>& ctx, matrix_view<const T, cpu> b, transpose tb, std::byte* to) const {
    if constexpr (std::same_as<T, float>) {
      if (storage_ == weight_storage::bfloat16) {
        return detail::pack_panels<T>(ctx, b, tb, 0, cols_, 0, rows_,
                                      reinterpret_cast<bfloat16*>(to));
      }
    }
    detail::pack_panels<T>(ctx, b, tb, 0, cols_, 0, rows_, reinterpret_cast<T*>(to));
  }

  [[noreturn]] void wrong_size(const char* name, std::size_t found, const char* relation) const {
    detail::throw_value(name, "memory", detail::concat(std::to_string(found), " bytes"),
                        detail::concat(relation, std::to_string(bytes()), " bytes = panels of ",
                                       detail::shape_text(rows_, cols_)));
  }

  vector<std::byte, cpu> owned_;
  const std::byte* borrowed_ = nullptr;
  index rows_ = 0;
  index cols_ = 0;
  weight_storage storage_ = weight_storage::exact;
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
