// SPDX-License-Identifier: Apache-2.0
#include "support/laws.hpp"

#include <talpa/testing/gradient_check.hpp>

#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <string>

namespace talpa::gradient_check_test {

namespace {

/// y[n, o] = sin(x_no) + x_n0 x_no, with its gradient; `fault` spoils one element.
struct example {
  matrix<double, cpu> x{3, 4};
  matrix<double, cpu> y{3, 4};
  matrix<double, cpu> dx{3, 4};
  matrix<double, cpu> upstream = testing::cotangent(3, 4, 5);

  example() {
    for (index i = 0; i < x.size(); ++i) x.data()[i] = 0.3 * static_cast<double>(i) - 1.7;
    for (index n = 0; n < 3; ++n) {
      for (index o = 0; o < 4; ++o) {
        dx(n, o) += upstream(n, o) * (std::cos(x(n, o)) + x(n, 0));
        dx(n, 0) += upstream(n, o) * x(n, o);
      }
    }
  }
  matrix_view<const double, cpu> forward() {
    for (index n = 0; n < 3; ++n) {
      for (index o = 0; o < 4; ++o) y(n, o) = std::sin(x(n, o)) + x(n, 0) * x(n, o);
    }
    return y.view();
  }
  /// 12 terms of at most 1 + 1.7 * 1.7; sine, product, sum.
  static constexpr testing::gradient_accuracy accuracy{.roundings = 3.0, .magnitude = 12.0 * 4.0};

  testing::report check() {
    return testing::gradient_check(
        "example", {{"x", x.view(), dx.view()}}, upstream, accuracy, [&] { return forward(); },
        [] { return 0; });
  }
};

/// Sets testing::most_elements while it lives.
class cap {
 public:
  explicit cap(index elements) { testing::most_elements = elements; }
  ~cap() { testing::most_elements = before_; }
  cap(const cap&) = delete;
  cap& operator=(const cap&) = delete;

 private:
  index before_ = testing::most_elements;
};
constexpr index all = std::numeric_limits<index>::max();

bool mentions(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

}  // namespace

TEST_SUITE("testing/gradient_check") {
  TEST_CASE("a right gradient passes and leaves the input as it was") {
    example e;
    const matrix<double, cpu> before = e.x;
    support::obeys(e.check());
    CHECK(testing::first_difference(e.x, before) == "");
  }

  TEST_CASE("the worst element is named with what was found and expected") {
    const cap none(all);
    example e;
    e.dx(1, 2) += 1e-3;
    e.dx(2, 3) += 1e-5;
    const testing::report r = e.check();
    REQUIRE(r.failures.size() == 1);
    CHECK(mentions(r.failures[0],
                   "example: the gradient of 'x' equals differences: element [1, 2] is "));
    CHECK(mentions(r.failures[0], " instead of "));
    CHECK(mentions(r.failures[0], ", bound "));
  }

  TEST_CASE("an error of a hundred millionth is seen") {
    const cap none(all);
    for (index i = 0; i < 12; ++i) {
      example e;
      e.dx.data()[i] += 1e-8;
      CHECK_FALSE(e.check().passed());
    }
  }

  // Of 600 elements every 10th is compared by itself, and the sum along a direction sees the rest.
  TEST_CASE("a wrong element of a large probe is seen, compared by itself or not") {
    const cap none(all);
    matrix<double, cpu> x(20, 30), y(1, 1), dx(20, 30), upstream(1, 1);
    upstream(0, 0) = 1.0;
    for (index i = 0; i < x.size(); ++i) {
      x.data()[i] = 0.01 * static_cast<double>(i) - 3.0;
      dx.data()[i] = std::cos(x.data()[i]);
    }
    const matrix<double, cpu> kept = x;
    const auto check = [&] {
      // 600 sines of at most one.
      return testing::gradient_check(
          "sines", {{"x", x.view(), dx.view()}}, upstream,
          {.roundings = 600.0 + 2.0, .magnitude = 600.0, .elements = 60},
          [&] {
            y(0, 0) = 0.0;
            for (index i = 0; i < x.size(); ++i) y(0, 0) += std::sin(x.data()[i]);
            return matrix_view<const double, cpu>(y.view());
          },
          [] { return 0; });
    };
    support::obeys(check());
    CHECK(testing::first_difference(x, kept) == "");
    for (const index i : {0, 1, 9, 10, 307, 599}) {
      CAPTURE(i);
      const double right = dx.data()[i];
      dx.data()[i] += 1e-2;
      const testing::report found = check();
      REQUIRE(found.failures.size() == 1);
      CHECK(mentions(found.failures[0],
                     i % 10 == 0 ? ": element [" : ": the sum along a direction is "));
      dx.data()[i] = right;
    }
  }

  TEST_CASE("the program's cap lowers how many elements are compared by themselves") {
    const cap three(3);
    for (const index i : {0, 1, 4, 8, 11}) {
      CAPTURE(i);
      example e;
      support::obeys(e.check());
      e.dx.data()[i] += 1e-2;
      const testing::report found = e.check();
      REQUIRE(found.failures.size() == 1);
      CHECK(mentions(found.failures[0],
                     i % 4 == 0 ? ": element [" : ": the sum along a direction is "));
    }
  }

  TEST_CASE("NaN and infinity never pass") {
    for (const double bad :
         {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity()}) {
      example e;
      e.dx(0, 1) = bad;
      CHECK_FALSE(e.check().passed());
      example f;
      f.x(0, 1) = bad;
      CHECK_FALSE(f.check().passed());
    }
  }

  TEST_CASE("a signature that changes is a failure that names the element") {
    const cap none(all);
    example e;
    e.x(1, 1) = 1e-7;
    const auto r = testing::gradient_check(
        "example", {{"x", e.x.view(), e.dx.view()}}, e.upstream, example::accuracy,
        [&] { return e.forward(); }, [&] { return e.x(1, 1) > 0.0; });
    REQUIRE_FALSE(r.failures.empty());
    CHECK(r.failures[0] ==
          "example: the selection stays while 'x' is probed: not at element [1, 1]");
  }

  TEST_CASE("gradients of the wrong shape and outputs of the wrong shape are failures") {
    example e;
    const auto wrong_gradient = testing::gradient_check(
        "example", {{"x", e.x.view(), e.dx.view().row_range(0, 2)}}, e.upstream, example::accuracy,
        [&] { return e.forward(); }, [] { return 0; });
    REQUIRE(wrong_gradient.failures.size() == 1);
    CHECK(mentions(wrong_gradient.failures[0], "shape [2, 4] instead of [3, 4]"));
    const auto wrong_output = testing::gradient_check(
        "example", {{"x", e.x.view(), e.dx.view()}}, e.upstream, example::accuracy,
        [&] { return matrix_view<const double, cpu>(e.forward()).row_range(0, 2); },
        [] { return 0; });
    CHECK_FALSE(wrong_output.passed());
  }

  TEST_CASE("gradients that are all within their bound prove nothing") {
    example e;
    for (index i = 0; i < e.dx.size(); ++i) e.dx.data()[i] = 0.0;
    const auto still = [&] {
      for (index i = 0; i < e.y.size(); ++i) e.y.data()[i] = 1.0;
      return matrix_view<const double, cpu>(e.y.view());
    };
    testing::gradient_accuracy accuracy = example::accuracy;
    const auto check = [&] {
      return testing::gradient_check("example", {{"x", e.x.view(), e.dx.view()}}, e.upstream,
                                     accuracy, still, [] { return 0; });
    };
    CHECK(check().text() ==
          "example: some gradient is larger than its bound: none is, so this check proves nothing");
    accuracy.expect_nonzero = false;
    support::obeys(check());
  }

  TEST_CASE("the projection does not lose small terms beside large ones") {
    matrix<double, cpu> ones(1, 3), terms(1, 3);
    for (index i = 0; i < 3; ++i) ones(0, i) = 1.0;
    terms(0, 0) = 1e30;
    terms(0, 1) = 1.0;
    terms(0, 2) = -1e30;
    CHECK(testing::detail::exact_dot(ones.view(), terms.view()) == 1.0);
  }

  TEST_CASE("a cotangent has no element near zero and depends on its seed only") {
    const auto a = testing::cotangent(20, 30, 1), b = testing::cotangent(20, 30, 2);
    bool negative = false, positive = false, same = true;
    for (index i = 0; i < a.size(); ++i) {
      const double v = a.data()[i];
      CHECK(std::abs(v) >= 0.5);
      CHECK(std::abs(v) <= 1.0);
      negative = negative || v < 0.0;
      positive = positive || v > 0.0;
      same = same && v == b.data()[i];
    }
    CHECK(negative);
    CHECK(positive);
    CHECK_FALSE(same);
    CHECK(testing::first_difference(a, testing::cotangent(20, 30, 1)) == "");
  }
}

TEST_SUITE("testing/report") {
  TEST_CASE("a report of no law passes nothing") {
    const testing::report empty;
    CHECK_FALSE(empty.passed());
    CHECK(empty.text() == "no law was looked at");
  }

  TEST_CASE("a law keeps the first thing that breaks it") {
    testing::report r;
    {
      testing::law l(r, "numbers are small");
      l.expect(true, [] { return std::string("never asked"); });
      l.expect(false, [] { return std::string("7"); });
      l.expect(false, [] { return std::string("8"); });
      CHECK(l.broken());
    }
    testing::law(r, "letters are round").expect_none("x", "alphabet");
    testing::law(r, "this holds").expect_none("");
    CHECK(r.laws == 3);
    CHECK(r.text() == "numbers are small: 7\nletters are round: alphabet: x");
    CHECK_FALSE(r.passed());
  }

  TEST_CASE("comparisons tell signs of zero apart and treat NaN as one value") {
    matrix<float, cpu> a(1, 2), b(1, 2);
    a(0, 0) = b(0, 0) = std::numeric_limits<float>::quiet_NaN();
    CHECK(testing::first_difference(a, b) == "");
    b(0, 1) = -0.0f;
    CHECK(testing::first_difference(a, b) == "element [0, 1] is 0 instead of -0");
    CHECK(testing::first_difference(a, matrix<float, cpu>(2, 2)) ==
          "shape [1, 2] instead of [2, 2]");
    CHECK(testing::first_excess(a.view(), b.view(), [](index, index) { return 1.0; }) ==
          "element [0, 0] is nan instead of nan, bound 1");
  }
}

}  // namespace talpa::gradient_check_test
