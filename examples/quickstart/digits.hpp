// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "text.hpp"

#include <talpa/core/error.hpp>
#include <talpa/core/index.hpp>
#include <talpa/core/random.hpp>

#include <algorithm>
#include <array>
#include <cerrno>
#include <charconv>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <numeric>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace talpa::examples {

inline constexpr index pixel_count = 64;
inline constexpr index digit_count = 10;
inline constexpr int max_intensity = 16;
/// Fewer rows than this of any digit cannot be split into a training and a held-out part.
inline constexpr index min_rows_per_digit = 10;
inline constexpr std::size_t max_data_bytes = std::size_t{64} << 20;

/// Images of 8 x 8 pixels with the digit that each shows.
struct digits {
  std::vector<std::uint8_t> pixels;  // [N, 64], 0..16, row-major
  std::vector<std::uint8_t> labels;  // [N], 0..9

  index rows() const { return static_cast<index>(labels.size()); }
  const std::uint8_t* image(index row) const { return pixels.data() + row * pixel_count; }
  /// A pixel of an image, 0..1.
  float ink(index row, index pixel) const {
    return static_cast<float>(image(row)[pixel]) / static_cast<float>(max_intensity);
  }
  int label(index row) const { return labels[static_cast<std::size_t>(row)]; }
};

namespace detail {

struct close_file {
  void operator()(std::FILE* file) const { std::fclose(file); }
};
using file_handle = std::unique_ptr<std::FILE, close_file>;

[[noreturn, gnu::cold]] inline void throw_data(const std::string& path, const std::string& rest) {
  throw io_error("talpa::examples::load_digits: '" + printable(path) + "' " + rest);
}

inline std::string read_data(const std::string& path) {
  errno = 0;
  const file_handle file(std::fopen(path.c_str(), "rb"));
  const auto unreadable = [&] {
    throw_data(path, std::string("is unreadable (") + std::strerror(errno) +
                         "), expected a file = 65 integers a line");
  };
  if (!file) unreadable();
  std::string text;
  std::array<char, 65536> block;
  while (const std::size_t size = std::fread(block.data(), 1, block.size(), file.get())) {
    text.append(block.data(), size);
    if (text.size() > max_data_bytes) {
      throw_data(path, format("has more than %zu bytes, expected at most %zu = 64 MiB",
                              max_data_bytes, max_data_bytes));
    }
  }
  if (std::ferror(file.get())) unreadable();
  return text;
}

/// One row. `line` is without its line break.
inline void parse_row(const std::string& path, index line_number, std::string_view line,
                      digits& data) {
  const auto field_error = [&](index column, std::string_view field) {
    const bool label = column == pixel_count + 1;
    const bool number =
        !field.empty() && field.find_first_not_of("0123456789") == std::string_view::npos;
    const std::string shown = printable_ascii(field);
    throw_data(path, format("line %td column %td is %s, expected 0..%d = %s", line_number, column,
                            number ? shown.c_str() : ("'" + shown + "'").c_str(),
                            label ? static_cast<int>(digit_count) - 1 : max_intensity,
                            label ? "the digit" : "a pixel's intensity"));
  };
  const auto field_at = [&](std::size_t begin) {
    return line.substr(begin, std::min(line.find(',', begin), line.size()) - begin);
  };

  // What cannot be part of a number is reported where it stands, before the fields are counted: in
  // a file that is no table at all the count says nothing.
  const std::size_t bad = line.find_first_not_of("0123456789,");
  if (bad != std::string_view::npos) {
    const std::string_view before = line.substr(0, bad);
    const index column = std::count(before.begin(), before.end(), ',') + 1;
    const std::size_t comma = before.rfind(',');
    if (column <= pixel_count + 1) {
      field_error(column, field_at(comma == std::string_view::npos ? 0 : comma + 1));
    }
  }
  const index fields = line.empty() ? 0 : std::count(line.begin(), line.end(), ',') + 1;
  if (fields != pixel_count + 1) {
    throw_data(path, format("line %td has %td fields, expected %td = %td pixels and a label",
                            line_number, fields, pixel_count + 1, pixel_count));
  }

  std::size_t begin = 0;
  for (index column = 1; column <= pixel_count + 1; ++column) {
    const std::string_view field = field_at(begin);
    int value = 0;
    const auto [end, code] = std::from_chars(field.data(), field.data() + field.size(), value);
    const int highest = column <= pixel_count ? max_intensity : static_cast<int>(digit_count) - 1;
    if (code != std::errc{} || end != field.data() + field.size() || value > highest) {
      field_error(column, field);
    }
    (column <= pixel_count ? data.pixels : data.labels).push_back(static_cast<std::uint8_t>(value));
    begin += field.size() + 1;
  }
}

}  // namespace detail

/// Reads a table of digits: on each line 64 integers 0..16 and the label 0..9, comma separated, LF
/// or CR LF after every line, the last one included; no header line, no blanks. At least 10 rows of
/// each digit and at most 64 MiB. With `rows` it is this many: a file that ends early between two
/// lines looks whole otherwise.
///
/// Throws io_error, naming file, line and column, when the file cannot be read or holds anything
/// else.
inline digits load_digits(const std::string& path, index rows = 0) {
  const std::string text = detail::read_data(path);
  const index min_rows = digit_count * min_rows_per_digit;
  if (text.empty()) {
    detail::throw_data(path, format("is empty, expected at least %td rows = %td of each digit",
                                    min_rows, min_rows_per_digit));
  }

  digits data;
  index line_number = 0;
  std::string_view rest = text;
  while (!rest.empty()) {
    ++line_number;
    const std::size_t length = rest.find('\n');
    std::string_view line = rest.substr(0, length);
    if (!line.empty() && line.back() == '\r') line.remove_suffix(1);
    detail::parse_row(path, line_number, line, data);
    if (length == std::string_view::npos) {
      detail::throw_data(
          path, format("line %td has no line break, expected one = a complete row", line_number));
    }
    rest.remove_prefix(length + 1);
  }

  if (rows > 0 && data.rows() != rows) {
    detail::throw_data(
        path, format("has %td rows, expected %td = the whole data set", data.rows(), rows));
  }
  if (data.rows() < min_rows) {
    detail::throw_data(path, format("has %td rows, expected at least %td = %td of each digit",
                                    data.rows(), min_rows, min_rows_per_digit));
  }
  for (int digit = 0; digit < digit_count; ++digit) {
    const index count = std::count(data.labels.begin(), data.labels.end(), digit);
    if (count < min_rows_per_digit) {
      detail::throw_data(path, format("has %td rows of the digit %d, expected at least %td = "
                                      "enough to train on and to hold out",
                                      count, digit, min_rows_per_digit));
    }
  }
  return data;
}

/// Fisher-Yates with the library's counter-based numbers: std::shuffle may give another order with
/// another standard library.
template <class Element>
void shuffle(std::vector<Element>& elements, random_stream random) {
  for (std::size_t i = elements.size(); i > 1; --i) {
    std::swap(elements[i - 1], elements[uniform_index(random, i, i)]);
  }
}

/// Row numbers, ascending, disjoint, together all rows.
struct data_split {
  std::vector<index> train;
  std::vector<index> held_out;
};

/// Splits by image: `held_out_fraction` of each digit's rows, rounded, goes to `held_out`. Rows
/// with the same 64 pixels always stay on the same side, so no image is trained on and then asked
/// about (a digit with copies may then hold out slightly fewer rows). The same seed gives the same
/// split on every machine.
///
/// Throws value_error unless 0 < held_out_fraction < 1.
inline data_split split_digits(const digits& data, double held_out_fraction, std::uint64_t seed) {
  if (!(held_out_fraction > 0.0 && held_out_fraction < 1.0)) {
    throw value_error("talpa::examples::split_digits: 'held_out_fraction' is " +
                      fixed(held_out_fraction, 3) +
                      ", expected 0 < fraction < 1 = share of the rows");
  }

  // Copies become neighbours; a group is a run of equal images and belongs to its first row's
  // digit.
  std::vector<index> order(static_cast<std::size_t>(data.rows()));
  std::iota(order.begin(), order.end(), index{0});
  const auto compare = [&](index a, index b) {
    return std::memcmp(data.image(a), data.image(b), static_cast<std::size_t>(pixel_count));
  };
  std::sort(order.begin(), order.end(), [&](index a, index b) {
    const int difference = compare(a, b);
    return difference != 0 ? difference < 0 : a < b;
  });
  struct group {
    index first;  // smallest row of the group
    std::size_t begin;
    std::size_t end;
  };
  std::array<std::vector<group>, digit_count> groups_of;
  for (std::size_t begin = 0; begin < order.size();) {
    std::size_t end = begin + 1;
    while (end < order.size() && compare(order[begin], order[end]) == 0) ++end;
    groups_of[data.labels[static_cast<std::size_t>(order[begin])]].push_back(
        {order[begin], begin, end});
    begin = end;
  }

  data_split result;
  generator random(seed);
  for (auto& groups : groups_of) {
    std::sort(groups.begin(), groups.end(),
              [](const group& a, const group& b) { return a.first < b.first; });
    shuffle(groups, random.next());
    std::size_t rows = 0;
    for (const group& g : groups) rows += g.end - g.begin;
    std::size_t room =
        static_cast<std::size_t>(std::llround(held_out_fraction * static_cast<double>(rows)));
    for (const group& g : groups) {
      const std::size_t size = g.end - g.begin;
      const bool held = size <= room;
      if (held) room -= size;
      std::vector<index>& side = held ? result.held_out : result.train;
      side.insert(side.end(), order.begin() + static_cast<std::ptrdiff_t>(g.begin),
                  order.begin() + static_cast<std::ptrdiff_t>(g.end));
    }
  }
  std::sort(result.train.begin(), result.train.end());
  std::sort(result.held_out.begin(), result.held_out.end());
  return result;
}

}  // namespace talpa::examples
