// SPDX-License-Identifier: Apache-2.0
#include "selectors/coupled.hpp"
#include "selectors/slow_mass.hpp"
#include "support/scalars.hpp"
#include "support/tolerance.hpp"

#include <talpa/cpu/limit_experts.hpp>
#include <talpa/selectors/capacity.hpp>
#include <talpa/selectors/intervene.hpp>
#include <talpa/selectors/top_k.hpp>

#include <doctest/doctest.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <vector>

namespace talpa::intervene_test {

using namespace support;

namespace {

using experts = std::vector<index>;
using over_top_k = intervene<top_k<gate::raw>>;

static_assert(std::is_trivially_copyable_v<over_top_k>);
static_assert(coupled_selector<intervene<capacity_top_k<gate::raw>>> &&
              !coupled_selector<over_top_k> && !controlled_selector<over_top_k>);

/// The logits that Inner should see, in plain loops.
std::vector<double> changed(std::vector<double> u, const expert_set& blocked,
                            const expert_set& stimulated) {
  const double none = -std::numeric_limits<double>::infinity();
  double best = none;
  for (std::size_t e = 0; e < u.size(); ++e) {
    if (blocked.has(static_cast<index>(e))) u[e] = none;
    best = std::max(best, u[e]);
  }
  for (std::size_t e = 0; e < u.size(); ++e) {
    if (stimulated.has(static_cast<index>(e)) && u[e] > none) u[e] = best;
  }
  return u;
}

template <class T>
matrix<T, cpu> changed(const matrix<T, cpu>& u, const expert_set& blocked,
                       const expert_set& stimulated) {
  matrix<T, cpu> v(u.rows(), u.cols());
  for (index n = 0; n < u.rows(); ++n) {
    const std::vector<double> row = changed(widened_row(u, n), blocked, stimulated);
    for (index e = 0; e < u.cols(); ++e) v(n, e) = static_cast<T>(row[static_cast<std::size_t>(e)]);
  }
  return v;
}

/// Routing and gradient are those of Inner for the changed logits, the gradient of raised logits
/// given to the best one.
template <class T, class Inner>
void compare(const Inner& inner, index count, const expert_set& blocked,
             const expert_set& stimulated, std::uint64_t seed) {
  CAPTURE(count);
  const intervene<Inner> selector{inner, blocked, stimulated};
  test_random random(seed);
  const matrix<T, cpu> u = eventful_logits<T>(random, 1000, count);
  const matrix<T, cpu> v = changed(u, blocked, stimulated);
  const matrix<T, cpu> dgates = random_matrix<T>(random, 1000, count);
  const routing<T, cpu> r = route(selector, u), expected = route(inner, v);
  CHECK(testing::first_difference(r.mask, expected.mask) == "");
  const matrix<T, cpu> du = backward_of(selector, u, r, dgates);
  const matrix<T, cpu> dv = backward_of(inner, v, expected, dgates);
  index wrong = 0, raised = 0;
  for (index n = 0; n < u.rows(); ++n) {
    const std::vector<double> row = widened_row(v, n);
    std::size_t best = 0;
    const std::vector<double> open = changed(widened_row(u, n), blocked, {});
    for (std::size_t e = 1; e < open.size(); ++e) best = open[e] > open[best] ? e : best;
    if (std::isinf(open[best])) continue;  // nothing is left of it
    double sum = 0.0, size = 0.0;
    for (index e = 0; e < count; ++e) {
      if (!stimulated.has(e)) continue;
      sum += static_cast<double>(dv(n, e));
      size += std::abs(static_cast<double>(dv(n, e)));
      raised += u(n, e) != v(n, e) ? 1 : 0;
    }
    for (index e = 0; e < count; ++e) {
      double d = static_cast<double>(dv(n, e));
      if (blocked.has(e) || stimulated.has(e)) d = 0.0;
      if (e == static_cast<index>(best)) d += sum;
      // As many additions as experts.
      const double bound = testing::gamma<T>(static_cast<double>(count + 1)) * (size + std::abs(d));
      wrong += r.gates(n, e) != expected.gates(n, e) ? 1 : 0;
      wrong += !within(static_cast<double>(du(n, e)), d, bound) ? 1 : 0;
    }
  }
  CHECK(wrong == 0);
  CHECK((raised > 0) == !stimulated.empty());
}

}  // namespace

TEST_SUITE("selectors/intervene") {
  TEST_CASE("sets of experts") {
    expert_set s{3, 1023};
    CHECK(s.has(3));
    CHECK(s.has(1023));
    CHECK(!s.has(4));
    CHECK(!s.has(1024));
    CHECK(!s.has(-1));
    CHECK(s.size() == 2);
    s.add(3);
    CHECK(s == expert_set{1023, 3});
    CHECK(expert_set{}.empty());
    CHECK_THROWS_WITH_AS(
        s.add(1024),
        "talpa::expert_set: 'expert' is 1024, expected 0..1023 = experts that a set can hold",
        value_error);
  }

  // p = (1, 3, 2, 4) / 10.
  TEST_CASE_TEMPLATE("block and stimulate by hand", T, TALPA_SCALARS) {
    const matrix<T, cpu> u = one_row<T>({0.0, std::log(3.0), std::log(2.0), std::log(4.0)});
    const double bound = rounding_bound<T>(2.0 * (4.0 + 4.0), 1.0);
    // Without expert 3 the others share the rest: 1/6, 3/6, 2/6.
    const auto without = route(over_top_k{.inner = {.k = 2}, .blocked = {3}}, u);
    CHECK(experts_of(without, 0) == experts{1, 2});
    CHECK(difference(without.gates.view(), {1, 4, {0.0, 0.5, 1.0 / 3.0, 0.0}}, bound) == "");
    // Expert 0 gets 4 of 13.
    const over_top_k with{.inner = {.k = 2}, .stimulated = {0}};
    const auto r = route(with, u);
    CHECK(experts_of(r, 0) == experts{0, 3});
    CHECK(difference(r.gates.view(), {1, 4, {4.0 / 13.0, 0.0, 0.0, 4.0 / 13.0}}, bound) == "");
    // dg_0 = 1: dv = p_0 (delta - p) = 4/13 (9/13, -3/13, -2/13, -4/13); what expert 0 gets goes to
    // expert 3.
    const auto du = backward_of(with, u, r, one_row<T>({1.0, 0.0, 0.0, 0.0}));
    CHECK(difference(du.view(), {1, 4, {0.0, -12.0 / 169.0, -8.0 / 169.0, 20.0 / 169.0}}, bound) ==
          "");
    // Both: expert 3 is gone, and expert 0 rises to expert 1.
    const auto both = route(over_top_k{.inner = {.k = 1}, .blocked = {3}, .stimulated = {0}}, u);
    CHECK(experts_of(both, 0) == experts{0});
    CHECK(difference(both.gates.view(), {1, 4, {0.375, 0.0, 0.0, 0.0}}, bound) == "");
  }

  TEST_CASE_TEMPLATE("agrees with the inner selector on changed logits", T, TALPA_SCALARS) {
    const top_k<gate::raw> raw{.k = 2};
    const top_k<gate::renormalised> renormalised{.k = 2};
    compare<T>(raw, 3, {1}, {}, 61);
    compare<T>(raw, 8, {}, {2, 5}, 62);
    compare<T>(renormalised, 33, {0, 32}, {4, 31}, 63);
    compare<T>(raw, 65, {64}, {63, 1, 2}, 64);
    compare<T>(intervene<top_k<gate::raw>>{.inner = raw, .blocked = {1}}, 8, {0}, {}, 65);
    compare<T>(capacity_top_k<gate::raw>{.k = 1, .capacity = {.factor = 0.5}}, 8, {3}, {6}, 66);
  }

  TEST_CASE("rows that cannot be routed") {
    const double nan = std::nan(""), infinity = std::numeric_limits<double>::infinity();
    const over_top_k s{.inner = {.k = 1}, .blocked = {0}, .stimulated = {1}};
    // Bad values are not hidden, and a block that leaves nothing is a row of -inf.
    for (const auto& u : {one_row<double>({nan, 1.0, 2.0}), one_row<double>({infinity, 1.0, 2.0}),
                          one_row<double>({0.0, nan, 2.0}), one_row<double>({0.0, 1.0, infinity}),
                          one_row<double>({0.0, -infinity, -infinity})}) {
      const auto r = route(s, u);
      CHECK(experts_of(r, 0) == experts{0});
      CHECK(std::isnan(r.gates(0, 0)));
    }
    // A stimulated expert that is masked stays off.
    CHECK(experts_of(route(s, one_row<double>({5.0, -infinity, 2.0})), 0) == experts{2});
    CHECK(route(over_top_k{.inner = {.k = 1}}, one_row<double>({3.0})).gates(0, 0) == 1.0);
  }

  TEST_CASE("hyperparameters out of range are refused, the inner ones under their own name") {
    const matrix<float, cpu> u(2, 4);
    CHECK_THROWS_WITH_AS(route(over_top_k{.blocked = {4}}, u),
                         "talpa::intervene: 'blocked' is 4, expected 0..3 = experts", value_error);
    CHECK_THROWS_WITH_AS(route(over_top_k{.stimulated = {9}}, u),
                         "talpa::intervene: 'stimulated' is 9, expected 0..3 = experts",
                         value_error);
    CHECK_THROWS_WITH_AS(
        route(over_top_k{.blocked = {1}, .stimulated = {1}}, u),
        "talpa::intervene: 'stimulated' is 1, expected an expert that is not blocked", value_error);
    CHECK_THROWS_WITH_AS(route(over_top_k{.blocked = {0, 1, 2, 3}}, u),
                         "talpa::intervene: 'blocked.size()' is 4, expected 0..3 = experts but one",
                         value_error);
    CHECK_THROWS_WITH_AS(over_top_k{}.validate(1025),
                         "talpa::intervene: 'experts' is 1025, expected 1..1024 = experts that a "
                         "set can hold",
                         value_error);
    CHECK_THROWS_WITH_AS(route(over_top_k{.inner = {.k = 9}}, u),
                         "talpa::top_k: 'k' is 9, expected 1..4 = experts", value_error);
  }
}

}  // namespace talpa::intervene_test
