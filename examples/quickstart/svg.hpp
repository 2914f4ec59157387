// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "text.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

namespace talpa::examples {

namespace detail {

/// Length of the UTF-8 sequence at the front of `text`, or 0 when there is no valid one.
inline std::size_t utf8_length(std::string_view text) {
  const auto byte = [&](std::size_t i) {
    return i < text.size() ? static_cast<unsigned>(static_cast<unsigned char>(text[i])) : 0u;
  };
  const auto follows = [&](std::size_t i, unsigned low = 0x80, unsigned high = 0xbf) {
    return byte(i) >= low && byte(i) <= high;
  };
  const unsigned first = byte(0);
  if (first < 0x80) return 1;
  if (first >= 0xc2 && first <= 0xdf) return follows(1) ? 2 : 0;
  if (first >= 0xe0 && first <= 0xef) {
    // The narrower ranges exclude overlong forms and surrogates.
    const unsigned low = first == 0xe0 ? 0xa0 : 0x80;
    const unsigned high = first == 0xed ? 0x9f : 0xbf;
    return follows(1, low, high) && follows(2) ? 3 : 0;
  }
  if (first >= 0xf0 && first <= 0xf4) {
    const unsigned low = first == 0xf0 ? 0x90 : 0x80;
    const unsigned high = first == 0xf4 ? 0x8f : 0xbf;
    return follows(1, low, high) && follows(2) && follows(3) ? 4 : 0;
  }
  return 0;
}

}  // namespace detail

/// Text for the content or a quoted attribute of HTML and SVG. Control bytes and what is not UTF-8
/// become `\xNN`, so that any file name gives a well-formed page.
inline std::string escape_html(std::string_view text) {
  std::string result;
  while (!text.empty()) {
    const std::size_t length = detail::utf8_length(text);
    const char c = text.front();
    const auto byte = static_cast<unsigned char>(c);
    if (length == 0 || byte < 0x20 || byte == 0x7f) {
      result += format("\\x%02x", static_cast<unsigned>(byte));
    } else if (c == '&') {
      result += "&amp;";
    } else if (c == '<') {
      result += "&lt;";
    } else if (c == '>') {
      result += "&gt;";
    } else if (c == '"') {
      result += "&quot;";
    } else if (c == '\'') {
      result += "&#39;";
    } else {
      result += text.substr(0, length);
    }
    text.remove_prefix(std::max<std::size_t>(length, 1));
  }
  return result;
}

/// A length in a drawing: at most one decimal.
inline std::string coordinate(double value) {
  std::string text = fixed(value, 1);
  if (text.size() > 2 && text.compare(text.size() - 2, 2, ".0") == 0) text.resize(text.size() - 2);
  return text;
}

struct tick {
  double at = 0;
  std::string label;
};

/// Maps values to 0..1 along an axis.
struct scale {
  double low = 0;
  double high = 1;
  bool logarithmic = false;
  std::vector<tick> ticks;

  double place(double value) const {
    return logarithmic ? std::log(value / low) / std::log(high / low)
                       : (value - low) / (high - low);
  }
  /// Whether `place` has an answer for it.
  bool accepts(double value) const { return std::isfinite(value) && (!logarithmic || value > 0.0); }
};

/// 1, 2 or 5 times a power of ten, at least `step`.
inline double round_step(double step) {
  const double power = std::pow(10.0, std::floor(std::log10(step)));
  for (const double factor : {1.0, 2.0, 5.0}) {
    if (factor * power >= step * (1.0 - 1e-9)) return factor * power;
  }
  return 10.0 * power;
}

/// A linear axis over [low, high], widened to whole steps, with about `steps` of them and labels of
/// `value * unit`. The ends stay inside [floor, ceiling].
inline scale linear_scale(double low, double high, int steps, double unit, double floor,
                          double ceiling) {
  if (!(high > low)) {
    low -= 0.05 * std::max(1.0, std::fabs(low));
    high += 0.05 * std::max(1.0, std::fabs(high));
  }
  low = std::max(low, floor);
  high = std::min(high, ceiling);
  const double step = round_step((high - low) / (1.25 * steps));
  scale s;
  s.low = std::max(floor, step * std::floor(low / step + 1e-9));
  s.high = std::min(ceiling, step * std::ceil(high / step - 1e-9));
  const int decimals = std::max(0, -static_cast<int>(std::floor(std::log10(step * unit) + 1e-9)));
  const auto first = static_cast<long>(std::ceil(s.low / step - 1e-6));
  const auto last = static_cast<long>(std::floor(s.high / step + 1e-6));
  for (long i = first; i <= last; ++i) {
    const double at = static_cast<double>(i) * step;
    s.ticks.push_back({at, fixed(at * unit, decimals)});
  }
  return s;
}

/// A logarithmic axis over [low, high] > 0 with ticks at 1, 2 and 5 times powers of ten.
inline scale log_scale(double low, double high) {
  if (!(high > low)) {
    low /= 1.5;
    high *= 1.5;
  }
  scale s;
  s.logarithmic = true;
  s.low = low;
  s.high = high;
  const int first = static_cast<int>(std::floor(std::log10(low)));
  const int last = static_cast<int>(std::ceil(std::log10(high)));
  for (int power = first; power <= last; ++power) {
    for (const double factor : {1.0, 2.0, 5.0}) {
      const double at = factor * std::pow(10.0, power);
      if (at < low * (1.0 - 1e-9) || at > high * (1.0 + 1e-9)) continue;
      s.ticks.push_back({at, at >= 1000.0 ? with_thousands(std::llround(at))
                                          : fixed(at, at >= 1.0 ? 0 : -power)});
    }
  }
  return s;
}

/// A logarithmic axis whose ticks are the given values, ascending, with some air at both ends.
inline scale log_scale_at(const std::vector<double>& values) {
  scale s;
  s.logarithmic = true;
  if (values.empty()) return log_scale(1.0, 10.0);
  s.low = values.front() / 1.35;
  s.high = values.back() * 1.35;
  for (const double v : values) s.ticks.push_back({v, format("%.3g", v)});
  return s;
}

/// A drawing that grows.
class drawing {
 public:
  drawing(double width, double height, std::string_view title, std::string_view description)
      : text_(format("<svg viewBox=\"0 0 %s %s\" role=\"img\" style=\"min-width:%spx\">\n",
                     coordinate(width).c_str(), coordinate(height).c_str(),
                     coordinate(0.72 * width).c_str())) {
    text_ += "<title>" + escape_html(title) + "</title>\n<desc>" + escape_html(description) +
             "</desc>\n";
  }

  void line(double x1, double y1, double x2, double y2, std::string_view classes) {
    text_ += "<line x1=\"" + coordinate(x1) + "\" y1=\"" + coordinate(y1) + "\" x2=\"" +
             coordinate(x2) + "\" y2=\"" + coordinate(y2) + "\" class=\"" + std::string(classes) +
             "\"/>\n";
  }

  struct point {
    double x;
    double y;
  };
  void polyline(const std::vector<point>& points, std::string_view classes) {
    text_ += "<polyline class=\"" + std::string(classes) + "\" points=\"";
    for (std::size_t i = 0; i < points.size(); ++i) {
      text_ += (i > 0 ? " " : "") + coordinate(points[i].x) + "," + coordinate(points[i].y);
    }
    text_ += "\"/>\n";
  }

  /// `anchor` is start, middle or end; `turn` rotates about the anchor, in degrees.
  void text(double x, double y, std::string_view content, std::string_view classes,
            const char* anchor = "start", double turn = 0) {
    text_ += "<text x=\"" + coordinate(x) + "\" y=\"" + coordinate(y) + "\" class=\"" +
             std::string(classes) + "\" text-anchor=\"" + anchor + "\"";
    if (turn != 0) {
      text_ += " transform=\"rotate(" + coordinate(turn) + " " + coordinate(x) + " " +
               coordinate(y) + ")\"";
    }
    text_ += ">" + escape_html(content) + "</text>\n";
  }

  /// `opacity` of the fill; a `tip` shows when the pointer rests on it.
  void rectangle(double x, double y, double width, double height, std::string_view classes,
                 double opacity = 1, std::string_view tip = {}) {
    text_ += "<rect x=\"" + coordinate(x) + "\" y=\"" + coordinate(y) + "\" width=\"" +
             coordinate(width) + "\" height=\"" + coordinate(height) + "\" class=\"" +
             std::string(classes) + "\"";
    if (opacity < 1) text_ += " fill-opacity=\"" + fixed(opacity, 3) + "\"";
    text_ += tip.empty() ? "/>\n" : "><title>" + escape_html(tip) + "</title></rect>\n";
  }

  enum class shape { circle, square, triangle, diamond };
  void marker(double x, double y, shape s, std::string_view classes, std::string_view tip = {}) {
    std::string path;
    switch (s) {
      case shape::circle:
        path = format("<circle cx=\"%s\" cy=\"%s\" r=\"4.6\"", coordinate(x).c_str(),
                      coordinate(y).c_str());
        break;
      case shape::square:
        path = format("<rect x=\"%s\" y=\"%s\" width=\"8.4\" height=\"8.4\"",
                      coordinate(x - 4.2).c_str(), coordinate(y - 4.2).c_str());
        break;
      case shape::triangle:
        path = format("<path d=\"M%s %sl5.4 9.4h-10.8z\"", coordinate(x).c_str(),
                      coordinate(y - 6.0).c_str());
        break;
      case shape::diamond:
        path = format("<path d=\"M%s %sl5.6 5.8-5.6 5.8-5.6-5.8z\"", coordinate(x).c_str(),
                      coordinate(y - 5.8).c_str());
        break;
    }
    text_ += path + " class=\"mark " + std::string(classes) + "\"";
    text_ +=
        tip.empty() ? std::string("/>\n") : "><title>" + escape_html(tip) + "</title>" + end_of(s);
  }

  std::string finish() && { return std::move(text_) + "</svg>\n"; }

 private:
  static std::string end_of(shape s) {
    return s == shape::circle ? "</circle>\n" : s == shape::square ? "</rect>\n" : "</path>\n";
  }

  std::string text_;
};

/// Axis-aligned box, y downwards.
struct box {
  double left;
  double top;
  double right;
  double bottom;

  bool meets(const box& other) const {
    return left < other.right && other.left < right && top < other.bottom && other.top < bottom;
  }
  bool inside(const box& other) const {
    return left >= other.left && right <= other.right && top >= other.top && bottom <= other.bottom;
  }
};

/// A plot area with its two axes.
struct panel {
  double x;
  double y;
  double width;
  double height;
  scale horizontal;
  scale vertical;

  double px(double value) const { return x + width * horizontal.place(value); }
  double py(double value) const { return y + height * (1.0 - vertical.place(value)); }
  box area() const { return {x, y, x + width, y + height}; }

  bool accepts(double h, double v) const { return horizontal.accepts(h) && vertical.accepts(v); }

  /// Grid lines, tick labels and the names of the axes (with units); an empty name leaves out the
  /// vertical tick labels too, for panels that share the axis of their neighbour.
  void draw_axes(drawing& d, std::string_view horizontal_name,
                 std::string_view vertical_name) const {
    for (const tick& t : vertical.ticks) {
      d.line(x, py(t.at), x + width, py(t.at), "grid");
      if (!vertical_name.empty()) d.text(x - 8, py(t.at) + 4, t.label, "tick", "end");
    }
    d.line(x, y + height, x + width, y + height, "axis");
    for (const tick& t : horizontal.ticks) {
      d.line(px(t.at), y + height, px(t.at), y + height + 4, "axis");
      d.text(px(t.at), y + height + 18, t.label, "tick", "middle");
    }
    d.text(x + width / 2, y + height + 38, horizontal_name, "label", "middle");
    if (!vertical_name.empty()) {
      d.text(x - 46, y + height / 2, vertical_name, "label", "middle", -90);
    }
  }
};

/// Moves positions apart until neighbours in the order of `wanted` are at least `gap` from each
/// other, keeping all inside [low, high] if they fit, and each near its wanted place.
inline std::vector<double> spread_apart(const std::vector<double>& wanted, double gap, double low,
                                        double high) {
  std::vector<std::size_t> order(wanted.size());
  for (std::size_t i = 0; i < order.size(); ++i) order[i] = i;
  std::sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) {
    return wanted[a] != wanted[b] ? wanted[a] < wanted[b] : a < b;
  });
  std::vector<double> placed(wanted.size());
  double least = low;
  for (const std::size_t i : order) {
    placed[i] = std::max(wanted[i], least);
    least = placed[i] + gap;
  }
  double most = high;
  for (std::size_t k = order.size(); k-- > 0;) {
    placed[order[k]] = std::min(placed[order[k]], most);
    most = placed[order[k]] - gap;
  }
  return placed;
}

}  // namespace talpa::examples
