// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/index.hpp>

#include <initializer_list>
#include <stdexcept>
#include <string>
#include <string_view>

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

// Texts are made out of line: a check costs its caller a comparison, in time and in code.
namespace detail {

/// The parts one after the other. Appending instead of operator+ keeps a false -Wrestrict of
/// gcc 12 away from users.
[[gnu::cold, gnu::noinline]] inline std::string join(
    std::initializer_list<std::string_view> parts) {
  std::string text;
  for (const std::string_view part : parts) text.append(part);
  return text;
}

/// The same of anything that a string_view shows.
template <class... Parts>
std::string concat(const Parts&... parts) {
  return join({std::string_view(parts)...});
}

[[gnu::cold, gnu::noinline]] inline std::string shape_text(index rows, index cols) {
  return concat("[", std::to_string(rows), ", ", std::to_string(cols), "]");
}

/// A double in the shortest form that a reader would type.
[[gnu::cold, gnu::noinline]] inline std::string number_text(double value) {
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

[[noreturn, gnu::cold, gnu::noinline]] inline void throw_shape(const char* function,
                                                               const char* argument,
                                                               index found_rows, index found_cols,
                                                               index rows, index cols,
                                                               const char* meaning) {
  throw_shape(function, argument, shape_text(found_rows, found_cols), shape_text(rows, cols),
              meaning);
}

[[noreturn, gnu::cold, gnu::noinline]] inline void throw_size(const char* function,
                                                              const char* argument, index found,
                                                              index size, const char* meaning) {
  throw_shape(function, argument, concat("[", std::to_string(found), "]"),
              concat("[", std::to_string(size), "]"), meaning);
}

[[noreturn, gnu::cold, gnu::noinline]] inline void throw_value(const char* function,
                                                               const char* argument,
                                                               const std::string& found,
                                                               const std::string& expected) {
  throw value_error(
      concat("talpa::", function, ": '", argument, "' is ", found, ", expected ", expected));
}

[[noreturn, gnu::cold, gnu::noinline]] inline void throw_range(const char* function,
                                                               const char* argument, index value,
                                                               index low, index high,
                                                               const char* meaning) {
  throw_value(function, argument, std::to_string(value),
              concat(std::to_string(low), "..", std::to_string(high), " = ", meaning));
}

[[noreturn, gnu::cold, gnu::noinline]] inline void throw_below(const char* function,
                                                               const char* argument, index value,
                                                               index low, const char* meaning) {
  throw_value(function, argument, std::to_string(value),
              concat(">= ", std::to_string(low), " = ", meaning));
}

[[noreturn, gnu::cold, gnu::noinline]] inline void throw_number(const char* function,
                                                                const char* argument, double value,
                                                                const char* expected) {
  throw_value(function, argument, number_text(value), expected);
}

}  // namespace detail

}  // namespace talpa
