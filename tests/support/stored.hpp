// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "support/random.hpp"

#include <talpa/core/half.hpp>
#include <talpa/core/matrix.hpp>

#include <cmath>
#include <limits>
#include <type_traits>

// Numbers stored as halves, beside their values in double.

namespace talpa::support {

/// Unit roundoff of the storage: products are exact in float or rounded far below it, so that a few
/// roundings to the storage are the error.
template <class S>
constexpr double storage_roundoff() {
  return std::is_same_v<S, bfloat16> ? 0x1p-8 : std::is_same_v<S, float16> ? 0x1p-11 : 0x1p-23;
}

template <class S>
matrix<S, cpu> stored(const matrix<double, cpu>& m) {
  matrix<S, cpu> s(m.rows(), m.cols());
  for (index i = 0; i < m.size(); ++i)
    s.data()[i] = static_cast<S>(static_cast<float>(m.data()[i]));
  return s;
}
template <class S>
matrix<S, cpu> random_stored(test_random& random, index rows, index cols, double size = 1.0) {
  return stored<S>(random_matrix<double>(random, rows, cols, size));
}
template <class S>
matrix<double, cpu> whole(matrix_view<const S, cpu> m) {
  matrix<double, cpu> d(m.rows, m.cols);
  for (index r = 0; r < m.rows; ++r) {
    for (index c = 0; c < m.cols; ++c) d(r, c) = static_cast<double>(static_cast<float>(m(r, c)));
  }
  return d;
}
/// ||a - b|| / ||b||; what is not a number counts as infinitely far.
inline double distance(const matrix<double, cpu>& a, const matrix<double, cpu>& b) {
  double error = 0, size = 0;
  for (index i = 0; i < a.size(); ++i) {
    const double d = a.data()[i] - b.data()[i];
    error += d * d;
    size += b.data()[i] * b.data()[i];
  }
  if (error == 0.0) return 0.0;
  const double ratio = std::sqrt(error / size);
  return ratio == ratio ? ratio : std::numeric_limits<double>::infinity();
}

}  // namespace talpa::support
