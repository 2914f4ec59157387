// SPDX-License-Identifier: Apache-2.0
#include "selectors/slow_selection.hpp"
#include "support/random.hpp"
#include "support/sanitized.hpp"
#include "support/scalars.hpp"
#include "support/tolerance.hpp"

#include <talpa/cpu/select.hpp>
#include <talpa/routing/routing.hpp>
#include <talpa/selectors/dense.hpp>
#include <talpa/selectors/top_k.hpp>
#include <talpa/testing/bounds.hpp>

#include <doctest/doctest.h>

#include <cmath>
#include <initializer_list>
#include <limits>
#include <string>
#include <vector>

namespace talpa::top_k_test {

namespace {

using support::weighing;

template <class T>
constexpr T infinity = std::numeric_limits<T>::infinity();

template <class T>
matrix<T, cpu> row(std::initializer_list<double> values) {
  matrix<T, cpu> m(1, static_cast<index>(values.size()));
  index e = 0;
  for (const double v : values) m(0, e++) = static_cast<T>(v);
  return m;
}

template <class T, class Selector>
routing<T, cpu> select(const Selector& selector, const matrix<T, cpu>& logits, int threads = 1) {
  context<cpu> ctx(threads);
  routing<T, cpu> r(logits.rows(), logits.cols());
  ops::select(ctx, selector, logits, {}, r.gates.view(), r.mask.view());
  return r;
}

template <class T, class Selector>
matrix<T, cpu> backward(const Selector& selector, const matrix<T, cpu>& logits,
                        const routing<T, cpu>& r, const matrix<T, cpu>& dgates) {
  context<cpu> ctx(1);
  matrix<T, cpu> dlogits(logits.rows(), logits.cols());
  ops::select_backward(ctx, selector, logits, r.gates.view(), r.mask.view(), dgates,
                       dlogits.view());
  return dlogits;
}

/// The experts of token n.
template <class T>
std::vector<index> experts_of(const routing<T, cpu>& r, index n) {
  std::vector<index> on;
  for (index e = 0; e < r.gates.cols(); ++e) {
    if (r.view().on(n, e)) on.push_back(e);
  }
  return on;
}

using experts = std::vector<index>;

template <class Weight>
constexpr weighing how = std::same_as<Weight, gate::raw> ? weighing::raw : weighing::renormalised;

/// Relative error of a gate: difference to the largest logit (its rounding is an absolute error of
/// the exponent, at most spread u), exponential (2 u), sums of E terms and divisions, twice where
/// the gates are renormalised.
template <class T>
double gate_bound(index count, double spread, double gate) {
  return support::rounding_bound<T>(2.0 * (static_cast<double>(count) + spread + 4.0), gate) +
         static_cast<double>(std::numeric_limits<T>::denorm_min());
}
/// The gradient is g (dg - sum of g dg): the same relative error of every factor, on terms that add
/// up to 2 max |dg|.
template <class T>
double gradient_bound(index count, double spread, double largest_dgate) {
  return support::rounding_bound<T>(6.0 * (static_cast<double>(count) + spread + 4.0),
                                    2.0 * largest_dgate);
}

template <class T, class Weight>
void compare_with_reference(index tokens, index count, index k, std::uint64_t seed) {
  CAPTURE(count);
  CAPTURE(k);
  support::test_random random(seed);
  const matrix<T, cpu> u = support::eventful_logits<T>(random, tokens, count);
  const matrix<T, cpu> dgates = support::random_matrix<T>(random, tokens, count);
  const top_k<Weight> selector{.k = k};
  const routing<T, cpu> r = select(selector, u, 3);
  const matrix<T, cpu> du = backward(selector, u, r, dgates);
  // One doctest check a matrix: rows come in thousands.
  std::string problem;
  for (index n = 0; n < tokens && problem.empty(); ++n) {
    const std::vector<double> logits = support::widened_row(u, n);
    const std::vector<double> dg = support::widened_row(dgates, n);
    const double spread = support::spread_of_row(logits);
    const support::slow_row expected = support::slow_top_k(logits, k, how<Weight>);
    const std::vector<double> gradient = support::slow_gradient(expected, dg, how<Weight>);
    const double largest = testing::largest(dgates.view().row_range(n, 1));
    for (index e = 0; e < count; ++e) {
      const auto i = static_cast<std::size_t>(e);
      const bool fine = r.view().on(n, e) == expected.on[i] &&
                        support::within(static_cast<double>(r.gates(n, e)), expected.gates[i],
                                        gate_bound<T>(count, spread, expected.gates[i])) &&
                        support::within(static_cast<double>(du(n, e)), gradient[i],
                                        gradient_bound<T>(count, spread, largest));
      if (fine) continue;
      problem = "token " + std::to_string(n) + ", expert " + std::to_string(e) + ": gate " +
                support::exact_text(static_cast<double>(r.gates(n, e))) + " instead of " +
                support::exact_text(expected.gates[i]) + ", dlogit " +
                support::exact_text(static_cast<double>(du(n, e))) + " instead of " +
                support::exact_text(gradient[i]);
      break;
    }
  }
  CHECK(problem == "");
}

}  // namespace

TEST_SUITE("selectors/top_k") {
  // Logits ln 1, ln 3, ln 2, ln 4: p = (1, 3, 2, 4) / 10. Top 2 are experts 3 and 1.
  TEST_CASE_TEMPLATE("top_k on four experts, by hand", T, TALPA_SCALARS) {
    const matrix<T, cpu> u = row<T>({0.0, std::log(3.0), std::log(2.0), std::log(4.0)});
    const matrix<T, cpu> dg = row<T>({9.0, 1.0, -9.0, 0.0});
    const double bound = support::rounding_bound<T>(2.0 * (4.0 + 4.0), 1.0);

    SUBCASE("raw gates are the probabilities") {
      const top_k<gate::raw> selector{.k = 2};
      const auto r = select(selector, u);
      CHECK(experts_of(r, 0) == experts{1, 3});
      CHECK(support::difference(r.gates.view(), {1, 4, {0.0, 0.3, 0.0, 0.4}}, bound) == "");
      // sum of p dg over {1, 3} is 0.3; du = p (dg on the mask - 0.3).
      const auto du = backward(selector, u, r, dg);
      CHECK(support::difference(du.view(), {1, 4, {-0.03, 0.21, -0.06, -0.12}}, bound) == "");
    }
    SUBCASE("renormalised gates are divided by their sum") {
      const top_k<gate::renormalised> selector{.k = 2};
      const auto r = select(selector, u);
      CHECK(experts_of(r, 0) == experts{1, 3});
      CHECK(support::difference(r.gates.view(), {1, 4, {0.0, 3.0 / 7.0, 0.0, 4.0 / 7.0}}, bound) ==
            "");
      // sum of g dg is 3 / 7; du = g (dg - 3 / 7).
      const auto du = backward(selector, u, r, dg);
      CHECK(support::difference(du.view(), {1, 4, {0.0, 12.0 / 49.0, 0.0, -12.0 / 49.0}}, bound) ==
            "");
    }
    SUBCASE("softmax of the selected is the same in exact arithmetic") {
      const top_k<gate::softmax_selected> selector{.k = 2};
      const auto r = select(selector, u);
      CHECK(support::difference(r.gates.view(), {1, 4, {0.0, 3.0 / 7.0, 0.0, 4.0 / 7.0}}, bound) ==
            "");
      const auto du = backward(selector, u, r, dg);
      CHECK(support::difference(du.view(), {1, 4, {0.0, 12.0 / 49.0, 0.0, -12.0 / 49.0}}, bound) ==
            "");
    }
    SUBCASE("hard gates are one and have no gradient") {
      const top_k<gate::hard> selector{.k = 2};
      const auto r = select(selector, u);
      CHECK(experts_of(r, 0) == experts{1, 3});
      CHECK(support::difference(r.gates.view(), {1, 4, {0.0, 1.0, 0.0, 1.0}}, 0.0) == "");
      CHECK(testing::largest(backward(selector, u, r, dg).view()) == 0.0);
    }
  }

  TEST_CASE_TEMPLATE("top_k agrees with a slow reference on thousands of rows", Weight, gate::raw,
                     gate::renormalised, gate::softmax_selected) {
    std::uint64_t seed = 100;
    for (const index count : {1, 2, 3, 4, 8, 16, 31, 32, 33, 64, 65, 200}) {
      for (const index k : {1, 2, 7, 40}) {
        if (k > count) continue;
        const index tokens = support::many_rows(count > 64 ? 200 : 1500);
        compare_with_reference<float, Weight>(tokens, count, k, ++seed);
        compare_with_reference<double, Weight>(tokens, count, k, ++seed);
      }
      compare_with_reference<float, Weight>(support::many_rows(300), count, count, ++seed);
    }
  }

  TEST_CASE_TEMPLATE("top_k breaks ties by the lower expert index", T, TALPA_SCALARS) {
    const top_k<gate::raw> two{.k = 2};
    CHECK(experts_of(select(two, row<T>({5.0, 5.0, 5.0, 5.0})), 0) == experts{0, 1});
    CHECK(experts_of(select(two, row<T>({1.0, 5.0, 5.0, 5.0})), 0) == experts{1, 2});
    CHECK(experts_of(select(two, row<T>({1.0, 5.0, 1.0, 1.0})), 0) == experts{0, 1});
    // Zeros of both signs are one value.
    CHECK(experts_of(select(two, row<T>({-1.0, -0.0, 0.0, -0.0})), 0) == experts{1, 2});
    CHECK(experts_of(select(two, row<T>({-0.0, 0.0, -0.0, 0.0})), 0) == experts{0, 1});
    // Logits that softmax cannot tell apart are not a tie.
    const T next = std::nextafter(T{1}, T{2});
    CHECK(experts_of(
              select(top_k<gate::raw>{.k = 1}, row<T>({1.0, 1.0, static_cast<double>(next)})), 0) ==
          experts{2});
  }

  TEST_CASE("ties across the words of a mask") {
    for (const index count : {33, 65, 200}) {
      CAPTURE(count);
      matrix<float, cpu> u(3, count);
      for (index e = 0; e < count; ++e) {
        u(0, e) = 2.0f;
        u(1, e) = e == count - 1 || e == 31 || e == 32 ? 3.0f : 2.0f;
        u(2, e) = e >= count - 2 ? 3.0f : 2.0f;
      }
      const auto r = select(top_k<gate::renormalised>{.k = 3}, u);
      CHECK(experts_of(r, 0) == experts{0, 1, 2});
      CHECK(experts_of(r, 1) == (count == 33 ? experts{0, 31, 32} : experts{31, 32, count - 1}));
      CHECK(experts_of(r, 2) == experts{0, count - 2, count - 1});
    }
  }

  TEST_CASE_TEMPLATE("denormal logits are told apart", T, TALPA_SCALARS) {
    const double least = static_cast<double>(std::numeric_limits<T>::denorm_min());
    const auto r = select(top_k<gate::raw>{.k = 2}, row<T>({-least, 0.0, least, 2.0 * least}));
    CHECK(experts_of(r, 0) == experts{2, 3});
    // Their exponentials are all one.
    CHECK(r.gates(0, 2) == T{0.25});
    CHECK(r.gates(0, 3) == T{0.25});
  }

  TEST_CASE_TEMPLATE("the largest finite logits overflow nothing", T, TALPA_SCALARS) {
    const double most = static_cast<double>(std::numeric_limits<T>::max());
    const matrix<T, cpu> u = row<T>({-most, most, 0.0, most});
    const auto raw = select(top_k<gate::raw>{.k = 3}, u);
    CHECK(experts_of(raw, 0) == experts{1, 2, 3});
    CHECK(support::difference(raw.gates.view(), {1, 4, {0.0, 0.5, 0.0, 0.5}}, 0.0) == "");
    const auto unit = select(top_k<gate::softmax_selected>{.k = 3}, u);
    CHECK(support::difference(unit.gates.view(), {1, 4, {0.0, 0.5, 0.0, 0.5}}, 0.0) == "");
    const auto du = backward(top_k<gate::raw>{.k = 3}, u, raw, row<T>({0.0, 1.0, 5.0, -1.0}));
    CHECK(support::difference(du.view(), {1, 4, {0.0, 0.5, 0.0, -0.5}}, 0.0) == "");
  }

  TEST_CASE_TEMPLATE("k = E with raw gates is dense, bit for bit", T, TALPA_SCALARS) {
    for (const index count : {1, 3, 32, 70}) {
      CAPTURE(count);
      support::test_random random(7);
      const matrix<T, cpu> u = support::eventful_logits<T>(random, 40, count);
      const matrix<T, cpu> dg = support::random_matrix<T>(random, 40, count);
      const auto a = select(top_k<gate::raw>{.k = count}, u);
      const auto b = select(dense{}, u);
      CHECK(a == b);
      CHECK(testing::first_difference(backward(top_k<gate::raw>{.k = count}, u, a, dg),
                                      backward(dense{}, u, b, dg)) == "");
    }
  }

  TEST_CASE_TEMPLATE("one expert, or one chosen and renormalised, has gate 1 and no gradient",
                     Weight, gate::renormalised, gate::softmax_selected) {
    support::test_random random(9);
    for (const index count : {1, 6}) {
      const matrix<float, cpu> u = support::random_matrix<float>(random, 30, count, 5.0);
      const top_k<Weight> selector{.k = 1};
      const auto r = select(selector, u);
      const auto du = backward(selector, u, r, support::random_matrix<float>(random, 30, count));
      for (index n = 0; n < 30; ++n) {
        CHECK(r.gates(n, experts_of(r, n)[0]) == 1.0f);
        CHECK(testing::largest(du.view().row_range(n, 1)) == 0.0);
      }
    }
  }

  TEST_CASE("fewer finite logits than k are all selected") {
    const float masked = -infinity<float>;
    matrix<float, cpu> u(2, 5);
    for (index e = 0; e < 5; ++e) u(0, e) = u(1, e) = masked;
    u(0, 3) = -7.0f;
    u(1, 1) = 2.0f;
    u(1, 4) = 2.0f;
    const auto r = select(top_k<gate::renormalised>{.k = 3}, u);
    CHECK(experts_of(r, 0) == experts{3});
    CHECK(r.gates(0, 3) == 1.0f);
    CHECK(experts_of(r, 1) == experts{1, 4});
    CHECK(r.gates(1, 1) == 0.5f);
  }

  TEST_CASE("a recorded mask gives the gates of its own experts") {
    // p = (1, 3, 2, 4) / 10; the mask names the two least likely.
    const matrix<double, cpu> u = row<double>({0.0, std::log(3.0), std::log(2.0), std::log(4.0)});
    context<cpu> ctx(1);
    matrix<std::uint32_t, cpu> mask(1, 1);
    mask(0, 0) = 0b0101u;
    matrix<double, cpu> gates(1, 4);
    const double bound = support::rounding_bound<double>(2.0 * (4.0 + 4.0), 1.0);
    ops::replay(ctx, top_k<gate::renormalised>{.k = 2}, u, {}, mask.view(), gates.view());
    CHECK(support::difference(gates.view(), {1, 4, {1.0 / 3.0, 0.0, 2.0 / 3.0, 0.0}}, bound) == "");
    ops::replay(ctx, top_k<gate::raw>{.k = 2}, u, {}, mask.view(), gates.view());
    CHECK(support::difference(gates.view(), {1, 4, {0.1, 0.0, 0.2, 0.0}}, bound) == "");
    CHECK(mask(0, 0) == 0b0101u);
  }

  TEST_CASE("k outside 1..E is refused with its range") {
    const matrix<float, cpu> u(2, 8);
    CHECK_THROWS_WITH_AS(select(top_k<gate::raw>{.k = 9}, u),
                         "talpa::top_k: 'k' is 9, expected 1..8 = experts", value_error);
    CHECK_THROWS_WITH_AS(select(top_k<gate::renormalised>{.k = 0}, u),
                         "talpa::top_k: 'k' is 0, expected 1..8 = experts", value_error);
    CHECK_THROWS_WITH_AS(select(top_k<gate::renormalised>{.k = -1}, u),
                         "talpa::top_k: 'k' is -1, expected 1..8 = experts", value_error);
    CHECK_NOTHROW(select(top_k<gate::raw>{.k = 8}, u));
    CHECK(top_k<gate::raw>{.k = 3}.max_selected(8) == 3);
  }
}

}  // namespace talpa::top_k_test
