// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/index.hpp>

#include <stdexcept>
#include <string>

namespace talpa {

/// Base of everything talpa throws. Texts follow one grammar:
/// `talpa::FUNCTION: 'ARGUMENT' is FOUND, expected EXPECTED = MEANING`.
struct error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// Two shapes that must agree do not.
struct shape_error : error {
  using error::error;
};

/// A number or a set of numbers is outside its range.
struct value_error : error {
  using error::error;
};

/// A device call failed.
struct device_error : error {
  using error::error;
};

/// A file cannot be read or written, or what it holds is malformed.
struct io_error : error {
  using error::error;
};

namespace detail {

/// The parts one after the other. Appending instead of operator+ keeps a false -Wrestrict of
/// gcc 12 away from users.
template <class... Parts>
std::string concat(const Parts&... parts) {
  std::string text;
  (text.append(parts), ...);
  return text;
}

inline std::string shape_text(index rows, index cols) {
  return concat("[", std::to_string(rows), ", ", std::to_string(cols), "]");
}

/// A double in the shortest form that a reader would type.
inline std::string number_text(double value) {
  std::string text = std::to_string(value);
  if (text.find('.') != std::string::npos) {
    while (text.back() == '0') text.pop_back();
    if (text.back() == '.') text.pop_back();
  }
  return text;
}

[[noreturn, gnu::cold, gnu::noinline]] inline void throw_shape(const char* function,
                                                               const char* argument,
                                                               const std::string& found,
                                                               const std::string& expected,
                                                               const char* meaning) {
  throw shape_error(concat("talpa::", function, ": '", argument, "' has shape ", found,
                           ", expected ", expected, " = ", meaning));
}

[[noreturn, gnu::cold, gnu::noinline]] inline void throw_value(const char* function,
                                                               const char* argument,
                                                               const std::string& found,
                                                               const std::string& expected) {
  throw value_error(
      concat("talpa::", function, ": '", argument, "' is ", found, ", expected ", expected));
}

}  // namespace detail

}  // namespace talpa
