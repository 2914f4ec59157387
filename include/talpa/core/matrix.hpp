// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/storage.hpp>
#include <talpa/core/view.hpp>

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <type_traits>
#include <utility>

namespace talpa {

/// Owning row-major matrix. The host one copies by value; device ones are move-only, because a copy
/// would hide a stream. Making one allocates and waits for the device: not within a step.
template <class T, backend B>
class matrix {
  static_assert(std::is_trivially_copyable_v<T>, "talpa: matrices hold trivially copyable scalars");

 public:
  using scalar = T;

  matrix() = default;
  /// [rows, cols], filled with zeros.
  matrix(index rows, index cols)
      : block_(static_cast<std::size_t>(rows * cols) * sizeof(T)), rows_(rows), cols_(cols) {
    if (block_.size() > 0) detail::storage<B>::clear(block_.data(), block_.size());
  }
  matrix(matrix&& other) noexcept
      : block_(std::move(other.block_)),
        rows_(std::exchange(other.rows_, 0)),
        cols_(std::exchange(other.cols_, 0)) {}
  matrix& operator=(matrix&& other) noexcept {
    block_ = std::move(other.block_);
    std::swap(rows_, other.rows_);
    std::swap(cols_, other.cols_);
    return *this;
  }

  index rows() const { return rows_; }
  index cols() const { return cols_; }
  index size() const { return rows_ * cols_; }
  T* data() { return reinterpret_cast<T*>(block_.data()); }
  const T* data() const { return reinterpret_cast<const T*>(block_.data()); }

  matrix_view<T, B> view() { return {data(), rows_, cols_}; }
  matrix_view<const T, B> view() const { return {data(), rows_, cols_}; }
  operator matrix_view<T, B>() { return view(); }              // NOLINT: conversion intended
  operator matrix_view<const T, B>() const { return view(); }  // NOLINT: conversion intended

 private:
  detail::block<B> block_;
  index rows_ = 0;
  index cols_ = 0;
};

template <class T>
class matrix<T, cpu> {
  static_assert(std::is_trivially_copyable_v<T>, "talpa: matrices hold trivially copyable scalars");

 public:
  using scalar = T;

  matrix() = default;
  /// [rows, cols], filled with zeros.
  matrix(index rows, index cols)
      : block_(static_cast<std::size_t>(rows * cols) * sizeof(T)), rows_(rows), cols_(cols) {
    std::fill_n(data(), size(), T{});
  }
  /// A copy of what a view shows.
  explicit matrix(matrix_view<const T, cpu> source)
      : block_(static_cast<std::size_t>(source.size()) * sizeof(T)),
        rows_(source.rows),
        cols_(source.cols) {
    for (index r = 0; r < rows_; ++r) std::copy_n(source.row(r), cols_, data() + r * cols_);
  }
  matrix(const matrix& other) : matrix(other.view()) {}
  matrix(matrix&& other) noexcept
      : block_(std::move(other.block_)),
        rows_(std::exchange(other.rows_, 0)),
        cols_(std::exchange(other.cols_, 0)) {}
  matrix& operator=(matrix other) noexcept {
    block_ = std::move(other.block_);
    std::swap(rows_, other.rows_);
    std::swap(cols_, other.cols_);
    return *this;
  }

  index rows() const { return rows_; }
  index cols() const { return cols_; }
  index size() const { return rows_ * cols_; }
  T* data() { return reinterpret_cast<T*>(block_.data()); }
  const T* data() const { return reinterpret_cast<const T*>(block_.data()); }
  T& operator()(index r, index c) { return data()[r * cols_ + c]; }
  const T& operator()(index r, index c) const { return data()[r * cols_ + c]; }

  matrix_view<T, cpu> view() { return {data(), rows_, cols_}; }
  matrix_view<const T, cpu> view() const { return {data(), rows_, cols_}; }
  operator matrix_view<T, cpu>() { return view(); }              // NOLINT: conversion intended
  operator matrix_view<const T, cpu>() const { return view(); }  // NOLINT: conversion intended

 private:
  detail::block<cpu> block_;
  index rows_ = 0;
  index cols_ = 0;
};

/// Owning vector; see matrix.
template <class T, backend B>
class vector {
 public:
  using scalar = T;

  vector() = default;
  explicit vector(index size) : values_(1, size) {}

  index size() const { return values_.size(); }
  T* data() { return values_.data(); }
  const T* data() const { return values_.data(); }
  T& operator[](index i) requires std::same_as<B, cpu> { return data()[i]; }
  const T& operator[](index i) const requires std::same_as<B, cpu> { return data()[i]; }

  vector_view<T, B> view() { return {data(), size()}; }
  vector_view<const T, B> view() const { return {data(), size()}; }
  operator vector_view<T, B>() { return view(); }              // NOLINT: conversion intended
  operator vector_view<const T, B>() const { return view(); }  // NOLINT: conversion intended

 private:
  matrix<T, B> values_;
};

}  // namespace talpa
