// SPDX-License-Identifier: Apache-2.0
#include <talpa/cpu/token_pack.hpp>
#include <talpa/routing/entropy.hpp>
#include <talpa/testing/bounds.hpp>
#include <talpa/testing/gradient_check.hpp>
#include <talpa/testing/lanes.hpp>
#include <talpa/testing/sim.hpp>

#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <vector>

namespace talpa::entropy_test {

namespace {

using row = std::vector<double>;

template <class T>
struct outcome {
  T value;
  std::vector<T> slopes;
};

/// Value and slopes of one row on group G.
template <class G, class T, class Kind>
outcome<T> on(const Kind& kind, const row& p) {
  std::vector<T> in, slopes(p.size());
  for (const double x : p) in.push_back(static_cast<T>(x));
  T value{};
  testing::for_each_row_on<G>(1, static_cast<index>(p.size()), [&](const auto& g, index, int) {
    auto a = g.template elements<T>();
    auto d = g.template elements<T>();
    g.for_each([&](auto e) { a[e] = g.load(row_pointer<const T>{in.data(), 0}, e, T{0}); });
    g.store(row_scalar<T>{&value, 1}, kind.template value<T>(g, a));
    kind.template slopes<T>(g, a, d);
    g.for_each([&](auto e) { g.store(row_pointer<T>{slopes.data(), 0}, e, d[e]); });
  });
  return {value, slopes};
}
template <class Kind>
double value(const Kind& kind, const row& p) {
  return on<serial, double>(kind, p).value;
}

const row uneven_row = {0.5, 0.3, 0.15, 0.05, 0.0};

/// The definitions, in long double where they are well conditioned.
long double slow_shannon(const row& p) {
  long double sum = 0;
  for (const double v : p) sum -= v > 0 ? v * std::log(static_cast<long double>(v)) : 0;
  return sum / std::log(static_cast<long double>(p.size()));
}
long double slow_tsallis(const row& p, long double q) {
  long double sum = 0;
  for (const double v : p) sum += v > 0 ? std::pow(static_cast<long double>(v), q) : 0;
  return (1 - sum) / (1 - std::pow(static_cast<long double>(p.size()), 1 - q));
}
long double slow_renyi(const row& p, long double q) {
  long double sum = 0;
  for (const double v : p) sum += v > 0 ? std::pow(static_cast<long double>(v), q) : 0;
  return std::log(sum) / (1 - q) / std::log(static_cast<long double>(p.size()));
}

/// A handful of functions with errors of a few ulp on each of E terms of size at most 1 + |ln p|,
/// and one on the normaliser.
double bound(const row& p, double expected) {
  double size = 1.0;
  for (const double v : p) size = std::max(size, v > 0.0 ? 1.0 - std::log(v) : 0.0);
  return testing::gamma<double>(static_cast<double>(p.size()) + 16.0) * size *
         std::max(1.0, std::abs(expected));
}
void close(double found, long double expected, const row& p) {
  const auto e = static_cast<double>(expected);
  CAPTURE(found);
  CAPTURE(e);
  CHECK(std::abs(found - e) <= bound(p, e));
}

}  // namespace

TEST_SUITE("routing/entropy") {
  TEST_CASE("two experts, by hand") {
    // -(3/4 ln 3/4 + 1/4 ln 1/4) / ln 2 = 2 - 3/4 ln 3 / ln 2.
    const row p = {0.75, 0.25};
    close(value(entropy::shannon{}, p), 2.0L - 0.75L * std::log(3.0L) / std::log(2.0L), p);
    // (1 - 10/16) / (1 - 1/2) and -ln(10/16) / ln 2.
    close(value(entropy::tsallis{.q = 2.0}, p), 0.75L, p);
    close(value(entropy::renyi{.q = 2.0}, p), -std::log(0.625L) / std::log(2.0L), p);
    close(value(entropy::shannon{.normalised = false}, p),
          2.0L * std::log(2.0L) - 0.75L * std::log(3.0L), p);
    close(value(entropy::tsallis{.q = 2.0, .normalised = false}, p), 0.375L, p);
  }

  TEST_CASE("the exact forms are their definitions, also next to index one") {
    const row p = uneven_row;
    close(value(entropy::shannon{}, p), slow_shannon(p), p);
    for (const double q : {0.5, 0.9, 1.1, 1.4, 2.0, 3.0}) {
      CAPTURE(q);
      close(value(entropy::tsallis{.q = q}, p), slow_tsallis(p, q), p);
      close(value(entropy::renyi{.q = q}, p), slow_renyi(p, q), p);
    }
    // Continuous: |dH / dq| is below 1 here, so H moves by less than |q - 1|.
    for (const double q : {1.0, 1.0 + 1e-4, 1.0 - 1e-4, 1.0 + 1e-7, 1.0 - 1e-12}) {
      CAPTURE(q);
      const double away = std::abs(q - 1.0) + bound(p, 1.0);
      const auto h = static_cast<double>(slow_shannon(p));
      CHECK(std::abs(value(entropy::tsallis{.q = q}, p) - h) <= away);
      CHECK(std::abs(value(entropy::renyi{.q = q}, p) - h) <= away);
    }
  }

  TEST_CASE("0 where one expert has everything, 1 where all are alike, 0 for one expert") {
    const auto check = [&](const auto& kind) {
      for (const std::size_t experts : {std::size_t{2}, std::size_t{5}, std::size_t{33}}) {
        row one_hot(experts, 0.0), even(experts, 1.0 / static_cast<double>(experts));
        one_hot[1] = 1.0;
        close(value(kind, one_hot), 0.0L, one_hot);
        close(value(kind, even), 1.0L, even);
      }
      CHECK(value(kind, {1.0}) == 0.0);
      CHECK(on<serial, double>(kind, {1.0}).slopes[0] == 0.0);
      // No weight, no slope.
      CHECK(on<serial, double>(kind, uneven_row).slopes[4] == 0.0);
    };
    check(entropy::shannon{});
    for (const double q : {0.5, 1.0, 1.1, 2.0}) {
      check(entropy::tsallis{.q = q});
      check(entropy::renyi{.q = q});
    }
  }

  TEST_CASE("with epsilon the values are those of DynMoLE's code") {
    // (1 - sum (p + eps)^q) / (1 - E^(1 - q)): what that code makes of uniform and one-hot rows.
    const row even(6, 1.0 / 6.0);
    const entropy::tsallis kind{.q = 1.1, .epsilon = 1e-5};
    CHECK(std::abs(value(kind, even) - 0.99966) < 5e-6);  // five digits are documented
    row one_hot(6, 0.0);
    one_hot[0] = 1.0;
    CHECK(value(kind, one_hot) < 0.0);
    // At q = 1 + 1e-7 the shift is divided by 1e-7.
    CHECK(value(entropy::tsallis{.q = 1.0 + 1e-7, .epsilon = 1e-5}, even) < -100.0);
    CHECK(std::isinf(value(kind, {1.0})));
    // GW-MoE adds inside the logarithm alone.
    const row p = {0.75, 0.25};
    const long double shifted =
        -(0.75L * std::log(0.75L + 1e-5L) + 0.25L * std::log(0.25L + 1e-5L));
    close(value(entropy::shannon{.log_epsilon = 1e-5, .normalised = false}, p), shifted, p);
    close(value(entropy::shannon{.log_epsilon = 1e-5, .normalised = false}, {1.0}),
          -std::log(1.0L + 1e-5L), {1.0});
  }

  TEST_CASE("slopes are derivatives along the simplex") {
    const auto check = [&](const auto& kind) {
      const row p = {0.4, 0.3, 0.2, 0.1};
      const std::vector<double> d = on<serial, double>(kind, p).slopes;
      for (std::size_t e = 0; e + 1 < p.size(); ++e) {
        const double h = testing::difference_step(p[e]);
        row up = p, down = p;
        up[e] += h;
        up[e + 1] -= h;
        down[e] -= h;
        down[e + 1] += h;
        const double found = (value(kind, up) - value(kind, down)) / (2.0 * h);
        // Truncation: h^2 / 6 times a third derivative of at most 2 / p^2 = 200 per entry, scaled
        // by 1 / ln 4 and by 1 / |greatest| < 2; rounding: two values over 2 h.
        const double allowed = 400.0 * h * h + 2.0 * bound(p, 1.0) / h;
        CHECK(std::abs(found - (d[e] - d[e + 1])) <= allowed);
      }
    };
    check(entropy::shannon{});
    check(entropy::shannon{.epsilon = 1e-3, .normalised = false});
    check(entropy::shannon{.log_epsilon = 1e-2});
    for (const double q : {0.5, 1.0, 1.0 + 1e-9, 1.1, 2.0}) {
      CAPTURE(q);
      check(entropy::tsallis{.q = q});
      check(entropy::tsallis{.q = q, .normalised = false});
      check(entropy::renyi{.q = q});
    }
    for (const double q : {0.5, 1.0, 1.1, 2.0}) {
      CAPTURE(q);
      check(entropy::tsallis{.q = q, .epsilon = 1e-3});
      check(entropy::renyi{.q = q, .epsilon = 1e-3});
    }
  }

  TEST_CASE("every lane group gives the same bits") {
    row p(70);
    double sum = 0.0;
    for (std::size_t e = 0; e < p.size(); ++e) {
      p[e] = e % 7 == 3 ? 0.0 : 1.0 / static_cast<double>(e + 1);
      sum += p[e];
    }
    for (double& v : p) v /= sum;
    const auto check = [&](const auto& kind) {
      const outcome<float> expected = on<serial, float>(kind, p);
      const auto same = [&](const outcome<float>& found) {
        CHECK(testing::same_number(found.value, expected.value));
        for (std::size_t e = 0; e < p.size(); ++e) {
          CHECK(testing::same_number(found.slopes[e], expected.slopes[e]));
        }
      };
      same(on<token_pack<8>, float>(kind, p));
      same(on<sim<4>, float>(kind, p));
      same(on<sim<8>, float>(kind, p));
      same(on<sim<32>, float>(kind, p));
    };
    check(entropy::shannon{});
    check(entropy::tsallis{});
    check(entropy::tsallis{.epsilon = 1e-5});
    check(entropy::renyi{});
    check(entropy::renyi{.epsilon = 1e-5});
  }

  TEST_CASE("NaN among the probabilities gives NaN, for one expert too") {
    const double nan = std::numeric_limits<double>::quiet_NaN();
    for (const row& p : {row{nan}, row{0.25, nan, 0.75}}) {
      const auto check = [&](const auto& kind) {
        CHECK(std::isnan(on<serial, double>(kind, p).value));
      };
      check(entropy::shannon{});
      check(entropy::shannon{.epsilon = 1e-5});
      check(entropy::shannon{.log_epsilon = 1e-5, .normalised = false});
      for (const double q : {0.5, 1.0, 1.1, 2.0}) {
        check(entropy::tsallis{.q = q});
        check(entropy::tsallis{.q = q, .epsilon = 1e-5});
        check(entropy::renyi{.q = q});
        check(entropy::renyi{.q = q, .epsilon = 1e-5, .normalised = false});
      }
    }
  }

  TEST_CASE("an index or a shift out of range is refused") {
    CHECK_THROWS_WITH_AS(entropy::tsallis{.q = 0.0}.validate("policy"),
                         "talpa::policy: 'entropy.q' is 0, expected a finite number > 0",
                         value_error);
    CHECK_THROWS_AS(
        entropy::renyi{.q = std::numeric_limits<double>::quiet_NaN()}.validate("policy"),
        value_error);
    CHECK_THROWS_WITH_AS(entropy::renyi{.epsilon = -1.0}.validate("policy"),
                         "talpa::policy: 'entropy.epsilon' is -1, expected a finite number >= 0",
                         value_error);
    CHECK_THROWS_WITH_AS(
        entropy::shannon{.log_epsilon = -1.0}.validate("policy"),
        "talpa::policy: 'entropy.log_epsilon' is -1, expected a finite number >= 0", value_error);
    CHECK_NOTHROW(entropy::shannon{}.validate("policy"));
    CHECK_NOTHROW(entropy::tsallis{.q = 1.0}.validate("policy"));
  }
}

}  // namespace talpa::entropy_test
