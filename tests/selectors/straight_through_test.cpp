// SPDX-License-Identifier: Apache-2.0
#include "support/random.hpp"
#include "support/reference.hpp"
#include "support/scalars.hpp"
#include "support/tolerance.hpp"

#include <talpa/cpu/select.hpp>
#include <talpa/routing/routing.hpp>
#include <talpa/selectors/straight_through.hpp>
#include <talpa/selectors/top_k.hpp>
#include <talpa/testing/bounds.hpp>

#include <doctest/doctest.h>

#include <cmath>
#include <cstdint>
#include <limits>

namespace talpa::straight_through_test {

using namespace support;

namespace {

template <class T, class Selector>
routing<T, cpu> choose(const Selector& selector, const matrix<T, cpu>& logits) {
  context<cpu> ctx(2);
  routing<T, cpu> r(logits.rows(), logits.cols());
  ops::select(ctx, selector, logits, {}, r.gates.view(), r.mask.view());
  return r;
}

template <class T>
matrix<T, cpu> gradient_of(const straight_through& selector, const matrix<T, cpu>& logits,
                           const routing<T, cpu>& r, const matrix<T, cpu>& dgates) {
  context<cpu> ctx(1);
  matrix<T, cpu> dlogits(logits.rows(), logits.cols());
  ops::select_backward(ctx, selector, logits, r.gates.view(), r.mask.view(), dgates,
                       dlogits.view());
  return dlogits;
}

}  // namespace

TEST_SUITE("selectors/straight_through") {
  TEST_CASE_TEMPLATE("straight_through on three experts, by hand", T, TALPA_SCALARS) {
    // p = (1, 3, 4) / 8; the best is expert 2. dg = (8, 0, -8): sum of p dg is -3.
    matrix<T, cpu> u(1, 3), dg(1, 3);
    u(0, 1) = static_cast<T>(std::log(3.0));
    u(0, 2) = static_cast<T>(std::log(4.0));
    dg(0, 0) = T{8};
    dg(0, 2) = T{-8};
    const straight_through selector{.k = 1};
    const auto r = choose(selector, u);
    CHECK(r.mask(0, 0) == 0b111u);  // all work, two of them for nothing
    CHECK(difference(r.gates.view(), {1, 3, {0.0, 0.0, 1.0}}, 0.0) == "");
    const auto du = gradient_of(selector, u, r, dg);
    // du = p (dg + 3): 11 / 8, 9 / 8, -20 / 8. Logarithm, softmax and sum cost 16 roundings each
    // on terms of at most 8.
    const double bound = rounding_bound<T>(16.0, 8.0);
    CHECK(difference(du.view(), {1, 3, {11.0 / 8.0, 9.0 / 8.0, -20.0 / 8.0}}, bound) == "");
  }

  TEST_CASE("the gradient is that of a softmax, whatever was chosen") {
    test_random random(31);
    for (const index experts : {1, 4, 33, 70}) {
      CAPTURE(experts);
      const auto u = random_matrix<double>(random, 50, experts, 2.0);
      const auto dg = random_matrix<double>(random, 50, experts);
      const straight_through selector{.k = experts < 3 ? 1 : 3};
      const auto r = choose(selector, u);
      const auto du = gradient_of(selector, u, r, dg);
      const table p = softmax(to_table(u.view()));
      // p (dg - sum): a softmax of spread 16 and a sum over E on terms of at most 4, twice.
      const double bound = rounding_bound<double>(4.0 * (static_cast<double>(experts) + 24.0), 8.0);
      CHECK((experts == 1
                 ? testing::largest(du.view()) <= bound
                 : difference(du.view(), softmax_gradient(p, to_table(dg.view())), bound).empty()));
    }
  }

  TEST_CASE_TEMPLATE("gates are those of top_k with hard gates, at inference the mask too", T,
                     TALPA_SCALARS) {
    test_random random(32);
    for (const index experts : {1, 5, 32, 65}) {
      CAPTURE(experts);
      matrix<T, cpu> u = random_matrix<T>(random, 60, experts, 2.0);
      for (index n = 0; n < 60; ++n) {
        for (index e = 0; e < experts; ++e) {
          if (n % 3 == 0) u(n, e) = static_cast<T>(random.below(3));  // ties
          if (n % 5 == 1 && e != n % experts && random.below(2) == 0) {
            u(n, e) = -std::numeric_limits<T>::infinity();
          }
        }
      }
      const index k = experts < 4 ? 1 : 3;
      const auto hard = choose(top_k<gate::hard>{.k = k}, u);
      const straight_through selector{.k = k};
      CHECK(choose(selector.at(mode::inference), u) == hard);
      const auto trained = choose(selector.at(mode::training), u);
      CHECK(testing::first_difference(trained.gates, hard.gates) == "");
      bool offered = true;
      for (index n = 0; n < 60; ++n) {
        for (index e = 0; e < experts; ++e) {
          offered = offered && trained.view().on(n, e) == (u(n, e) > -1000);
        }
      }
      CHECK(offered);
    }
  }

  TEST_CASE("sizes follow the mode") {
    const straight_through selector{.k = 2};
    CHECK(selector.max_selected(8) == 8);
    CHECK(selector.at(mode::inference).max_selected(8) == 2);
    CHECK(straight_through{.k = 2, .training = false}.at(mode::training).max_selected(8) == 2);
  }

  TEST_CASE("k outside 1..E is refused with its range") {
    const matrix<float, cpu> u(2, 8);
    CHECK_THROWS_WITH_AS(choose(straight_through{.k = 9}, u),
                         "talpa::straight_through: 'k' is 9, expected 1..8 = experts", value_error);
    CHECK_THROWS_WITH_AS(choose(straight_through{.k = 0}, u),
                         "talpa::straight_through: 'k' is 0, expected 1..8 = experts", value_error);
  }
}

}  // namespace talpa::straight_through_test
