// SPDX-License-Identifier: Apache-2.0
#include "selectors/sided.hpp"
#include "selectors/slow_selection.hpp"
#include "support/sanitized.hpp"
#include "support/scalars.hpp"
#include "support/tolerance.hpp"

#include <talpa/selectors/sparsegen.hpp>
#include <talpa/testing/gradient_check.hpp>

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

namespace talpa::sparsegen_test {

namespace {

using support::refusal;
using support::row_matrix;
using support::run_sided;
using learned = sparsegen<linear_scorer>;

/// The projection by sorting, as its definition has it: k = the largest j with size + j u_(j) >
/// u_(1) + ... + u_(j).
struct slow_projection {
  std::vector<double> p;
  double nearest = std::numeric_limits<double>::infinity();  // of a logit to tau

  slow_projection(const std::vector<double>& u, double size) {
    std::vector<double> sorted;
    const double top = *std::max_element(u.begin(), u.end());
    for (const double v : u) {
      if (std::isfinite(v)) sorted.push_back(v - top);
    }
    std::sort(sorted.begin(), sorted.end(), [](double a, double b) { return a > b; });
    double sum = 0.0, tau = 0.0;
    for (std::size_t j = 0; j < sorted.size(); ++j) {
      sum += sorted[j];
      const double n = static_cast<double>(j + 1);
      if (size + n * sorted[j] > sum) tau = (sum - size) / n;
    }
    for (const double v : u) {
      const bool finite = std::isfinite(v);
      p.push_back(finite ? std::max(v - top - tau, 0.0) / size : 0.0);
      if (finite) nearest = std::min(nearest, std::abs(v - top - tau));
    }
  }
};

/// Every gate and gradient of random rows against sorting and the whole Jacobian. `size(c)`.
template <class T, class Selector, class Size>
void compare(const Selector& selector, index experts, Size size) {
  constexpr bool controlled = controlled_selector<Selector>;
  support::test_random random(31 + static_cast<std::uint64_t>(experts));
  const index tokens = support::many_rows(400);
  const auto u = support::eventful_logits<T>(random, tokens, experts);
  const auto dg = support::random_matrix<T>(random, tokens, experts);
  const auto c = support::random_matrix<T>(random, tokens, 1, 2.0);
  const auto found = run_sided<T>(selector, u, dg, controlled ? c : matrix<T, cpu>());
  index left = 0;
  for (index n = 0; n < tokens; ++n) {
    const double s = size(static_cast<double>(c(n, 0)));
    const slow_projection slow(support::widened_row(u, n), s);
    // u - max u, softplus, a sum of at most E terms that are at most s where they stay, two
    // quotients: all of size s, so of size 1 in p.
    const double error = support::rounding_bound<T>(2.0 * static_cast<double>(experts) + 16.0, 1.0);
    if (slow.nearest <= error * s) {
      ++left;
      continue;
    }
    double count = 0.0, mean = 0.0, inner = 0.0;
    for (index e = 0; e < experts; ++e) {
      const double p = slow.p[static_cast<std::size_t>(e)];
      if (p <= 0.0) continue;
      count += 1.0;
      mean += static_cast<double>(dg(n, e));
      inner += p * static_cast<double>(dg(n, e));
    }
    mean /= count;
    const double largest = testing::largest(dg.view().row_range(n, 1));
    const double slope_error = 4.0 * error * largest / s;
    for (index e = 0; e < experts; ++e) {
      const double p = slow.p[static_cast<std::size_t>(e)];
      const double du = p > 0.0 ? (static_cast<double>(dg(n, e)) - mean) / s : 0.0;
      REQUIRE(found.on(n, e) == (p > 0.0));
      REQUIRE(support::within(static_cast<double>(found.r.gates(n, e)), p, error));
      REQUIRE(support::within(static_cast<double>(found.dlogits(n, e)), du, slope_error));
    }
    if (controlled) {
      const double dlambda = (inner - mean) / s;
      const double dc = dlambda / (1.0 + std::exp(static_cast<double>(c(n, 0))));
      REQUIRE(support::within(static_cast<double>(found.dcontrol(n, 0)), dc, slope_error));
    }
  }
  CHECK(4 * left <= tokens);  // one row in three has ties, which may lie at tau
}

}  // namespace

TEST_SUITE("selectors/sparsegen") {
  // Sparsemax of (1, 0.5, -1): tau = (1.5 - 1) / 2 = 0.25, p = (0.75, 0.25, 0).
  TEST_CASE_TEMPLATE("by hand", T, TALPA_SCALARS) {
    const auto u = row_matrix<T>({1.0, 0.5, -1.0}), dg = row_matrix<T>({3.0, 1.0, 9.0});
    const auto found = run_sided<T>(fixed_sparsegen{}, u, dg);
    // Each number here is exact.
    CHECK(support::difference(found.r.gates.view(), {1, 3, {0.75, 0.25, 0.0}}, 0.0) == "");
    CHECK(support::difference(found.dlogits.view(), {1, 3, {1.0, -1.0, 0.0}}, 0.0) == "");
    // lambda = 1 / 2: tau = (1.5 - 0.5) / 2 = 0.5, where the second logit lies: off.
    const auto sharp = run_sided<T>(fixed_sparsegen{.lambda = 0.5}, u, dg);
    CHECK(support::difference(sharp.r.gates.view(), {1, 3, {1.0, 0.0, 0.0}}, 0.0) == "");
    CHECK(sharp.count(0) == 1);
    // lambda = -4: tau = (0.5 - 5) / 3 = -1.5.
    const auto flat = run_sided<T>(fixed_sparsegen{.lambda = -4.0}, u, dg);
    CHECK(support::difference(flat.r.gates.view(), {1, 3, {0.5, 0.4, 0.1}},
                              support::rounding_bound<T>(8.0, 1.0)) == "");
    // Learned, c = 0: 1 - lambda = ln 2 + 0.01 = s; tau = (1.5 - s) / 2.
    const auto c = row_matrix<T>({0.0});
    const auto soft = run_sided<T>(learned{}, u, dg, c);
    const double s = std::log(2.0) + 0.01, p = 0.25 / s + 0.5;
    const double bound = support::rounding_bound<T>(16.0, 1.0);
    CHECK(support::difference(soft.r.gates.view(), {1, 3, {p, 1.0 - p, 0.0}}, bound) == "");
    // Mean of dg over two is 2; dlambda = (3 p + (1 - p) - 2) / s, dc = dlambda / 2.
    CHECK(support::difference(soft.dlogits.view(), {1, 3, {1.0 / s, -1.0 / s, 0.0}}, 9.0 * bound) ==
          "");
    CHECK(support::within(static_cast<double>(soft.dcontrol(0, 0)), (2.0 * p - 1.0) / s / 2.0,
                          9.0 * bound));
  }

  TEST_CASE_TEMPLATE("agree with sorting on thousands of rows", T, TALPA_SCALARS) {
    for (const index experts : {1, 2, 3, 8, 33, 65}) {
      CAPTURE(experts);
      compare<T>(learned{}, experts, [](double c) { return std::log1p(std::exp(-c)) + 0.01; });
      for (const double lambda : {-3.0, 0.0, 0.75}) {
        compare<T>(fixed_sparsegen{.lambda = lambda}, experts,
                   [&](double) { return 1.0 - lambda; });
      }
    }
  }

  TEST_CASE("one expert, masked experts, ends of lambda, controls that are not numbers") {
    const double infinity = std::numeric_limits<double>::infinity();
    const auto five = row_matrix<double>({5.0});
    const auto one = run_sided<double>(learned{}, five, five, row_matrix<double>({0.3}));
    CHECK(one.r.gates(0, 0) == 1.0);
    CHECK(one.dlogits(0, 0) == 0.0);
    CHECK(one.dcontrol(0, 0) == 0.0);

    const auto u = row_matrix<double>({1.0, -infinity, 0.5, 0.75});
    const auto dg = row_matrix<double>({1.0, 2.0, 3.0, 4.0});
    // 1 - lambda = 0.01, less than every gap: the best alone.
    const auto sharp = run_sided<double>(learned{}, u, dg, row_matrix<double>({infinity}));
    CHECK(sharp.count(0) == 1);
    CHECK(sharp.r.gates(0, 0) == 1.0);
    const auto flat = run_sided<double>(learned{}, u, dg, row_matrix<double>({-1e9}));
    CHECK(flat.count(0) == 3);
    // Gates of 1/3 and a part of 1e-9 of the logits.
    CHECK(std::abs(flat.r.gates(0, 2) - 1.0 / 3.0) < 1e-9);
    for (const double bad : {-infinity, std::nan("")}) {
      const auto broken = run_sided<double>(learned{}, u, dg, row_matrix<double>({bad}));
      CHECK(broken.count(0) == 4);
      for (index e = 0; e < 4; ++e) CHECK(std::isnan(broken.r.gates(0, e)));
    }
    // Equal logits share equally whatever lambda is.
    const auto equal = row_matrix<double>({2.0, 2.0, 2.0, 2.0});
    const auto shared = run_sided<double>(learned{}, equal, dg, row_matrix<double>({1.7}));
    for (index e = 0; e < 4; ++e) CHECK(shared.r.gates(0, e) == 0.25);
    CHECK(shared.dcontrol(0, 0) == 0.0);
  }

  TEST_CASE("what does not fit is refused") {
    CHECK(refusal(learned{.epsilon = 0.0}, 4) ==
          "talpa::sparsegen: 'epsilon' is 0, expected in (0, 1] = least 1 - lambda");
    CHECK(refusal(fixed_sparsegen{.lambda = 1.0}, 4) ==
          "talpa::fixed_sparsegen: 'lambda' is 1, expected a finite number < 1");
    CHECK(refusal(fixed_sparsegen{.lambda = -std::numeric_limits<double>::infinity()}, 4) != "");
    CHECK(refusal(learned{}, 1) == "");
  }
}

}  // namespace talpa::sparsegen_test
