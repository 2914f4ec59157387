// SPDX-License-Identifier: Apache-2.0
#include "selectors/coupled.hpp"
#include "selectors/slow_mass.hpp"
#include "support/sanitized.hpp"
#include "support/scalars.hpp"
#include "support/tolerance.hpp"

#include <talpa/selectors/dense.hpp>
#include <talpa/selectors/dynamic_entropy.hpp>
#include <talpa/selectors/top_p.hpp>

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <limits>

namespace talpa::dynamic_entropy_test {

namespace {

using support::backward_of;
using support::experts_of;
using support::one_row;
using support::route;
using support::weighing;
using experts = std::vector<index>;

template <class Weight>
constexpr weighing how = std::same_as<Weight, gate::raw> ? weighing::raw : weighing::renormalised;

// Normalised entropies once more; p^q by std::pow, not by the library's deformed logarithm.
double slow_entropy(const entropy::shannon&, const std::vector<double>& p) {
  double h = 0.0;
  for (const double v : p) h -= v > 0.0 ? v * std::log(v) : 0.0;
  return p.size() > 1 ? h / std::log(static_cast<double>(p.size())) : 0.0;
}
double slow_power_sum(const std::vector<double>& p, double q) {
  double sum = 0.0;
  for (const double v : p) sum += v > 0.0 ? std::pow(v, q) : 0.0;
  return sum;
}
double slow_entropy(const entropy::tsallis& kind, const std::vector<double>& p) {
  const double greatest = 1.0 - std::pow(static_cast<double>(p.size()), 1.0 - kind.q);
  return p.size() > 1 ? (1.0 - slow_power_sum(p, kind.q)) / greatest : 0.0;
}
double slow_entropy(const entropy::renyi& kind, const std::vector<double>& p) {
  const double h = std::log(slow_power_sum(p, kind.q)) / (1.0 - kind.q);
  return p.size() > 1 ? h / std::log(static_cast<double>(p.size())) : 0.0;
}

template <class Entropy, class Weight>
void compare(const Entropy& kind) {
  std::uint64_t seed = 900;
  for (const index count : {1, 2, 3, 8, 31, 33, 65}) {
    for (const double threshold : {0.0, 0.62, 0.93, 1.0}) {
      for (const index min_k : {1, 3}) {
        CAPTURE(count);
        CAPTURE(threshold);
        CAPTURE(min_k);
        const dynamic_entropy<Entropy, Weight> selector{
            .p = 0.73, .min_k = min_k, .threshold = threshold, .entropy = kind};
        const auto slow = [&](const std::vector<double>& u) {
          support::slow_mass_row r = support::slow_top_p(u, 0.73, min_k, false, how<Weight>);
          if (threshold >= 1.0) return r;
          const double h = slow_entropy(kind, r.row.probability);
          // One expert, and rows with one expert that is not masked, have exactly 0 on both sides.
          const bool sure = std::count(r.row.probability.begin(), r.row.probability.end(), 1.0) > 0;
          if (!sure) r.margin = std::min(r.margin, std::abs(h - threshold));
          if (!sure && h > threshold) {
            for (std::size_t e = 0; e < u.size(); ++e) r.row.on[e] = !std::isinf(u[e]);
          }
          support::weigh_slowly(r.row, how<Weight>);
          return r;
        };
        // Each term p ln p or p^q has the error of p and of a logarithm of size at most ln E + the
        // spread of the logits; 16 is generous for q up to 2 and the division.
        CHECK(support::compare_with_slow<float>(selector, support::many_rows(200), count, ++seed,
                                                how<Weight>, 16.0, slow) == "");
        CHECK(support::compare_with_slow<double>(selector, support::many_rows(200), count, ++seed,
                                                 how<Weight>, 16.0, slow) == "");
      }
    }
  }
}

}  // namespace

TEST_SUITE("selectors/dynamic_entropy") {
  // p = (1, 3, 2, 4) / 10. Tsallis with q = 2: H = (1 - 0.3) / (3 / 4) = 14 / 15. By rank the sums
  // are 0.4, 0.7, 0.9, 1.
  TEST_CASE_TEMPLATE("dynamic_entropy on four experts, by hand", T, TALPA_SCALARS) {
    using selector = dynamic_entropy<entropy::tsallis, gate::raw>;
    const matrix<T, cpu> u = one_row<T>({0.0, std::log(3.0), std::log(2.0), std::log(4.0)});
    const matrix<T, cpu> dg = one_row<T>({9.0, 1.0, -9.0, 0.0});
    const double bound = support::rounding_bound<T>(2.0 * (4.0 + 4.0), 1.0);
    const selector sure{.p = 0.8, .min_k = 1, .threshold = 0.94, .entropy = {.q = 2.0}};
    const auto few = route(sure, u);
    CHECK(experts_of(few, 0) == experts{1, 3});
    CHECK(support::difference(few.gates.view(), {1, 4, {0.0, 0.3, 0.0, 0.4}}, bound) == "");
    // sum of p dg over {1, 3} is 0.3; du = p (dg on the mask - 0.3).
    CHECK(support::difference(backward_of(sure, u, few, dg).view(),
                              {1, 4, {-0.03, 0.21, -0.06, -0.12}}, bound) == "");

    const selector unsure{.p = 0.8, .min_k = 1, .threshold = 0.93, .entropy = {.q = 2.0}};
    const auto all = route(unsure, u);
    CHECK(support::difference(all.gates.view(), {1, 4, {0.1, 0.3, 0.2, 0.4}}, bound) == "");
    // sum of p dg is 0.9 + 0.3 - 1.8 = -0.6; du = p (dg + 0.6).
    CHECK(support::difference(backward_of(unsure, u, all, dg).view(),
                              {1, 4, {0.96, 0.48, -1.68, 0.24}}, 10.0 * bound) == "");
    // min_k ranks stay on though the first alone exceeds p.
    CHECK(experts_of(route(selector{.p = 0.1, .min_k = 2, .threshold = 1.0}, u), 0) ==
          experts{1, 3});
    CHECK(experts_of(route(selector{.p = 0.1, .min_k = 7, .threshold = 1.0}, u), 0) ==
          experts{0, 1, 2, 3});
  }

  TEST_CASE("dynamic_entropy agrees with sorting on thousands of rows") {
    compare<entropy::shannon, gate::raw>({});
    compare<entropy::tsallis, gate::raw>({.q = 1.1});
    compare<entropy::tsallis, gate::renormalised>({.q = 2.0});
    compare<entropy::renyi, gate::softmax_selected>({.q = 0.5});
    compare<entropy::renyi, gate::raw>({.q = 2.0});
  }

  TEST_CASE_TEMPLATE("threshold 1 switches the entropy off, for equal logits too", T,
                     TALPA_SCALARS) {
    for (const index count : {2, 3, 5, 6, 7, 33}) {
      CAPTURE(count);
      const matrix<T, cpu> u(1, count);
      const auto off = route(dynamic_entropy<>{.threshold = 1.0}, u);
      CHECK(off == route(top_p<gate::raw, crossing::dropped>{.p = 0.75, .min_k = 2}, u));
      CHECK(route(dynamic_entropy<>{.threshold = 0.9}, u) == route(dense{}, u));
    }
  }

  TEST_CASE("nats are compared as they are") {
    // Equal logits of eight experts: H = ln 8 = 2.079 nats.
    using selector = dynamic_entropy<entropy::shannon>;
    const matrix<double, cpu> u(1, 8);
    const selector low{.threshold = 2.0, .entropy = {.normalised = false}};
    const selector high{.threshold = 2.1, .entropy = {.normalised = false}};
    CHECK(experts_of(route(low, u), 0).size() == 8);
    CHECK(experts_of(route(high, u), 0) == experts{0, 1, 2, 3, 4, 5});
  }

  TEST_CASE("one expert, masked experts, rows that are not valid") {
    const float infinity = std::numeric_limits<float>::infinity();
    const auto one = route(dynamic_entropy<>{.threshold = 0.0}, one_row<float>({-3.0}));
    CHECK(one.gates(0, 0) == 1.0f);
    const dynamic_entropy<> all{.threshold = 0.0};
    CHECK(experts_of(route(all, one_row<float>({1.0, -infinity, 2.0, -infinity})), 0) ==
          experts{0, 2});
    for (const double bad : {std::nan(""), static_cast<double>(infinity)}) {
      const auto r = route(dynamic_entropy<>{}, one_row<float>({1.0, bad, 2.0}));
      CHECK(experts_of(r, 0) == experts{0, 1, 2});
      for (index e = 0; e < 3; ++e) CHECK(std::isnan(r.gates(0, e)));
    }
  }

  TEST_CASE("hyperparameters out of range are refused with their range") {
    const matrix<float, cpu> u(2, 8);
    CHECK_THROWS_WITH_AS(route(dynamic_entropy<>{.p = 1.5}, u),
                         "talpa::dynamic_entropy: 'p' is 1.5, expected 0..1 = cumulative "
                         "probability",
                         value_error);
    CHECK_THROWS_WITH_AS(route(dynamic_entropy<>{.min_k = 0}, u),
                         "talpa::dynamic_entropy: 'min_k' is 0, expected >= 1 = experts a token "
                         "gets in any case",
                         value_error);
    CHECK_THROWS_WITH_AS(route(dynamic_entropy<>{.threshold = -0.5}, u),
                         "talpa::dynamic_entropy: 'threshold' is -0.5, expected >= 0 = entropy "
                         "above which all experts are on",
                         value_error);
    CHECK_THROWS_WITH_AS(route(dynamic_entropy<>{.threshold = std::nan("")}, u),
                         "talpa::dynamic_entropy: 'threshold' is nan, expected >= 0 = entropy "
                         "above which all experts are on",
                         value_error);
    CHECK_THROWS_WITH_AS(route(dynamic_entropy<>{.entropy = {.q = 0.0}}, u),
                         "talpa::dynamic_entropy: 'entropy.q' is 0, expected a finite number > 0",
                         value_error);
  }
}

}  // namespace talpa::dynamic_entropy_test
