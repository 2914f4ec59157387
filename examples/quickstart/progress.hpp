// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "interrupt.hpp"
#include "text.hpp"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <string_view>
#include <sys/ioctl.h>
#include <unistd.h>

namespace talpa::examples {

/// How a stream can show progress.
struct progress_style {
  enum class kind { none, lines, redraw } shown = kind::lines;
  bool color = false;
};

/// NO_COLOR counts when it is set and not empty (no-color.org).
inline bool colors_wanted() {
  const char* no_color = std::getenv("NO_COLOR");
  return no_color == nullptr || *no_color == '\0';
}

/// Whether escape sequences mean anything to what is behind `stream`.
inline bool is_terminal(std::FILE* stream) {
  const char* term = std::getenv("TERM");
  return ::isatty(::fileno(stream)) == 1 && term != nullptr && std::string_view(term) != "dumb";
}

inline progress_style detect_progress_style(std::FILE* stream, bool quiet) {
  if (quiet) return {progress_style::kind::none, false};
  if (!is_terminal(stream)) return {progress_style::kind::lines, false};
  return {progress_style::kind::redraw, colors_wanted()};
}

/// Live progress of a run of known length: on a terminal one line that redraws, at most ten times a
/// second; elsewhere a plain line every three seconds and one at the end. Only ASCII and, on a
/// terminal, erase-to-end-of-line and (unless NO_COLOR) two colours.
class progress {
 public:
  using clock = std::chrono::steady_clock;

  progress(std::FILE* stream, progress_style style, clock::time_point start = clock::now())
      : stream_(stream), style_(style), start_(start), shown_at_(start) {}
  progress(const progress&) = delete;
  progress& operator=(const progress&) = delete;
  ~progress() { close_line(); }

  /// `fraction` 0..1 of the whole run is done; `what` says what is going on.
  void update(double fraction, std::string_view what, clock::time_point now = clock::now()) {
    using namespace std::chrono_literals;
    if (style_.shown == progress_style::kind::none) return;
    const bool redraw = style_.shown == progress_style::kind::redraw;
    const auto pause = redraw ? clock::duration(100ms) : clock::duration(3s);
    // The first line of a terminal comes at once; a log file is spared it.
    if (now - shown_at_ < pause && !(redraw && !line_open_)) return;
    shown_at_ = now;
    show(fraction, what, now);
  }

  /// A line that stays: on a terminal above the redrawn one.
  void note(std::string_view text) {
    if (style_.shown == progress_style::kind::none) return;
    if (line_open_) std::fputs("\r\x1b[K", stream_);
    std::fprintf(stream_, "%.*s\n", static_cast<int>(text.size()), text.data());
    std::fflush(stream_);
    line_open_ = false;
    tidy().open_line.store(-1);
  }

  /// The run is over. The redrawn line goes; elsewhere a last line says how long it took.
  void finish(std::string_view what, clock::time_point now = clock::now()) {
    if (style_.shown == progress_style::kind::none) return;
    note(std::string(what) + " in " + duration(seconds_since_start(now)));
  }

 private:
  static detail::tidy_state& tidy() { return detail::tidy; }

  double seconds_since_start(clock::time_point now) const {
    return std::chrono::duration<double>(now - start_).count();
  }

  std::size_t columns() const {
    ::winsize size{};
    const bool known = ::ioctl(::fileno(stream_), TIOCGWINSZ, &size) == 0 && size.ws_col > 0;
    return known ? size.ws_col : 80;
  }

  void show(double fraction, std::string_view what, clock::time_point now) {
    fraction = std::clamp(fraction, 0.0, 1.0);
    const double elapsed = seconds_since_start(now);
    // An estimate from less than a fiftieth of the run would jump about.
    const bool estimated = fraction >= 0.02 && fraction < 1.0;
    const std::string rest = duration(elapsed * (1.0 - fraction) / fraction) + " left";
    const std::string time = estimated ? rest : duration(elapsed);
    if (style_.shown == progress_style::kind::lines) {
      std::fprintf(stream_, "%3.0f %%  %.*s  (%s)\n", 100.0 * fraction,
                   static_cast<int>(what.size()), what.data(), time.c_str());
      std::fflush(stream_);
      return;
    }

    constexpr std::size_t bar_width = 10;
    const auto done = static_cast<std::size_t>(fraction * bar_width + 0.5);
    std::string line = "\r";
    std::size_t room = columns() - 1;  // a full line would wrap
    const auto put = [&](std::string_view text, const char* color) {
      text = text.substr(0, room);
      room -= text.size();
      if (style_.color && color != nullptr && !text.empty()) {
        line.append(color).append(text).append("\x1b[0m");
      } else {
        line.append(text);
      }
    };
    put(format("%3.0f %% ", 100.0 * fraction), nullptr);
    put(std::string(done, '='), "\x1b[36m");
    put(std::string(bar_width - done, '-'), "\x1b[2m");
    // The time stands before the text, which a narrow terminal cuts.
    put("  " + time + std::string(time.size() < 13 ? 13 - time.size() : 0, ' '), "\x1b[2m");
    put("  ", nullptr);
    put(what, nullptr);
    line += "\x1b[K";
    std::fputs(line.c_str(), stream_);
    std::fflush(stream_);
    line_open_ = true;
    tidy().open_line.store(::fileno(stream_));
  }

  void close_line() {
    if (!line_open_) return;
    std::fputs("\n", stream_);
    std::fflush(stream_);
    line_open_ = false;
    tidy().open_line.store(-1);
  }

  std::FILE* stream_;
  progress_style style_;
  clock::time_point start_;
  clock::time_point shown_at_;
  bool line_open_ = false;
};

}  // namespace talpa::examples
