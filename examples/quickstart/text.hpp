// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <string>
#include <string_view>

namespace talpa::examples {

/// printf into a string.
[[gnu::format(printf, 1, 2)]] inline std::string format(const char* pattern, ...) {
  std::va_list arguments;
  va_start(arguments, pattern);
  std::va_list again;
  va_copy(again, arguments);
  const int length = std::vsnprintf(nullptr, 0, pattern, arguments);
  va_end(arguments);
  std::string text(length > 0 ? static_cast<std::size_t>(length) : 0, '\0');
  if (!text.empty()) std::vsnprintf(text.data(), text.size() + 1, pattern, again);
  va_end(again);
  return text;
}

/// Text that is safe in a one-line message: control bytes become `\xNN`, and what is longer than
/// `limit` bytes ends in `...`. Other bytes, UTF-8 included, stay.
inline std::string printable(std::string_view text, std::size_t limit = 200) {
  std::string result;
  for (const char c : text) {
    if (result.size() >= limit) return result + "...";
    const auto byte = static_cast<unsigned char>(c);
    if (byte < 0x20 || byte == 0x7f) {
      result += format("\\x%02x", static_cast<unsigned>(byte));
    } else {
      result += c;
    }
  }
  return result;
}

/// Like `printable`, and every byte outside ASCII is shown as `\xNN` too: for data that should have
/// been numbers.
inline std::string printable_ascii(std::string_view text, std::size_t limit = 16) {
  std::string result;
  for (const char c : text) {
    if (result.size() >= limit) return result + "...";
    const auto byte = static_cast<unsigned char>(c);
    if (byte < 0x20 || byte >= 0x7f) {
      result += format("\\x%02x", static_cast<unsigned>(byte));
    } else {
      result += c;
    }
  }
  return result;
}

/// 12345 as `12,345`.
inline std::string with_thousands(long long value) {
  const std::string digits = std::to_string(value);
  std::string result;
  for (std::size_t i = 0; i < digits.size(); ++i) {
    const std::size_t left = digits.size() - i;
    if (left % 3 == 0 && !result.empty() && result != "-") result += ',';
    result += digits[i];
  }
  return result;
}

/// A number with `decimals` digits after the point; what is not finite becomes `n/a`.
inline std::string fixed(double value, int decimals) {
  if (!std::isfinite(value)) return "n/a";
  std::string text = format("%.*f", decimals, value);
  // A rounded -0.0 would read as a sign that the value does not have.
  if (text.find_first_not_of("-0.") == std::string::npos && text.front() == '-') text.erase(0, 1);
  return text;
}

/// A fraction 0..1 in per cent, without the sign.
inline std::string percent(double fraction, int decimals = 1) {
  return fixed(100.0 * fraction, decimals);
}

/// A duration for people: `9.4 s`, `48 s`, `2 min 05 s`.
inline std::string duration(double seconds) {
  if (!std::isfinite(seconds)) return "n/a";
  if (seconds < 9.95) return fixed(seconds, 1) + " s";
  const auto whole = static_cast<long long>(seconds + 0.5);
  if (whole < 60) return std::to_string(whole) + " s";
  return format("%lld min %02lld s", whole / 60, whole % 60);
}

}  // namespace talpa::examples
