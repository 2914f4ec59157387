// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/error.hpp>
#include <talpa/core/matrix.hpp>
#include <talpa/core/scalar.hpp>
#include <talpa/testing/report.hpp>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

// Bounds on rounding errors and the comparisons that use them, in the notation of Higham, Accuracy
// and Stability of Numerical Algorithms (2002), chapter 3: u is the unit roundoff, and gamma(n) =
// n u / (1 - n u) bounds the relative error of n roundings one after another.

namespace talpa::testing {

/// Higham's gamma_n for scalar T; infinite once n u reaches 1.
template <floating T>
constexpr double gamma(double roundings) {
  const double nu = roundings * 0.5 * static_cast<double>(std::numeric_limits<T>::epsilon());
  return nu < 1.0 ? nu / (1.0 - nu) : std::numeric_limits<double>::infinity();
}

/// Same number with the same sign of zero; all NaNs count as one.
template <class T>
bool same_number(T a, T b) {
  if (a == b) return std::signbit(a) == std::signbit(b);
  return a != a && b != b;
}
inline bool same_number(std::uint32_t a, std::uint32_t b) { return a == b; }

/// Largest absolute value; 0 of nothing.
template <class T>
double largest(const matrix_view<T, cpu>& m) {
  double most = 0.0;
  for (index r = 0; r < m.rows; ++r) {
    for (index c = 0; c < m.cols; ++c) {
      most = std::max(most, std::abs(static_cast<double>(m(r, c))));
    }
  }
  return most;
}

/// Empty when two views of one shape hold the same bits; otherwise a sentence on the first element
/// that differs. `first_row` is added to its row number.
template <class T>
std::string first_difference(const matrix_view<const T, cpu>& found,
                             const matrix_view<const T, cpu>& expected, index first_row = 0) {
  using talpa::detail::concat, talpa::detail::shape_text;
  if (found.rows != expected.rows || found.cols != expected.cols) {
    return concat("shape ", shape_text(found.rows, found.cols), " instead of ",
                  shape_text(expected.rows, expected.cols));
  }
  for (index r = 0; r < found.rows; ++r) {
    for (index c = 0; c < found.cols; ++c) {
      if (same_number(found(r, c), expected(r, c))) continue;
      return concat("element ", shape_text(first_row + r, c), " is ",
                    digits(static_cast<double>(found(r, c))), " instead of ",
                    digits(static_cast<double>(expected(r, c))));
    }
  }
  return {};
}
template <class T>
std::string first_difference(const matrix<T, cpu>& found, const matrix<T, cpu>& expected) {
  return first_difference<T>(found.view(), expected.view());
}

/// Empty when |found - expected| <= bound(r, c) everywhere; otherwise a sentence on the first
/// element where not. NaN and infinity in any of the three are failures.
template <class T, class U, class Bound>
std::string first_excess(const matrix_view<T, cpu>& found, const matrix_view<U, cpu>& expected,
                         Bound bound) {
  using talpa::detail::concat, talpa::detail::shape_text;
  if (found.rows != expected.rows || found.cols != expected.cols) {
    return concat("shape ", shape_text(found.rows, found.cols), " instead of ",
                  shape_text(expected.rows, expected.cols));
  }
  for (index r = 0; r < found.rows; ++r) {
    for (index c = 0; c < found.cols; ++c) {
      const double a = static_cast<double>(found(r, c)), b = static_cast<double>(expected(r, c));
      const double allowed = bound(r, c);
      if (std::isfinite(a) && std::isfinite(b) && std::isfinite(allowed) &&
          std::abs(a - b) <= allowed) {
        continue;
      }
      return concat("element ", shape_text(r, c), " is ", digits(a), " instead of ", digits(b),
                    ", bound ", digits(allowed));
    }
  }
  return {};
}

}  // namespace talpa::testing
