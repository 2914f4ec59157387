// SPDX-License-Identifier: Apache-2.0
#include "selectors/coupled.hpp"
#include "selectors/slow_selection.hpp"
#include "support/sanitized.hpp"
#include "support/tolerance.hpp"

#include <talpa/cpu/limit_experts.hpp>
#include <talpa/selectors/capacity.hpp>
#include <talpa/selectors/top_k.hpp>
#include <talpa/testing/bounds.hpp>

#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <string>
#include <vector>

namespace talpa::capacity_test {

namespace {

using support::backward_of;
using support::batch_shape;
using support::experts_of;
using support::route;
using support::weighing;
using experts = std::vector<index>;

template <class Weight>
constexpr weighing how = std::same_as<Weight, gate::raw> ? weighing::raw : weighing::renormalised;

/// What the masks of top_k become: for each expert and sequence the tokens that ask for it are
/// sorted, and all but the first c are crossed out.
template <class T>
std::vector<std::vector<bool>> slow_limit(const routing<T, cpu>& asked, const batch_shape& shape,
                                          index length, bool by_gate, index k, double factor) {
  const index tokens = asked.gates.rows(), count = asked.gates.cols();
  std::vector<std::vector<bool>> on(static_cast<std::size_t>(tokens),
                                    std::vector<bool>(static_cast<std::size_t>(count)));
  for (index start = 0; start < tokens; start += length) {
    index real = 0;
    for (index n = start; n < start + length; ++n) real += shape.takes_part(n) ? 1 : 0;
    const index c = static_cast<index>(
        std::ceil(static_cast<double>(real * k) / static_cast<double>(count) * factor));
    for (index e = 0; e < count; ++e) {
      std::vector<index> order;
      for (index n = start; n < start + length; ++n) {
        if (!shape.takes_part(n)) {
          on[static_cast<std::size_t>(n)][static_cast<std::size_t>(e)] = asked.view().on(n, e);
        } else if (asked.view().on(n, e)) {
          order.push_back(n);
        }
      }
      if (by_gate) {
        std::stable_sort(order.begin(), order.end(),
                         [&](index a, index b) { return asked.gates(a, e) > asked.gates(b, e); });
      }
      for (index i = 0; i < c && i < static_cast<index>(order.size()); ++i) {
        on[static_cast<std::size_t>(order[static_cast<std::size_t>(i)])]
          [static_cast<std::size_t>(e)] = true;
      }
    }
  }
  return on;
}

/// The gradient is q (dg - sum of q dg): errors of the weights (difference to the largest logit,
/// exponential, sum of E terms, divisions), of the products and of their sum, on terms that add up
/// to 2 max |dg|.
template <class T>
double gradient_bound(index count, double spread, double largest_dgate) {
  return support::rounding_bound<T>(6.0 * (static_cast<double>(count) + spread + 4.0),
                                    2.0 * largest_dgate);
}

template <class T, class Weight, class Overflow, class Group>
void compare_with_reference(index tokens, index count, index k, double factor, std::uint64_t seed) {
  CAPTURE(count);
  CAPTURE(k);
  CAPTURE(factor);
  support::test_random random(seed);
  const matrix<T, cpu> u = support::eventful_logits<T>(random, tokens, count);
  const matrix<T, cpu> dgates = support::random_matrix<T>(random, tokens, count);
  batch_shape shape(random, tokens, tokens / 3);
  const auto selector =
      capacity_top_k<Weight, Overflow, capacity::share, Group>{.k = k, .capacity = {factor}};
  const routing<T, cpu> asked = route(top_k<Weight>{.k = k}, u, shape);
  const auto kept = slow_limit(asked, shape, Group::by_sequence ? tokens / 3 : tokens,
                               Overflow::order == limit_order::score, k, factor);
  const routing<T, cpu> r = route(selector, u, shape, 3);
  const matrix<T, cpu> du = backward_of(selector, u, r, dgates);
  std::string problem;
  for (index n = 0; n < tokens && problem.empty(); ++n) {
    const std::vector<double> logits = support::widened_row(u, n);
    support::slow_row expected = support::slow_top_k(logits, k, how<Weight>);
    bool any = false;
    for (index e = 0; e < count; ++e) {
      const auto i = static_cast<std::size_t>(e);
      const bool on = kept[static_cast<std::size_t>(n)][i];
      any = any || on;
      expected.on[i] = on;
      // A gate that is kept has the bits that it has without a limit.
      if (r.view().on(n, e) != on || r.gates(n, e) != (on ? asked.gates(n, e) : T{0})) {
        problem = "token " + std::to_string(n) + ", expert " + std::to_string(e);
      }
    }
    const std::vector<double> gradient =
        any ? support::slow_gradient(expected, support::widened_row(dgates, n), how<Weight>)
            : std::vector<double>(static_cast<std::size_t>(count), 0.0);
    const double bound = gradient_bound<T>(count, support::spread_of_row(logits),
                                           testing::largest(dgates.view().row_range(n, 1)));
    for (index e = 0; e < count && problem.empty(); ++e) {
      if (!support::within(static_cast<double>(du(n, e)), gradient[static_cast<std::size_t>(e)],
                           bound)) {
        problem = "gradient of token " + std::to_string(n) + ", expert " + std::to_string(e) +
                  ": " + support::exact_text(static_cast<double>(du(n, e))) + " instead of " +
                  support::exact_text(gradient[static_cast<std::size_t>(e)]);
      }
    }
  }
  CHECK(problem == "");
}

/// ln of each: softmax gives the numbers back as shares of their sum.
matrix<double, cpu> logarithms(index cols, const std::vector<double>& weights) {
  matrix<double, cpu> m(static_cast<index>(weights.size()) / cols, cols);
  for (index i = 0; i < m.size(); ++i) m.data()[i] = std::log(weights[static_cast<std::size_t>(i)]);
  return m;
}

}  // namespace

TEST_SUITE("selectors/capacity") {
  // Shares of experts 0, 1, 2 in tenths; all tokens want 0 first and 1 second.
  TEST_CASE("capacity_top_k on three tokens, by hand") {
    const matrix<double, cpu> u = logarithms(3, {6, 3, 1, 7, 2, 1, 5, 4, 1});
    const double bound = support::rounding_bound<double>(2.0 * (3.0 + 4.0), 1.0);

    SUBCASE("by position the first token keeps its places") {
      const auto r =
          route(capacity_top_k<gate::raw, overflow::by_position, capacity::fixed>{.k = 2,
                                                                                  .capacity = {1}},
                u);
      CHECK(experts_of(r, 0) == experts{0, 1});
      CHECK(experts_of(r, 1).empty());
      CHECK(experts_of(r, 2).empty());
      CHECK(support::difference(r.gates.view(), {3, 3, {0.6, 0.3, 0, 0, 0, 0, 0, 0, 0}}, bound) ==
            "");
    }
    SUBCASE("by probability each expert keeps its largest gate, and gates stay as they were") {
      const capacity_top_k<gate::renormalised, overflow::by_probability, capacity::fixed> selector{
          .k = 2, .capacity = {1}};
      const auto r = route(selector, u);
      CHECK(experts_of(r, 0).empty());
      CHECK(experts_of(r, 1) == experts{0});
      CHECK(experts_of(r, 2) == experts{1});
      CHECK(support::difference(r.gates.view(), {3, 3, {0, 0, 0, 7.0 / 9.0, 0, 0, 0, 4.0 / 9.0, 0}},
                                bound) == "");
      // q of token 1 is (7, 2) / 9 over what it selected; dg of expert 0 is 9, of the dropped
      // expert 1 nothing: du = q (dg - 7).
      matrix<double, cpu> dg(3, 3);
      dg(1, 0) = 9.0;
      dg(1, 1) = std::numeric_limits<double>::quiet_NaN();
      const auto du = backward_of(selector, u, r, dg);
      CHECK(support::difference(du.view(), {3, 3, {0, 0, 0, 14.0 / 9.0, -14.0 / 9.0, 0, 0, 0, 0}},
                                9.0 * bound) == "");
    }
    SUBCASE("a share of one and a half: c = ceil(3 * 2 / 3 * 1.5) = 3 keeps all") {
      const auto r = route(capacity_top_k<gate::raw>{.k = 2, .capacity = {1.5}}, u);
      CHECK(experts_of(r, 2) == experts{0, 1});
    }
    SUBCASE("equal gates go to the earlier token") {
      const matrix<double, cpu> same = logarithms(2, {3, 1, 3, 1, 3, 1});
      const auto r = route(
          capacity_top_k<gate::raw, overflow::by_probability, capacity::fixed>{.k = 1,
                                                                               .capacity = {2}},
          same);
      CHECK(experts_of(r, 0) == experts{0});
      CHECK(experts_of(r, 1) == experts{0});
      CHECK(experts_of(r, 2).empty());
    }
  }

  TEST_CASE("each sequence is counted for itself where Group says so") {
    const matrix<double, cpu> u = logarithms(2, {3, 1, 3, 1, 3, 1, 3, 1});
    batch_shape shape(4);
    shape.sequence_length = 2;
    const auto each = route(
        capacity_top_k<gate::raw, overflow::by_position, capacity::fixed, capacity::per_sequence>{
            .k = 1, .capacity = {1}},
        u, shape);
    const auto all = route(
        capacity_top_k<gate::raw, overflow::by_position, capacity::fixed>{.k = 1, .capacity = {1}},
        u, shape);
    for (index n = 0; n < 4; ++n) {
      CHECK(experts_of(each, n) == (n % 2 == 0 ? experts{0} : experts{}));
      CHECK(experts_of(all, n) == (n == 0 ? experts{0} : experts{}));
    }
  }

  TEST_CASE("padding and rows that cannot be routed take no place and do not count") {
    matrix<double, cpu> u = logarithms(2, {3, 1, 3, 1, 3, 1, 3, 1});
    u(0, 1) = std::numeric_limits<double>::quiet_NaN();
    batch_shape shape(4);
    shape.real[1] = 0;
    // T = 2: c = ceil(2 / 2) = 1, and token 2 is the first.
    const auto r = route(capacity_top_k<gate::raw>{.k = 1}, u, shape);
    CHECK(experts_of(r, 0) == experts{0});
    CHECK(std::isnan(r.gates(0, 0)));
    CHECK(experts_of(r, 1).empty());
    CHECK(experts_of(r, 2) == experts{0});
    CHECK(experts_of(r, 3).empty());
    for (index n = 0; n < 4; ++n) shape.real[n] = 0;
    const auto none = route(capacity_top_k<gate::raw>{.k = 1}, u, shape);
    for (index n = 0; n < 4; ++n) CHECK(experts_of(none, n).empty());
  }

  TEST_CASE("a capacity that nobody exceeds leaves top_k, bit for bit") {
    support::test_random random(5);
    const matrix<float, cpu> u = support::eventful_logits<float>(random, 300, 9);
    const matrix<float, cpu> dg = support::random_matrix<float>(random, 300, 9);
    const capacity_top_k<gate::softmax_selected> wide{.k = 3, .capacity = {1e30}};
    const top_k<gate::softmax_selected> plain{.k = 3};
    const auto a = route(wide, u), b = route(plain, u);
    CHECK(a == b);
    CHECK(testing::first_difference(backward_of(wide, u, a, dg), backward_of(plain, u, b, dg)) ==
          "");
  }

  TEST_CASE_TEMPLATE("capacity_top_k agrees with sorting on thousands of rows", Weight, gate::raw,
                     gate::renormalised, gate::softmax_selected) {
    std::uint64_t seed = 40;
    for (const index count : {1, 2, 3, 8, 31, 33, 65}) {
      if (support::sanitized && count != 2 && count != 8 && count != 33) continue;
      for (const index k : {1, 2, 7}) {
        if (k > count) continue;
        for (const double factor : {0.1, 0.7, 1.25}) {
          const index tokens = 3 * (support::many_rows(100) + 7 * static_cast<index>(seed % 5));
          compare_with_reference<float, Weight, overflow::by_position, capacity::per_batch>(
              tokens, count, k, factor, ++seed);
          compare_with_reference<double, Weight, overflow::by_position, capacity::per_sequence>(
              tokens, count, k, factor, ++seed);
          compare_with_reference<float, Weight, overflow::by_probability, capacity::per_sequence>(
              tokens, count, k, factor, ++seed);
          compare_with_reference<double, Weight, overflow::by_probability, capacity::per_batch>(
              tokens, count, k, factor, ++seed);
        }
      }
    }
  }

  TEST_CASE("hyperparameters outside their ranges are refused") {
    const matrix<float, cpu> u(2, 8);
    CHECK_THROWS_WITH_AS(route(capacity_top_k<gate::raw>{.k = 9}, u),
                         "talpa::capacity_top_k: 'k' is 9, expected 1..8 = experts", value_error);
    CHECK_THROWS_WITH_AS(route(capacity_top_k<gate::raw>{.k = 0}, u),
                         "talpa::capacity_top_k: 'k' is 0, expected 1..8 = experts", value_error);
    const char* factor =
        "talpa::capacity_top_k: 'factor' is 0, expected > 0 and finite = capacity over a fair "
        "share";
    CHECK_THROWS_WITH_AS(route(capacity_top_k<gate::raw>{.k = 1, .capacity = {0.0}}, u), factor,
                         value_error);
    CHECK_THROWS_AS(
        route(capacity_top_k<gate::raw>{.k = 1,
                                        .capacity = {std::numeric_limits<double>::quiet_NaN()}},
              u),
        value_error);
    const capacity_top_k<gate::raw, overflow::by_position, capacity::fixed> none{.k = 1,
                                                                                 .capacity = {0}};
    CHECK_THROWS_WITH_AS(
        route(none, u),
        "talpa::capacity_top_k: 'tokens' is 0, expected >= 1 = tokens an expert takes",
        value_error);
  }
}

}  // namespace talpa::capacity_test
