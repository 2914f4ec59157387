// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "text.hpp"

#include <talpa/core/error.hpp>

#include <algorithm>
#include <array>
#include <charconv>
#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

namespace talpa::examples {

/// Where the networks are.
enum class device_name { cpu, gpu };

/// What the command line says.
struct options {
  bool help = false;
  bool version = false;
  bool quick = false;
  bool quiet = false;
  std::string data;                        // default_options sets it
  std::int64_t data_rows = 0;              // that the data must have; 0: enough to split
  std::string report = "quickstart.html";  // empty: no report
  std::string log = "quickstart.jsonl";    // empty: no log
  std::uint64_t seed = 1;
  int seeds = 2;
  device_name device = device_name::cpu;
  int threads = 1;
  int pretrain_epochs = 12;
  int epochs = 24;
  int batch = 128;
  double learning_rate = 4e-3;
  double balance = 1e-3;
  std::vector<std::string> methods;  // keys of those to run; default_options sets it
};

/// Rows of the data set that comes with the program. A file of the user's own may have others.
inline constexpr std::int64_t shipped_rows = 1797;

/// What holds without flags; the data set lies in `data_folder`, and `methods` are the keys of all
/// methods, in the order of the tables.
inline options default_options(const std::string& data_folder,
                               std::vector<std::string> methods = {}) {
  options result;
  result.data = data_folder + "/digits.csv";
  result.data_rows = shipped_rows;
  result.methods = std::move(methods);
  return result;
}

/// What `--quick` means where the command line says nothing else.
inline constexpr int quick_seeds = 1;
inline constexpr int quick_pretrain_epochs = 6;
inline constexpr int quick_epochs = 3;

namespace detail {

enum class flag_id {
  data,
  report,
  no_report,
  log,
  no_log,
  quick,
  methods,
  seed,
  seeds,
  device,
  threads,
  pretrain_epochs,
  epochs,
  batch,
  learning_rate,
  balance,
  quiet,
  version,
  help
};

struct flag {
  flag_id id;
  const char* name;
  const char* value;  // what stands for its value in --help; null: it has none
  const char* help;
  double low = 0;  // of a number
  double high = 0;
};

// clang-format off
inline constexpr std::array<flag, 19> flags{{
    {flag_id::data, "--data", "FILE", "lines of 64 pixels 0..16 and a digit, 10 of each or more"},
    {flag_id::report, "--report", "FILE", "where the HTML report goes"},
    {flag_id::no_report, "--no-report", nullptr, "write no report"},
    {flag_id::log, "--log", "FILE", "where the JSON Lines log goes"},
    {flag_id::no_log, "--no-log", nullptr, "write no log"},
    {flag_id::quick, "--quick", nullptr, "a short run that shows everything and proves nothing"},
    {flag_id::methods, "--methods", "LIST", "methods to run: keys with commas between"},
    {flag_id::seed, "--seed", "N", "first seed", 0, 4294967295.0},
    {flag_id::seeds, "--seeds", "N", "seeds per method", 1, 16},
    {flag_id::device, "--device", "NAME", "cpu or gpu = where the networks train"},
    {flag_id::threads, "--threads", "N", "threads; one is best for matrices this small", 1, 256},
    {flag_id::pretrain_epochs, "--pretrain-epochs", "N", "epochs of pretraining", 1, 1000},
    {flag_id::epochs, "--epochs", "N", "epochs of adaptation", 1, 1000},
    {flag_id::batch, "--batch", "N", "questions per step", 8, 4096},
    {flag_id::learning_rate, "--learning-rate", "X", "peak of the schedule", 1e-6, 1.0},
    {flag_id::balance, "--balance", "X", "weight of load balance losses", 0, 1},
    {flag_id::quiet, "--quiet", nullptr, "no progress; tables, warnings and errors remain"},
    {flag_id::version, "--version", nullptr, "print the version and leave"},
    {flag_id::help, "--help", nullptr, "print this and leave"},
}};
// clang-format on

[[noreturn, gnu::cold]] inline void throw_option(std::string_view name, const std::string& rest) {
  throw value_error("talpa::examples::parse_options: '" + printable(name) + "' " + rest);
}

inline std::string plain_number(double value) { return format("%.10g", value); }

inline std::string expectation(const flag& f) {
  const std::string meaning = std::string(" = ") + f.help;
  if (f.high > f.low) return plain_number(f.low) + ".." + plain_number(f.high) + meaning;
  if (f.id == flag_id::device) return f.help;
  return (f.id == flag_id::methods ? "a list" : "a file name") + meaning;
}

template <class Number>
Number parse_number(const flag& f, const std::string& text) {
  Number value{};
  const char* end = text.data() + text.size();
  const auto [stop, code] = std::from_chars(text.data(), end, value);
  // The comparison also refuses NaN, which from_chars reads.
  const bool inside = static_cast<double>(value) >= f.low && static_cast<double>(value) <= f.high;
  if (text.empty() || code != std::errc{} || stop != end || !inside) {
    throw_option(f.name, "is '" + printable(text, 40) + "', expected " + expectation(f));
  }
  return value;
}

/// Number of insertions, deletions and replacements that turn `a` into `b`.
inline std::size_t edit_distance(std::string_view a, std::string_view b) {
  std::vector<std::size_t> row(b.size() + 1);
  for (std::size_t j = 0; j <= b.size(); ++j) row[j] = j;
  for (std::size_t i = 1; i <= a.size(); ++i) {
    std::size_t diagonal = row[0];
    row[0] = i;
    for (std::size_t j = 1; j <= b.size(); ++j) {
      const std::size_t replaced = diagonal + (a[i - 1] == b[j - 1] ? 0 : 1);
      diagonal = row[j];
      row[j] = std::min({replaced, row[j] + 1, row[j - 1] + 1});
    }
  }
  return row[b.size()];
}

/// `'--seed' = the nearest flag` where one of `names` is close, else `a flag = one that --help
/// lists`, with `kind` for "flag".
inline std::string nearest_or_any(const std::string& name, const std::vector<std::string>& names,
                                  const std::string& kind) {
  const auto nearest =
      std::min_element(names.begin(), names.end(), [&](const std::string& a, const std::string& b) {
        return edit_distance(name, a) < edit_distance(name, b);
      });
  const bool close = !name.empty() && name.size() < 40 && nearest != names.end() &&
                     edit_distance(name, *nearest) <= 2;
  return close ? "'" + *nearest + "' = the nearest " + kind
               : "a " + kind + " = one that --help lists";
}

[[noreturn, gnu::cold]] inline void throw_unknown(const std::string& name) {
  std::vector<std::string> names;
  for (const flag& f : flags) names.push_back(f.name);
  throw_option(name, "is unknown, expected " + nearest_or_any(name, names, "flag"));
}

/// The keys in `list`, `lora,mola`, in the order of `known`; each at most once.
inline std::vector<std::string> parse_methods(const flag& f, const std::string& list,
                                              const std::vector<std::string>& known) {
  if (list.empty()) throw_option(f.name, "is '', expected " + expectation(f));
  std::vector<std::string> given;
  for (std::size_t begin = 0; begin <= list.size();) {
    const std::size_t end = std::min(list.find(',', begin), list.size());
    const std::string key = list.substr(begin, end - begin);
    if (std::find(known.begin(), known.end(), key) == known.end()) {
      throw_option(f.name, "has '" + printable(key, 40) + "', expected " +
                               nearest_or_any(key, known, "key"));
    }
    if (std::find(given.begin(), given.end(), key) != given.end()) {
      throw_option(f.name, "has '" + key + "' twice, expected once = each method runs once");
    }
    given.push_back(key);
    begin = end + 1;
  }
  std::vector<std::string> ordered;
  for (const std::string& key : known) {
    if (std::find(given.begin(), given.end(), key) != given.end()) ordered.push_back(key);
  }
  return ordered;
}

inline bool same_file(const std::string& a, const std::string& b) {
  std::error_code failed;
  if (std::filesystem::equivalent(a, b, failed) && !failed) return true;
  const auto full = [&](const std::string& path) {
    const auto absolute = std::filesystem::absolute(path, failed);
    return failed ? std::filesystem::path(path)
                  : std::filesystem::weakly_canonical(absolute, failed);
  };
  const auto full_a = full(a);
  return !failed && full_a == full(b) && !failed;
}

}  // namespace detail

/// Reads the command line (without the program's name). Values follow their flag or an equals sign:
/// `--seeds 3`, `--seeds=3`. Each flag at most once.
///
/// Throws value_error for an unknown, repeated or contradictory flag, for a missing value, one that
/// is not a number in the flag's range, an unknown or repeated method (defaults.methods are all),
/// and for a file that would be written over another.
inline options parse_options(const std::vector<std::string>& arguments, const options& defaults) {
  using detail::flag_id;
  options result = defaults;
  std::vector<flag_id> seen;
  const auto given = [&](flag_id id) {
    return std::find(seen.begin(), seen.end(), id) != seen.end();
  };

  for (std::size_t i = 0; i < arguments.size(); ++i) {
    const std::size_t equals = arguments[i].find('=');
    const std::string name = arguments[i].substr(0, equals);
    const auto found = std::find_if(detail::flags.begin(), detail::flags.end(),
                                    [&](const detail::flag& f) { return name == f.name; });
    if (found == detail::flags.end()) detail::throw_unknown(name);
    const detail::flag& f = *found;
    if (given(f.id)) detail::throw_option(name, "is given twice, expected once = one value");
    seen.push_back(f.id);

    std::string value;
    if (f.value == nullptr) {
      if (equals != std::string::npos) {
        detail::throw_option(name, "has the value '" + printable(arguments[i].substr(equals + 1)) +
                                       "', expected none = a switch");
      }
    } else if (equals != std::string::npos) {
      value = arguments[i].substr(equals + 1);
    } else {
      // A flag in the place of a value is a forgotten value; --report=--x names such a file.
      if (i + 1 == arguments.size() || arguments[i + 1].compare(0, 2, "--") == 0) {
        detail::throw_option(name, "has no value, expected " + detail::expectation(f));
      }
      value = arguments[++i];
    }
    const auto file = [&](std::string& path) {
      if (value.empty()) detail::throw_option(name, "is '', expected " + detail::expectation(f));
      path = value;
    };
    const auto integer = [&](int& number) { number = detail::parse_number<int>(f, value); };

    switch (f.id) {
      case flag_id::data:
        file(result.data);
        result.data_rows = 0;
        break;
      case flag_id::report:
        file(result.report);
        break;
      case flag_id::no_report:
        result.report.clear();
        break;
      case flag_id::log:
        file(result.log);
        break;
      case flag_id::no_log:
        result.log.clear();
        break;
      case flag_id::quick:
        result.quick = true;
        break;
      case flag_id::methods:
        result.methods = detail::parse_methods(f, value, defaults.methods);
        break;
      case flag_id::seed:
        result.seed = detail::parse_number<std::uint64_t>(f, value);
        break;
      case flag_id::seeds:
        integer(result.seeds);
        break;
      case flag_id::device:
        if (value != "cpu" && value != "gpu") {
          detail::throw_option(name, "is '" + printable(value, 40) + "', expected " + f.help);
        }
        result.device = value == "gpu" ? device_name::gpu : device_name::cpu;
        break;
      case flag_id::threads:
        integer(result.threads);
        break;
      case flag_id::pretrain_epochs:
        integer(result.pretrain_epochs);
        break;
      case flag_id::epochs:
        integer(result.epochs);
        break;
      case flag_id::batch:
        integer(result.batch);
        break;
      case flag_id::learning_rate:
        result.learning_rate = detail::parse_number<double>(f, value);
        break;
      case flag_id::balance:
        result.balance = detail::parse_number<double>(f, value);
        break;
      case flag_id::quiet:
        result.quiet = true;
        break;
      case flag_id::version:
        result.version = true;
        break;
      case flag_id::help:
        result.help = true;
        break;
    }
  }

  if (given(flag_id::report) && given(flag_id::no_report)) {
    detail::throw_option("--report", "is given with '--no-report', expected one = a choice");
  }
  if (given(flag_id::log) && given(flag_id::no_log)) {
    detail::throw_option("--log", "is given with '--no-log', expected one = a choice");
  }
  const auto distinct = [](const char* name, const std::string& path, const char* other_name,
                           const std::string& other) {
    if (!path.empty() && !other.empty() && detail::same_file(path, other)) {
      detail::throw_option(
          name, "is '" + printable(path) + "', expected another file = not that of " + other_name);
    }
  };
  distinct("--report", result.report, "--log", result.log);
  distinct("--report", result.report, "--data", result.data);
  distinct("--log", result.log, "--data", result.data);

  if (result.quick) {
    if (!given(flag_id::seeds)) result.seeds = quick_seeds;
    if (!given(flag_id::pretrain_epochs)) result.pretrain_epochs = quick_pretrain_epochs;
    if (!given(flag_id::epochs)) result.epochs = quick_epochs;
  }
  return result;
}

/// The text of `--help`.
inline std::string help_text(const options& defaults) {
  std::string text =
      "usage: quickstart [flags]\n"
      "\n"
      "Pretrains a small network to name handwritten digits, freezes it, and teaches it\n"
      "eight instructions with LoRA adapters and with mixtures of them under several routers.\n"
      "Prints a table and writes a report and a log.\n"
      "\n";
  for (const detail::flag& f : detail::flags) {
    std::string left = std::string("  ") + f.name;
    if (f.value != nullptr) left += std::string(" ") + f.value;
    left.resize(std::max<std::size_t>(left.size() + 2, 24), ' ');
    text += left + f.help;
    switch (f.id) {
      case detail::flag_id::data:
        text += "\n" + std::string(24, ' ') + "[" + defaults.data + "]";
        break;
      case detail::flag_id::report:
        text += " [" + defaults.report + "]";
        break;
      case detail::flag_id::log:
        text += " [" + defaults.log + "]";
        break;
      case detail::flag_id::quick:
        text += "\n" + std::string(24, ' ') +
                format("(--seeds %d --pretrain-epochs %d --epochs %d, unless given)", quick_seeds,
                       quick_pretrain_epochs, quick_epochs);
        break;
      case detail::flag_id::methods: {
        std::string keys;
        for (const std::string& key : defaults.methods) keys += (keys.empty() ? "" : ",") + key;
        text += "\n" + std::string(24, ' ') + "[" + keys + "]";
        break;
      }
      case detail::flag_id::seed:
        text += format(" [%llu]", static_cast<unsigned long long>(defaults.seed));
        break;
      case detail::flag_id::seeds:
        text += format(" [%d]", defaults.seeds);
        break;
      case detail::flag_id::device:
        text += " [cpu]";
        break;
      case detail::flag_id::threads:
        text += format(" [%d]", defaults.threads);
        break;
      case detail::flag_id::pretrain_epochs:
        text += format(" [%d]", defaults.pretrain_epochs);
        break;
      case detail::flag_id::epochs:
        text += format(" [%d]", defaults.epochs);
        break;
      case detail::flag_id::batch:
        text += format(" [%d]", defaults.batch);
        break;
      case detail::flag_id::learning_rate:
        text += format(" [%g]", defaults.learning_rate);
        break;
      case detail::flag_id::balance:
        text += format(" [%g]", defaults.balance);
        break;
      default:
        break;
    }
    text += "\n";
  }
  text +=
      "\n"
      "Progress goes to standard error: one line that redraws on a terminal, plain lines\n"
      "elsewhere. NO_COLOR (any value) switches colours off. Files appear under their names\n"
      "only when they are complete.\n"
      "\n"
      "Exit codes: 0 done, 2 a wrong flag or file, 1 anything else; a run stopped by a signal\n"
      "ends by that signal.\n";
  return text;
}

}  // namespace talpa::examples
