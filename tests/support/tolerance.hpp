// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "support/reference.hpp"

#include <talpa/core/index.hpp>
#include <talpa/core/scalar.hpp>
#include <talpa/core/view.hpp>

#include <cmath>
#include <limits>
#include <string>

// Bounds on rounding errors, derived and named, and the comparison that uses them. Notation of
// Higham, Accuracy and Stability of Numerical Algorithms (2002), chapters 2 to 4: u is the unit
// roundoff and gamma_n = n u / (1 - n u) bounds the relative error of n roundings one after
// another.

namespace talpa::support {

/// Half the distance from 1 to the next number.
template <floating T>
constexpr double unit_roundoff() {
  return 0.5 * static_cast<double>(std::numeric_limits<T>::epsilon());
}

/// Higham's gamma_n, for a result in T against a reference that took as many roundings in double.
template <floating T>
constexpr double gamma_bound(double roundings) {
  const double nu = roundings * (unit_roundoff<T>() + unit_roundoff<double>());
  return nu < 1.0 ? nu / (1.0 - nu) : std::numeric_limits<double>::infinity();
}

/// Error of a chain of `roundings` operations without cancellation, result of size `magnitude`.
template <floating T>
double rounding_bound(double roundings, double magnitude) {
  return gamma_bound<T>(roundings) * std::abs(magnitude);
}

/// Error of a sum of `terms` products in any order, where the absolute values of the terms add up
/// to `magnitude`: terms - 1 additions and one multiplication on each path.
template <floating T>
double sum_bound(index terms, double magnitude) {
  return gamma_bound<T>(static_cast<double>(terms < 1 ? 1 : terms)) * std::abs(magnitude);
}

/// Error of a function documented to be within `ulps` of the exact value: an ulp is at most eps
/// |y|.
template <floating T>
double function_bound(double ulps, double magnitude) {
  return 2.0 * ulps * (unit_roundoff<T>() + unit_roundoff<double>()) * std::abs(magnitude);
}

/// Error of (f(x + h) - f(x - h)) / 2h in double: truncation h^2 |f'''| / 6, and twice the error of
/// f, `roundings` roundings of size `magnitude`, over 2h.
inline double central_difference_bound(double step, double third_derivative, double roundings,
                                       double magnitude) {
  return step * step * third_derivative / 6.0 + rounding_bound<double>(roundings, magnitude) / step;
}

/// Step that balances both parts of central_difference_bound.
inline double central_difference_step(double x) {
  const double size = std::abs(x) > 1.0 ? std::abs(x) : 1.0;
  return std::cbrt(std::numeric_limits<double>::epsilon()) * size;
}

/// Whether |actual - expected| <= bound. NaN or infinity in any of the three is a failure.
inline bool within(double actual, double expected, double bound) {
  if (!std::isfinite(actual) || !std::isfinite(expected) || !std::isfinite(bound)) return false;
  return std::abs(actual - expected) <= bound;
}

/// Empty when every element of `actual` is within its bound of `expected`; otherwise a sentence on
/// the first that is not. `bounds` has the shape of `expected` or is [1, 1] for all. A reference
/// whose elements are all equal would accept too much; it is a failure too unless it has 1 element.
template <class T>
std::string difference(const matrix_view<T, cpu>& actual, const table& expected,
                       const table& bounds) {
  if (actual.rows != expected.rows || actual.cols != expected.cols) {
    return "shape [" + std::to_string(actual.rows) + ", " + std::to_string(actual.cols) +
           "] instead of [" + std::to_string(expected.rows) + ", " + std::to_string(expected.cols) +
           "]";
  }
  bool trivial = expected.size() > 1;
  for (index r = 0; r < expected.rows; ++r) {
    for (index c = 0; c < expected.cols; ++c) {
      const double found = static_cast<double>(actual(r, c));
      const double bound = bounds.size() == 1 ? bounds(0, 0) : bounds(r, c);
      if (!within(found, expected(r, c), bound)) {
        return "element (" + std::to_string(r) + ", " + std::to_string(c) + ") is " +
               exact_text(found) + ", expected " + exact_text(expected(r, c)) + " within " +
               exact_text(bound);
      }
      trivial = trivial && expected(r, c) == expected(0, 0);
    }
  }
  return trivial ? "the reference has one value everywhere and proves nothing" : "";
}
template <class T>
std::string difference(const matrix_view<T, cpu>& actual, const table& expected, double bound) {
  return difference(actual, expected, table(1, 1, bound));
}

/// Whether two views hold the same bits (all NaNs count as one).
template <class T, class U>
bool same_bits(const matrix_view<T, cpu>& a, const matrix_view<U, cpu>& b) {
  if (a.rows != b.rows || a.cols != b.cols) return false;
  for (index r = 0; r < a.rows; ++r) {
    for (index c = 0; c < a.cols; ++c) {
      const bool equal = a(r, c) == b(r, c) && std::signbit(a(r, c)) == std::signbit(b(r, c));
      if (!equal && !(std::isnan(a(r, c)) && std::isnan(b(r, c)))) return false;
    }
  }
  return true;
}

}  // namespace talpa::support
