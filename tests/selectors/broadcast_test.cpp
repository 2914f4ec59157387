// SPDX-License-Identifier: Apache-2.0
#include "selectors/coupled.hpp"
#include "selectors/slow_mass.hpp"
#include "support/laws.hpp"
#include "support/sanitized.hpp"
#include "support/scalars.hpp"
#include "support/tolerance.hpp"

#include <talpa/cpu/limit_experts.hpp>
#include <talpa/cpu/overlay_rows.hpp>
#include <talpa/scorers/linear_scorer.hpp>
#include <talpa/selectors/broadcast.hpp>
#include <talpa/selectors/capacity.hpp>
#include <talpa/selectors/dense.hpp>
#include <talpa/selectors/top_k.hpp>
#include <talpa/testing/selector_laws.hpp>

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <limits>

namespace talpa::broadcast_test {

namespace {

using support::backward_of;
using support::batch_shape;
using support::experts_of;
using support::one_row;
using support::route;
using support::weighing;
using experts = std::vector<index>;

using over_top_k = broadcast<top_k<gate::raw>>;
using limited = broadcast<top_k<gate::raw>, entropy::shannon, slots::per_sequence>;

/// A selector with everything optional: experts at most 1 below the best of u + bias, gates
/// sigmoid(control) p, other gates at inference.
struct with_extras {
  static constexpr const char* name = "with_extras";
  static constexpr bool unit_mass = false;
  static constexpr bool has_bias = true;
  using control_scorer = linear_scorer;
  linear_scorer control{};
  bool in_training = true;

  with_extras at(mode m) const { return {control, m == mode::training}; }
  void validate(index) const {}
  index max_selected(index count) const { return count; }

  template <class G, class T>
  void select(const G& g, const select_row<T>& row) const {
    const auto masked = g.uniform(-std::numeric_limits<T>::infinity());
    const auto u = row_logits(g, row.logits);
    const auto bad = row_invalid<T>(g, u);
    const auto score = [&](auto e) { return u[e] + g.load(row.bias, e, T{0}); };
    const auto bar = g.template max<T>(score) - g.uniform(T{1});
    g.store_mask(row.mask, [&](auto e) {
      const auto offered = u[e] > masked, near = score(e) >= bar;
      return (offered & near) | bad;
    });
    replay(g, row);
  }
  template <class G, class T>
  void replay(const G& g, const select_row<T>& row) const {
    weigh<gate::raw>(g, row, exponentials<T>(g, row_logits(g, row.logits)));
    const row_pointer<const T> p{row.gates.data, row.gates.stride};
    const auto scale = math::sigmoid(g.load(row.control));
    g.for_each([&](auto e) { g.store(row.gates, e, math::mul(scale, g.load(p, e, T{0}))); });
  }
  template <class G, class T>
  void select_backward(const G& g, const select_gradient_row<T>& row) const {
    weigh_backward<gate::raw>(g, row);
    const auto zero = g.uniform(T{0});
    const auto scale = math::sigmoid(g.load(row.control));
    const row_pointer<const T> unscaled{row.dlogits.data, row.dlogits.stride};
    g.for_each(
        [&](auto e) { g.store(row.dlogits, e, math::mul(scale, g.load(unscaled, e, T{0}))); });
    const auto exponential = exponentials<T>(g, row_logits(g, row.logits));
    const auto sum = g.template sum<T>([&](auto e) {
      const auto dgate = talpa::select(g.load_bit(row.mask, e), g.load(row.dgates, e, T{0}), zero);
      return math::mul(exponential.weight[e] / exponential.sum, dgate);
    });
    g.store(row.dcontrol, math::mul(math::sigmoid_derivative(g.load(row.control)), sum));
  }
};

static_assert(!coupled_selector<over_top_k> && coupled_selector<limited> &&
              coupled_selector<broadcast<capacity_top_k<gate::raw>>>);
static_assert(!controlled_selector<over_top_k> && controlled_selector<broadcast<with_extras>> &&
              controlled_selector<broadcast<broadcast<with_extras>>>);
static_assert(!biased_selector<over_top_k> && biased_selector<broadcast<with_extras>>);
static_assert(modal_selector<over_top_k>);

double slow_shannon(const std::vector<double>& p) {
  double h = 0.0;
  for (const double v : p) h -= v > 0.0 ? v * std::log(v) : 0.0;
  return p.size() > 1 ? h / std::log(static_cast<double>(p.size())) : 0.0;
}

template <class Weight>
void compare(index k, double threshold) {
  constexpr weighing how = std::same_as<Weight, gate::raw> ? weighing::raw : weighing::renormalised;
  std::uint64_t seed = 1300;
  for (const index count : {2, 3, 8, 31, 33, 65}) {
    if (k > count) continue;
    CAPTURE(count);
    CAPTURE(k);
    const broadcast<top_k<Weight>> selector{.inner = {.k = k}, .threshold = threshold};
    const auto slow = [&](const std::vector<double>& u) {
      support::slow_mass_row r{support::slow_top_k(u, k, how), 1.0};
      const double h = slow_shannon(r.row.probability);
      // Rows with one expert that is not masked have exactly 0 on both sides.
      const bool sure = std::count(r.row.probability.begin(), r.row.probability.end(), 1.0) > 0;
      if (!sure) r.margin = std::abs(h - threshold);
      if (sure ? threshold == 0.0 : h >= threshold) {
        for (std::size_t e = 0; e < u.size(); ++e) r.row.on[e] = !std::isinf(u[e]);
        support::weigh_slowly(r.row, how);
      }
      return r;
    };
    // Each term p ln p has the error of p and of a logarithm, on terms that add up to ln E.
    CHECK(support::compare_with_slow<float>(selector, support::many_rows(1000), count, ++seed, how,
                                            16.0, slow) == "");
    CHECK(support::compare_with_slow<double>(selector, support::many_rows(1000), count, ++seed, how,
                                             16.0, slow) == "");
  }
}

}  // namespace

TEST_SUITE("selectors/broadcast") {
  // p = (1, 3, 2, 4) / 10: H = 1.27985 nats = 0.92322 ln 4. The best is expert 3.
  TEST_CASE_TEMPLATE("broadcast on four experts, by hand", T, TALPA_SCALARS) {
    const matrix<T, cpu> u = one_row<T>({0.0, std::log(3.0), std::log(2.0), std::log(4.0)});
    const matrix<T, cpu> dg = one_row<T>({9.0, 1.0, -9.0, 0.0});
    const double bound = support::rounding_bound<T>(2.0 * (4.0 + 4.0), 10.0);
    const over_top_k unsure{.inner = {.k = 1}, .threshold = 0.92};
    const auto all = route(unsure, u);
    CHECK(experts_of(all, 0) == experts{0, 1, 2, 3});
    CHECK(support::difference(all.gates.view(), {1, 4, {0.1, 0.3, 0.2, 0.4}}, bound) == "");
    // sum of p dg is 0.9 + 0.3 - 1.8 = -0.6; du = p (dg + 0.6).
    CHECK(support::difference(backward_of(unsure, u, all, dg).view(),
                              {1, 4, {0.96, 0.48, -1.68, 0.24}}, bound) == "");
    const over_top_k sure{.inner = {.k = 1}, .threshold = 0.93};
    CHECK(route(sure, u) == route(top_k<gate::raw>{.k = 1}, u));
    const over_top_k nats{.inner = {.k = 1}, .threshold = 1.279, .entropy = {.normalised = false}};
    CHECK(route(nats, u) == all);
    over_top_k higher = nats;
    higher.threshold = 1.281;
    CHECK(experts_of(route(higher, u), 0) == experts{3});
  }

  TEST_CASE("broadcast agrees with a slow reference on thousands of rows") {
    compare<gate::raw>(1, 0.7);
    compare<gate::renormalised>(2, 0.85);
    compare<gate::softmax_selected>(2, 0.0);
  }

  TEST_CASE_TEMPLATE("an entropy equal to the threshold broadcasts", T, TALPA_SCALARS) {
    // Two of two: -2 (0.5 ln 0.5) / ln 2 is exactly one, whatever ln rounds to.
    const matrix<T, cpu> u = one_row<T>({3.0, 3.0});
    CHECK(experts_of(route(over_top_k{.inner = {.k = 1}, .threshold = 1.0}, u), 0) ==
          experts{0, 1});
    const double above = std::nextafter(1.0, 2.0) + 1e-6;
    CHECK(experts_of(route(over_top_k{.inner = {.k = 1}, .threshold = above}, u), 0) == experts{0});
    // One expert has H = 0.
    const over_top_k one{.inner = {.k = 1}, .threshold = 0.0};
    CHECK(route(one, one_row<T>({-5.0})).gates(0, 0) == T{1});
  }

  TEST_CASE("threshold 0 is dense; at inference the inner selector is alone, bit for bit") {
    support::test_random random(21);
    const matrix<float, cpu> u = support::eventful_logits<float>(random, 300, 9);
    const matrix<float, cpu> dg = support::random_matrix<float>(random, 300, 9);
    const over_top_k all{.inner = {.k = 2}, .threshold = 0.0};
    CHECK(route(all, u) == route(dense{}, u));
    CHECK(route(all.at(mode::training), u) == route(dense{}, u));
    const over_top_k off = all.at(mode::inference);
    const auto r = route(all.inner, u);
    CHECK(route(off, u) == r);
    CHECK(testing::first_difference(backward_of(off, u, r, dg), backward_of(all.inner, u, r, dg)) ==
          "");
    CHECK(off.max_selected(9) == 2);
    CHECK(all.max_selected(9) == 9);
    // What is off stays off in training, and the inner selector changes with the mode.
    CHECK(!over_top_k{.broadcasting = false}.at(mode::training).broadcasting);
    CHECK(!broadcast<with_extras>{}.at(mode::inference).inner.in_training);
    const limited few{.inner = {.k = 2}, .threshold = 0.0};
    CHECK(route(few.at(mode::inference), u) == r);
  }

  TEST_CASE("slots go to the first unsure tokens of a sequence, none to padding or bad rows") {
    const float infinity = std::numeric_limits<float>::infinity();
    // Two sequences of six: unsure tokens have equal logits, sure ones a far larger one.
    matrix<float, cpu> u(12, 3);
    for (const index sure : {1, 8}) u(sure, 2) = 30.0f;
    u(0, 1) = infinity;
    u(7, 0) = std::numeric_limits<float>::quiet_NaN();
    batch_shape shape(12);
    shape.sequence_length = 6;
    shape.real[2] = shape.real[6] = 0;
    const limited selector{.inner = {.k = 1}, .threshold = 0.5, .slots = {.most = 2}};
    for (const int threads : {1, 3}) {
      const auto r = route(selector, u, shape, threads);
      const experts all{0, 1, 2}, best{0}, none{};
      const std::vector<experts> expected{all,  experts{2}, none,       all, all, best,
                                          none, all,        experts{2}, all, all, best};
      for (index n = 0; n < 12; ++n) {
        CAPTURE(n);
        CHECK(experts_of(r, n) == expected[static_cast<std::size_t>(n)]);
        CHECK(std::isnan(r.gates(n, 0)) == (n == 0 || n == 7));
      }
      CHECK(r.gates(3, 1) == r.gates(3, 0));
      CHECK(r.gates(5, 1) == 0.0f);
    }
    const limited no_slot{.inner = {.k = 1}, .threshold = 0.5, .slots = {.most = 0}};
    CHECK(experts_of(route(no_slot, u, shape), 3) == experts{0});
    // One sequence: the slots are those of the batch.
    shape.sequence_length = 0;
    CHECK(experts_of(route(selector, u, shape), 4) == experts{0, 1, 2});
    CHECK(experts_of(route(selector, u, shape), 9) == experts{0});
    // Enough slots are the same as no limit.
    const limited many{.inner = {.k = 1}, .threshold = 0.5, .slots = {.most = 12}};
    const over_top_k free{.inner = {.k = 1}, .threshold = 0.5};
    const auto a = route(many, u, shape), b = route(free, u, shape);
    CHECK(testing::first_difference(a.mask, b.mask) == "");
    CHECK(testing::first_difference(a.gates, b.gates) == "");
  }

  TEST_CASE("round a selector with capacity, tokens that are sure keep what it gave them") {
    using full = capacity_top_k<gate::raw>;
    support::test_random random(31);
    const matrix<double, cpu> u = support::random_matrix<double>(random, 200, 5, 2.0);
    const batch_shape shape(random, 200, 50);
    const broadcast<full> selector{.inner = {.k = 1, .capacity = {.factor = 0.5}},
                                   .threshold = 0.7};
    const auto r = route(selector, u, shape), inner = route(selector.inner, u, shape);
    const auto all = route(dense{}, u, shape);
    index unsure = 0, dropped = 0;
    for (index n = 0; n < 200; ++n) {
      if (!shape.takes_part(n)) continue;
      const support::slow_row p = support::slow_top_k(support::widened_row(u, n), 1, weighing::raw);
      const bool broadcasts = slow_shannon(p.probability) >= 0.7;
      const auto& expected = broadcasts ? all : inner;
      CHECK(experts_of(r, n) == experts_of(expected, n));
      for (index e = 0; e < 5; ++e) CHECK(r.gates(n, e) == expected.gates(n, e));
      unsure += broadcasts ? 1 : 0;
      dropped += !broadcasts && experts_of(inner, n).empty() ? 1 : 0;
    }
    CHECK(unsure > 0);
    CHECK(dropped > 0);
  }

  TEST_CASE_TEMPLATE("laws round a selector with control, bias and modes", T, TALPA_SCALARS) {
    for (const index count : {2, 8, 33}) {
      CAPTURE(count);
      support::obeys(testing::selector_laws<T>(broadcast<with_extras>{.threshold = 0.8}, count));
    }
  }

  TEST_CASE("hyperparameters out of range are refused, the inner ones under their own name") {
    const matrix<float, cpu> u(2, 8);
    CHECK_THROWS_WITH_AS(route(over_top_k{.threshold = -0.5}, u),
                         "talpa::broadcast: 'threshold' is -0.5, expected >= 0 = entropy from "
                         "which on a token is broadcast",
                         value_error);
    CHECK_THROWS_WITH_AS(route(over_top_k{.threshold = std::nan("")}, u),
                         "talpa::broadcast: 'threshold' is nan, expected >= 0 = entropy from "
                         "which on a token is broadcast",
                         value_error);
    CHECK_THROWS_WITH_AS(route(limited{.slots = {.most = -1}}, u),
                         "talpa::broadcast: 'slots.most' is -1, expected >= 0 = tokens of a "
                         "sequence that may be broadcast",
                         value_error);
    CHECK_THROWS_WITH_AS(route(over_top_k{.entropy = {.epsilon = -1.0}}, u),
                         "talpa::broadcast: 'entropy.epsilon' is -1, expected a finite number >= 0",
                         value_error);
    CHECK_THROWS_WITH_AS(route(over_top_k{.inner = {.k = 9}}, u),
                         "talpa::top_k: 'k' is 9, expected 1..8 = experts", value_error);
  }
}

}  // namespace talpa::broadcast_test
