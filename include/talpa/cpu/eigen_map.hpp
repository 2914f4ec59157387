// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/view.hpp>

#include <Eigen/Core>

#include <type_traits>

namespace talpa::detail {

template <class T>
using eigen_matrix = Eigen::Matrix<T, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

/// Row-major Eigen window on a view. Unaligned, so it assumes nothing but alignof(T).
template <class T>
using eigen_map =
    Eigen::Map<std::conditional_t<std::is_const_v<T>, const eigen_matrix<std::remove_const_t<T>>,
                                  eigen_matrix<T>>,
               Eigen::Unaligned, Eigen::OuterStride<>>;

template <class T>
eigen_map<T> map(matrix_view<T, cpu> view) {
  return eigen_map<T>(view.data, view.rows, view.cols, Eigen::OuterStride<>(view.stride));
}

}  // namespace talpa::detail
