// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/error.hpp>
#include <talpa/core/index.hpp>

#include <cstdio>
#include <string>
#include <vector>

namespace talpa::testing {

/// What a set of laws found: one sentence for each law that does not hold. It knows no test
/// framework; a test prints `text()` and fails unless `passed()`.
struct report {
  std::vector<std::string> failures;
  index laws = 0;  ///< laws that were looked at; a report of none passes nothing

  bool passed() const { return failures.empty() && laws > 0; }
  /// All sentences, one a line.
  std::string text() const {
    std::string all = laws > 0 ? "" : "no law was looked at";
    for (const std::string& failure : failures) {
      if (!all.empty()) all += '\n';
      all += failure;
    }
    return all;
  }
  void add(const report& other) {
    laws += other.laws;
    failures.insert(failures.end(), other.failures.begin(), other.failures.end());
  }
};

/// One law of a report: keeps the first thing that breaks it.
class law {
 public:
  /// `sentence` says what should hold.
  law(report& out, std::string sentence) : out_(out), sentence_(std::move(sentence)) {
    ++out_.laws;
  }
  law(const law&) = delete;
  law& operator=(const law&) = delete;

  bool broken() const { return broken_; }
  /// `where()` is asked only when something broke, and says what was found.
  template <class Where>
  void expect(bool holds, Where where) {
    if (holds || broken_) return;
    broken_ = true;
    out_.failures.push_back(talpa::detail::concat(sentence_, ": ", where()));
  }
  /// Empty `difference`: the law holds.
  void expect_none(const std::string& difference) {
    expect(difference.empty(), [&] { return difference; });
  }
  /// The same, found in `where`.
  void expect_none(const std::string& difference, const std::string& where) {
    expect(difference.empty(), [&] { return talpa::detail::concat(where, ": ", difference); });
  }

 private:
  report& out_;
  std::string sentence_;
  bool broken_ = false;
};

/// A number with enough digits to be told from its neighbours.
inline std::string digits(double value) {
  char text[40];
  std::snprintf(text, sizeof text, "%.17g", value);
  return text;
}

}  // namespace talpa::testing
