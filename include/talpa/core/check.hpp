// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/error.hpp>
#include <talpa/core/view.hpp>

#include <cstddef>
#include <cstdint>

namespace talpa {

/// Throws shape_error unless `view` is [rows, cols]; `meaning` says where these numbers come from.
template <class T, class B>
void check_shape(const char* function, const char* argument, const matrix_view<T, B>& view,
                 index rows, index cols, const char* meaning) {
  if (view.rows != rows || view.cols != cols) {
    detail::throw_shape(function, argument, view.rows, view.cols, rows, cols, meaning);
  }
}

/// Throws shape_error unless `view` has `size` elements.
template <class T, class B>
void check_size(const char* function, const char* argument, const vector_view<T, B>& view,
                index size, const char* meaning) {
  if (view.size != size) detail::throw_size(function, argument, view.size, size, meaning);
}

/// Throws value_error unless low <= value <= high: `'k' is 9, expected 1..8 = experts`.
inline void check_range(const char* function, const char* argument, index value, index low,
                        index high, const char* meaning) {
  if (value < low || value > high) {
    detail::throw_range(function, argument, value, low, high, meaning);
  }
}

/// Throws value_error unless value >= low: `'rank' is 0, expected >= 1 = width of the adapter`.
inline void check_at_least(const char* function, const char* argument, index value, index low,
                           const char* meaning) {
  if (value < low) detail::throw_below(function, argument, value, low, meaning);
}

/// Throws value_error unless `ok`: for conditions on real numbers, with the range in words.
inline void check_value(bool ok, const char* function, const char* argument, double value,
                        const char* expected) {
  if (!ok) detail::throw_number(function, argument, value, expected);
}

/// Throws value_error unless `memory` of the caller's is an address of `bytes` bytes, a multiple of
/// `alignment`; null will do for none.
inline void check_memory(const char* function, const char* argument, const void* memory,
                         std::size_t bytes, std::size_t alignment) {
  if (memory == nullptr && bytes > 0) {
    detail::throw_value(function, argument, "null",
                        detail::concat("an address of ", std::to_string(bytes), " bytes"));
  }
  const std::size_t past = reinterpret_cast<std::uintptr_t>(memory) % alignment;
  if (past != 0) {
    const std::string unit = detail::concat("a multiple of ", std::to_string(alignment));
    detail::throw_value(function, argument,
                        detail::concat(std::to_string(past), " bytes past ", unit),
                        detail::concat(unit, " = alignment of what lies there"));
  }
}

/// Throws value_error unless `length` is 0 (one sequence) or divides the number of tokens.
inline void check_sequence_length(const char* function, index length, index tokens) {
  if (length < 0 || (length > 0 && tokens % length != 0)) {
    detail::throw_value(function, "sequence_length", std::to_string(length),
                        detail::concat("a divisor of ", std::to_string(tokens), " = tokens, or 0"));
  }
}

}  // namespace talpa
