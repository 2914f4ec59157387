// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/matrix.hpp>
#include <talpa/core/random.hpp>
#include <talpa/core/transfer.hpp>

#include <algorithm>
#include <type_traits>

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

/// The same numbers in memory of another backend: made on the host, then copied.
template <class T, backend B>
void fill_uniform(matrix_view<T, B> m, double bound, generator& random) {
  matrix<T, cpu> values(m.rows, m.cols);
  fill_uniform(values.view(), bound, random);
  to_device<T, B>(values, m);
}
template <class T, backend B>
void fill_normal(matrix_view<T, B> m, double deviation, generator& random) {
  matrix<T, cpu> values(m.rows, m.cols);
  fill_normal(values.view(), deviation, random);
  to_device<T, B>(values, m);
}

/// Fills memory of any backend with one number.
template <class T, backend B>
void fill_constant(matrix_view<T, B> m, std::type_identity_t<T> value) {
  matrix<T, cpu> values(m.rows, m.cols);
  std::fill_n(values.data(), values.size(), value);
  to_device<T, B>(values, m);
}

}  // namespace talpa
