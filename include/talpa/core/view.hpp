// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/backend.hpp>
#include <talpa/core/config.hpp>
#include <talpa/core/index.hpp>

#include <concepts>
#include <type_traits>

namespace talpa {

/// Row-major window on memory of backend B that it does not own: the zero-copy boundary to every
/// framework. Element (r, c) is data[r * stride + c]; stride counts elements and is >= cols.
template <class T, backend B>
struct matrix_view {
  using scalar = T;
  using backend_type = B;

  T* data = nullptr;
  index rows = 0;
  index cols = 0;
  index stride = 0;

  matrix_view() = default;
  TALPA_HD matrix_view(T* data_, index rows_, index cols_)
      : data(data_), rows(rows_), cols(cols_), stride(cols_) {}
  TALPA_HD matrix_view(T* data_, index rows_, index cols_, index stride_)
      : data(data_), rows(rows_), cols(cols_), stride(stride_) {}

  /// A mutable view converts to a const one.
  template <class U>
  requires std::same_as<T, const U> TALPA_HD
  matrix_view(const matrix_view<U, B>& other)  // NOLINT: conversion intended
      : data(other.data), rows(other.rows), cols(other.cols), stride(other.stride) {}

  TALPA_HD T& operator()(index r, index c) const { return data[r * stride + c]; }
  TALPA_HD T* row(index r) const { return data + r * stride; }
  TALPA_HD index size() const { return rows * cols; }
  TALPA_HD bool empty() const { return rows == 0 || cols == 0; }
  /// Rows [first, first + count).
  TALPA_HD matrix_view row_range(index first, index count) const {
    return {data + first * stride, count, cols, stride};
  }
  /// Columns [first, first + count).
  TALPA_HD matrix_view col_range(index first, index count) const {
    return {data + first, rows, count, stride};
  }
};

/// Contiguous vector that it does not own.
template <class T, backend B>
struct vector_view {
  using scalar = T;
  using backend_type = B;

  T* data = nullptr;
  index size = 0;

  vector_view() = default;
  TALPA_HD vector_view(T* data_, index size_) : data(data_), size(size_) {}
  template <class U>
  requires std::same_as<T, const U> TALPA_HD
  vector_view(const vector_view<U, B>& other)  // NOLINT: conversion intended
      : data(other.data), size(other.size) {}

  TALPA_HD T& operator[](index i) const { return data[i]; }
  TALPA_HD bool empty() const { return size == 0; }
};

/// A vector [S] as a matrix [S, 1].
template <class T, backend B>
TALPA_HD matrix_view<T, B> as_column(vector_view<T, B> v) {
  return {v.data, v.size, 1};
}

/// Read-only arguments of ops. Not deduced: T and B come from the output or the context, so a
/// mutable view or an owning matrix converts at the call.
template <class T, class B>
using input = std::type_identity_t<matrix_view<const T, B>>;
template <class T, class B>
using vector_input = std::type_identity_t<vector_view<const T, B>>;

/// Output arguments of ops whose T and B are deduced elsewhere.
template <class T, class B>
using output = std::type_identity_t<matrix_view<T, B>>;
template <class T, class B>
using vector_output = std::type_identity_t<vector_view<T, B>>;

}  // namespace talpa
