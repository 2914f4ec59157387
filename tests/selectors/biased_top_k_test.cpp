// SPDX-License-Identifier: Apache-2.0
#include "selectors/sided.hpp"
#include "selectors/slow_selection.hpp"
#include "support/sanitized.hpp"
#include "support/scalars.hpp"
#include "support/tolerance.hpp"

#include <talpa/selectors/biased_top_k.hpp>
#include <talpa/testing/gradient_check.hpp>

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <concepts>
#include <limits>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

namespace talpa::biased_top_k_test {

namespace {

using support::refusal;
using support::row_matrix;
using support::run_sided;
using deepseek = biased_top_k<>;
using indices = std::vector<index>;

indices experts_of(const support::sided_result<double>& found) {
  indices on;
  for (index e = 0; e < found.r.gates.cols(); ++e) {
    if (found.on(0, e)) on.push_back(e);
  }
  return on;
}

/// Chooses by sorting. `nearest`: least distance of two numbers that were compared.
struct slow_choice {
  std::vector<bool> on;
  double nearest = std::numeric_limits<double>::infinity();

  slow_choice(const std::vector<double>& choice, index k, index groups, index kept, index pair) {
    const index experts = static_cast<index>(choice.size()), size = experts / groups;
    std::vector<std::pair<double, index>> ranked;  // (-rank, group)
    for (index q = 0; q < groups; ++q) {
      std::vector<double> best;
      for (index e = q * size; e < (q + 1) * size; ++e) {
        if (std::isfinite(choice[at(e)])) best.push_back(-choice[at(e)]);
      }
      std::sort(best.begin(), best.end());
      if (best.empty()) continue;
      ranked.emplace_back(pair == 2 && best.size() > 1 ? best[0] + best[1] : best[0], q);
    }
    cut(ranked, kept);
    std::vector<std::pair<double, index>> open;
    for (const auto& [rank, q] : ranked) {
      for (index e = q * size; e < (q + 1) * size; ++e) {
        if (std::isfinite(choice[at(e)])) open.emplace_back(-choice[at(e)], e);
      }
    }
    cut(open, k);
    on.assign(choice.size(), false);
    for (const auto& [c, e] : open) on[at(e)] = true;
  }

 private:
  static std::size_t at(index e) { return static_cast<std::size_t>(e); }
  void cut(std::vector<std::pair<double, index>>& list, index most) {
    std::sort(list.begin(), list.end());
    const std::size_t k = at(most);
    if (list.size() <= k) return;
    nearest = std::min(nearest, list[k].first - list[k - 1].first);
    list.resize(k);
  }
};

template <class T, class Score, class Weight>
void compare(const biased_top_k<Score, Weight>& selector, index experts) {
  constexpr bool sigmoid = std::same_as<Score, score::sigmoid>;
  constexpr bool unit = std::same_as<Weight, gate::renormalised>;
  support::test_random random(91 + static_cast<std::uint64_t>(experts));
  const index tokens = support::many_rows(300);
  const auto u = support::eventful_logits<T>(random, tokens, experts);
  const auto dg = support::random_matrix<T>(random, tokens, experts);
  const auto bias = support::random_matrix<T>(random, 1, experts, 0.2);
  const auto found = run_sided<T>(selector, u, dg, {}, bias);
  index left = 0;
  for (index n = 0; n < tokens; ++n) {
    const std::vector<double> logits = support::widened_row(u, n);
    const double top = *std::max_element(logits.begin(), logits.end());
    double all = 0.0;
    for (const double v : logits) all += std::exp(v - top);
    std::vector<double> s, choice;
    for (index e = 0; e < experts; ++e) {
      const double v = logits[static_cast<std::size_t>(e)];
      s.push_back(sigmoid ? 1.0 / (1.0 + std::exp(-v)) : std::exp(v - top) / all);
      choice.push_back(std::isinf(v) ? v : s.back() + static_cast<double>(bias(0, e)));
    }
    const slow_choice slow(choice, selector.k, selector.n_groups, selector.topk_groups,
                           selector.group_best);
    // A score: a difference, a function, E additions, a quotient; the choice adds twice to it.
    const double chain =
        2.0 * static_cast<double>(experts) + 2.0 * support::spread_of_row(logits) + 16.0;
    const double error = support::rounding_bound<T>(chain, 1.0);
    if (slow.nearest <= 4.0 * error) {
      ++left;
      continue;
    }
    double mass = 0.0;
    for (std::size_t e = 0; e < s.size(); ++e) mass += slow.on[e] ? s[e] : 0.0;
    if (!unit) mass = 1.0;
    // dscore by the whole Jacobian, then dlogit.
    std::vector<double> ds(s.size(), 0.0);
    for (std::size_t e = 0; e < s.size(); ++e) {
      for (std::size_t j = 0; slow.on[e] && j < s.size(); ++j) {
        if (!slow.on[j]) continue;
        const double slope = (e == j ? 1.0 / mass : 0.0) - (unit ? s[e] / mass / mass : 0.0);
        ds[j] += selector.scale * static_cast<double>(dg(n, static_cast<index>(e))) * slope;
      }
    }
    double inner = 0.0;
    for (std::size_t e = 0; e < s.size(); ++e) inner += s[e] * ds[e];
    const double largest = testing::largest(dg.view().row_range(n, 1)) * selector.scale;
    for (std::size_t e = 0; e < s.size(); ++e) {
      const auto i = static_cast<index>(e);
      const double gate = slow.on[e] ? selector.scale * s[e] / mass : 0.0;
      const double du = sigmoid ? ds[e] * s[e] * (1.0 - s[e]) : s[e] * (ds[e] - inner);
      REQUIRE(found.on(n, i) == slow.on[e]);
      REQUIRE(support::within(static_cast<double>(found.r.gates(n, i)), gate, 2.0 * error * gate));
      // g (dg - sum of g dg): the error of each factor, on terms that add up to 2 max |dg|.
      REQUIRE(support::within(static_cast<double>(found.dlogits(n, i)), du, 8.0 * error * largest));
    }
  }
  CHECK(4 * left <= tokens);
}

}  // namespace

TEST_SUITE("selectors/biased_top_k") {
  // s = (1/2, 3/4, 1/4, 4/5); b = (0.4, 0, 0.5, -0.4), so s + b = (0.9, 0.75, 0.75, 0.4).
  TEST_CASE_TEMPLATE("by hand", T, TALPA_SCALARS) {
    const auto u = row_matrix<T>({0.0, std::log(3.0), -std::log(3.0), std::log(4.0)});
    const auto b = row_matrix<T>({0.4, 0.0, 0.5, -0.4}), dg = row_matrix<T>({1.0, 0.0, 0.0, 9.0});
    // Sigmoids of numbers below 2, a sum of two, a quotient and a product.
    const double bound = support::rounding_bound<T>(24.0, 2.0);
    const auto found = run_sided<T>(deepseek{.k = 2, .scale = 2.0}, u, dg, {},
                                    row_matrix<T>({0.4, 0.0, -0.5, -0.4}));
    CHECK(support::difference(found.r.gates.view(), {1, 4, {0.8, 1.2, 0.0, 0.0}}, bound) == "");
    // m = 0.8 / 2; du = (0.8 0.5 0.6, 1.2 0.25 (-0.4)).
    CHECK(support::difference(found.dlogits.view(), {1, 4, {0.24, -0.12, 0.0, 0.0}}, bound) == "");
    const auto raw = run_sided<T>(biased_top_k<score::sigmoid, gate::raw>{.k = 1}, u, dg, {}, b);
    CHECK(support::difference(raw.r.gates.view(), {1, 4, {0.5, 0.0, 0.0, 0.0}}, bound) == "");
    CHECK(support::difference(raw.dlogits.view(), {1, 4, {0.25, 0.0, 0.0, 0.0}}, bound) == "");
  }

  TEST_CASE("groups by their two best, ties to the lower index") {
    const auto dg = row_matrix<double>({1.0, 1.0, 1.0, 1.0, 1.0, 1.0});
    const auto none = row_matrix<double>({0.0, 0.0, 0.0, 0.0, 0.0, 0.0});
    const deepseek two{.k = 2, .n_groups = 3, .topk_groups = 1};
    const auto run = [&](const matrix<double, cpu>& u, const deepseek& s) {
      return experts_of(run_sided<double>(s, u, dg, {}, none));
    };
    // The best expert is 0, the best pair (2, 3).
    CHECK(run(row_matrix<double>({3.0, -3.0, 1.0, 1.0, 0.0, 0.0}), two) == indices{2, 3});
    // By the best one alone, as in DeepSeek-V2, group 0 stays.
    CHECK(run(row_matrix<double>({3.0, -3.0, 1.0, 1.0, 0.0, 0.0}),
              {.k = 2, .n_groups = 3, .topk_groups = 1, .group_best = 1}) == indices{0, 1});
    const auto equal = row_matrix<double>({1.0, 1.0, 1.0, 1.0, 1.0, 1.0});
    CHECK(run(equal, two) == indices{0, 1});
    CHECK(run(equal, {.k = 3, .n_groups = 3, .topk_groups = 2}) == indices{0, 1, 2});
    // One expert a group: by that one.
    CHECK(run(row_matrix<double>({1.0, 5.0, 2.0, 4.0, 0.0, 3.0}),
              {.k = 2, .n_groups = 6, .topk_groups = 3}) == indices{1, 3});
    // A group of masked experts is never used, even if nothing else is left.
    const double off = -std::numeric_limits<double>::infinity();
    CHECK(run(row_matrix<double>({off, off, off, -9.0, off, off}),
              {.k = 3, .n_groups = 3, .topk_groups = 2}) == indices{3});
  }

  TEST_CASE_TEMPLATE("agree with sorting on thousands of rows", T, TALPA_SCALARS) {
    for (const index experts : {1, 2, 6, 12, 36, 66}) {
      CAPTURE(experts);
      const index k = std::min<index>(experts, 3), groups = experts % 6 == 0 ? 6 : 1;
      const index kept = groups == 6 ? 3 : 1;
      compare<T>(deepseek{.k = k, .scale = 2.5}, experts);
      compare<T>(deepseek{.k = k, .n_groups = groups, .topk_groups = kept}, experts);
      compare<T>(biased_top_k<score::sigmoid, gate::raw>{.k = k}, experts);
      compare<T>(
          biased_top_k<score::softmax, gate::raw>{
              .k = k, .n_groups = groups, .topk_groups = kept, .scale = 0.5},
          experts);
      compare<T>(
          biased_top_k<score::softmax, gate::raw>{
              .k = k, .n_groups = groups, .topk_groups = kept, .group_best = 1},
          experts);
      compare<T>(biased_top_k<score::softmax>{.k = k}, experts);
    }
  }

  TEST_CASE("scores that underflow, and biases that are not numbers") {
    const auto low = row_matrix<double>({-1e4, -2e4, -3e4}),
               dg = row_matrix<double>({1.0, 2.0, 3.0});
    const auto none = row_matrix<double>({0.0, 0.0, 0.0});
    const auto zero = run_sided<double>(deepseek{.k = 2}, low, dg, {}, none);
    CHECK(experts_of(zero) == indices{0, 1});
    for (index e = 0; e < 3; ++e) {
      CHECK(zero.r.gates(0, e) == 0.0);
      CHECK(zero.dlogits(0, e) == 0.0);
    }
    for (const double bad : {std::nan(""), std::numeric_limits<double>::infinity()}) {
      const auto broken = run_sided<double>(deepseek{.k = 2}, row_matrix<double>({1.0, 2.0, 3.0}),
                                            dg, {}, row_matrix<double>({0.0, 0.0, bad}));
      CHECK(experts_of(broken) == indices{0, 1});
      CHECK(std::isnan(broken.r.gates(0, 0)));
      CHECK(broken.r.gates(0, 2) == 0.0);
    }
  }

  TEST_CASE("what does not fit is refused") {
    CHECK(refusal(deepseek{.k = 5, .n_groups = 4, .topk_groups = 2}, 8) ==
          "talpa::biased_top_k: 'k' is 5, expected 1..4 = experts in topk_groups groups");
    CHECK(refusal(deepseek{.k = 1, .n_groups = 3}, 8) ==
          "talpa::biased_top_k: 'n_groups' is 3, expected a divisor of experts");
    CHECK(refusal(deepseek{.k = 1, .n_groups = 9}, 8) ==
          "talpa::biased_top_k: 'n_groups' is 9, expected 1..8 = experts");
    CHECK(refusal(deepseek{.k = 1, .n_groups = 2, .topk_groups = 3}, 8) ==
          "talpa::biased_top_k: 'topk_groups' is 3, expected 1..2 = n_groups");
    CHECK(refusal(deepseek{.k = 1, .scale = 0.0}, 8) ==
          "talpa::biased_top_k: 'scale' is 0, expected a finite number > 0");
    CHECK(refusal(deepseek{.k = 1, .group_best = 3}, 8) ==
          "talpa::biased_top_k: 'group_best' is 3, expected 1..2 = experts that rank a group");
    CHECK(refusal(deepseek{.n_groups = 4, .topk_groups = 4}, 8) == "");
  }
}

}  // namespace talpa::biased_top_k_test
