// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/matrix.hpp>
#include <talpa/core/random.hpp>

namespace talpa {

/// Fills host memory with uniform numbers in [-bound, bound), one fresh stream of `random`.
/// Element (r, c) of [rows, cols] takes number r * cols + c, so the stride does not matter.
template <class T>
void fill_uniform(matrix_view<T, cpu> m, double bound, generator& random) {
  const random_stream stream = random.next();
  for (index r = 0; r < m.rows; ++r) {
    for (index c = 0; c < m.cols; ++c) {
      const auto i = static_cast<std::uint64_t>(r * m.cols + c);
      m(r, c) = static_cast<T>(bound * (2.0 * uniform<double>(stream, i) - 1.0));
    }
  }
}

/// Fills host memory with normal numbers of the given standard deviation, likewise.
template <class T>
void fill_normal(matrix_view<T, cpu> m, double deviation, generator& random) {
  const random_stream stream = random.next();
  for (index r = 0; r < m.rows; ++r) {
    for (index c = 0; c < m.cols; ++c) {
      const auto i = static_cast<std::uint64_t>(r * m.cols + c);
      m(r, c) = static_cast<T>(deviation * normal<double>(stream, i));
    }
  }
}

}  // namespace talpa
