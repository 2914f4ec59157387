// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/view.hpp>

#include <algorithm>
#include <cstddef>
#include <new>
#include <type_traits>
#include <utility>

namespace talpa {

namespace detail {

/// Alignment of every block the library allocates: one cache line. It depends on no compiler flag,
/// so objects of translation units with different -march can share matrices.
inline constexpr std::size_t host_alignment = 64;

/// Aligned, uninitialised storage of trivially copyable elements on the host.
template <class T>
class host_block {
  static_assert(std::is_trivially_copyable_v<T>, "talpa: matrices hold trivially copyable scalars");

 public:
  host_block() = default;
  explicit host_block(index n) : size_(n) {
    if (n > 0) {
      data_ = static_cast<T*>(::operator new (static_cast<std::size_t>(n) * sizeof(T),
                                              std::align_val_t{host_alignment}));
    }
  }
  host_block(const host_block& other) : host_block(other.size_) {
    std::copy_n(other.data_, size_, data_);
  }
  host_block(host_block&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}
  host_block& operator=(host_block other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }
  ~host_block() {
    if (data_ != nullptr) ::operator delete (data_, std::align_val_t{host_alignment});
  }

  T* data() { return data_; }
  const T* data() const { return data_; }
  index size() const { return size_; }

 private:
  T* data_ = nullptr;
  index size_ = 0;
};

}  // namespace detail

/// Owning row-major matrix. The host one copies by value; device ones are move-only, because a copy
/// would hide a stream.
template <class T, backend B>
class matrix;

template <class T>
class matrix<T, cpu> {
 public:
  using scalar = T;

  matrix() = default;
  /// [rows, cols], filled with zeros.
  matrix(index rows, index cols) : block_(rows * cols), rows_(rows), cols_(cols) {
    std::fill_n(block_.data(), size(), T{});
  }
  /// A copy of what a view shows.
  explicit matrix(matrix_view<const T, cpu> source)
      : block_(source.rows * source.cols), rows_(source.rows), cols_(source.cols) {
    for (index r = 0; r < rows_; ++r) std::copy_n(source.row(r), cols_, data() + r * cols_);
  }

  index rows() const { return rows_; }
  index cols() const { return cols_; }
  index size() const { return rows_ * cols_; }
  T* data() { return block_.data(); }
  const T* data() const { return block_.data(); }
  T& operator()(index r, index c) { return block_.data()[r * cols_ + c]; }
  const T& operator()(index r, index c) const { return block_.data()[r * cols_ + c]; }

  matrix_view<T, cpu> view() { return {data(), rows_, cols_}; }
  matrix_view<const T, cpu> view() const { return {data(), rows_, cols_}; }
  operator matrix_view<T, cpu>() { return view(); }              // NOLINT: conversion intended
  operator matrix_view<const T, cpu>() const { return view(); }  // NOLINT: conversion intended

 private:
  detail::host_block<T> block_;
  index rows_ = 0;
  index cols_ = 0;
};

/// Owning vector; see matrix.
template <class T, backend B>
class vector;

template <class T>
class vector<T, cpu> {
 public:
  using scalar = T;

  vector() = default;
  explicit vector(index size) : block_(size) { std::fill_n(block_.data(), size, T{}); }

  index size() const { return block_.size(); }
  T* data() { return block_.data(); }
  const T* data() const { return block_.data(); }
  T& operator[](index i) { return block_.data()[i]; }
  const T& operator[](index i) const { return block_.data()[i]; }

  vector_view<T, cpu> view() { return {data(), size()}; }
  vector_view<const T, cpu> view() const { return {data(), size()}; }
  operator vector_view<T, cpu>() { return view(); }              // NOLINT: conversion intended
  operator vector_view<const T, cpu>() const { return view(); }  // NOLINT: conversion intended

 private:
  detail::host_block<T> block_;
};

}  // namespace talpa
