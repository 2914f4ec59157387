// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/check.hpp>
#include <talpa/core/matrix.hpp>

#include <concepts>
#include <type_traits>

namespace talpa {

/// Copies a matrix of the host to another backend. Returns when the data has arrived, so it is no
/// part of a step. Shapes: both [R, C], any strides. Throws: shape_error, device_error.
template <class T, backend B>
void to_device(std::type_identity_t<matrix_view<const T, cpu>> from, matrix_view<T, B> to) {
  check_shape("to_device", "to", to, from.rows, from.cols, "shape of from");
  if (to.empty()) return;
  detail::storage<B>::write(to.data, static_cast<std::size_t>(to.stride) * sizeof(T), from.data,
                            static_cast<std::size_t>(from.stride) * sizeof(T),
                            static_cast<std::size_t>(to.cols) * sizeof(T), to.rows);
}

/// Copies a matrix of another backend to the host, once what wrote it is done. Returns when the
/// data has arrived. Shapes: both [R, C], any strides. Throws: shape_error, device_error.
template <class T, backend B>
void to_host(matrix_view<const T, B> from, std::type_identity_t<matrix_view<T, cpu>> to) {
  check_shape("to_host", "to", to, from.rows, from.cols, "shape of from");
  if (to.empty()) return;
  detail::storage<B>::read(to.data, static_cast<std::size_t>(to.stride) * sizeof(T), from.data,
                           static_cast<std::size_t>(from.stride) * sizeof(T),
                           static_cast<std::size_t>(to.cols) * sizeof(T), to.rows);
}

/// A copy in a matrix of its own: to_device<gpu>(weights).
template <backend B, class T>
matrix<std::remove_const_t<T>, B> to_device(matrix_view<T, cpu> from) {
  matrix<std::remove_const_t<T>, B> copy(from.rows, from.cols);
  to_device<std::remove_const_t<T>, B>(from, copy.view());
  return copy;
}
template <class T, backend B>
matrix<std::remove_const_t<T>, cpu> to_host(matrix_view<T, B> from) {
  matrix<std::remove_const_t<T>, cpu> copy(from.rows, from.cols);
  to_host<std::remove_const_t<T>, B>(from, copy.view());
  return copy;
}

namespace detail {

/// A copy in a matrix of its own on the same backend, on a device by way of the host.
template <class T, backend B>
matrix<std::remove_const_t<T>, B> copy_of(matrix_view<T, B> from) {
  if constexpr (std::same_as<B, cpu>) {
    return matrix<std::remove_const_t<T>, cpu>(from);
  } else {
    return to_device<B>(to_host(from).view());
  }
}

}  // namespace detail

}  // namespace talpa
