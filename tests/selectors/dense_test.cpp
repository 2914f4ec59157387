// SPDX-License-Identifier: Apache-2.0
#include "selectors/slow_selection.hpp"
#include "support/laws.hpp"
#include "support/random.hpp"
#include "support/sanitized.hpp"
#include "support/scalars.hpp"
#include "support/tolerance.hpp"

#include <talpa/cpu/select.hpp>
#include <talpa/routing/routing.hpp>
#include <talpa/selectors/dense.hpp>
#include <talpa/testing/selector_laws.hpp>

#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <string>
#include <vector>

namespace talpa::dense_test {

namespace {

template <class T>
routing<T, cpu> select(const matrix<T, cpu>& logits) {
  context<cpu> ctx(2);
  routing<T, cpu> r(logits.rows(), logits.cols());
  ops::select(ctx, dense{}, logits, {}, r.gates.view(), r.mask.view());
  return r;
}

template <class T>
matrix<T, cpu> backward(const matrix<T, cpu>& logits, const routing<T, cpu>& r,
                        const matrix<T, cpu>& dgates) {
  context<cpu> ctx(2);
  matrix<T, cpu> dlogits(logits.rows(), logits.cols());
  ops::select_backward(ctx, dense{}, logits, r.gates.view(), r.mask.view(), dgates, dlogits.view());
  return dlogits;
}

}  // namespace

TEST_SUITE("selectors/dense") {
  // Logits ln 1, ln 3, ln 4: p = (1, 3, 4) / 8. With dg = (0, 1, -1) the mean is -1/8, and
  // du = p (dg + 1/8) = (1/64, 27/64, -28/64).
  TEST_CASE_TEMPLATE("dense on three experts, by hand", T, TALPA_SCALARS) {
    matrix<T, cpu> u(1, 3), dg(1, 3);
    u(0, 1) = static_cast<T>(std::log(3.0));
    u(0, 2) = static_cast<T>(std::log(4.0));
    dg(0, 1) = T{1};
    dg(0, 2) = T{-1};
    const double bound = support::rounding_bound<T>(3.0 + 2.0 + 4.0, 1.0);
    const auto r = select(u);
    CHECK(support::difference(r.gates.view(), {1, 3, {0.125, 0.375, 0.5}}, bound) == "");
    CHECK(r.mask(0, 0) == 0b111u);
    CHECK(support::difference(backward(u, r, dg).view(),
                              {1, 3, {1.0 / 64.0, 27.0 / 64.0, -28.0 / 64.0}}, bound) == "");
  }

  TEST_CASE_TEMPLATE("laws of dense", T, TALPA_SCALARS) {
    for (const index experts : {1, 2, 8, 33, 65, 200}) {
      if (support::sanitized && experts > 65) continue;
      CAPTURE(experts);
      support::obeys(testing::selector_laws<T>(dense{}, experts));
    }
  }

  TEST_CASE_TEMPLATE("dense agrees with a slow softmax on thousands of rows", T, TALPA_SCALARS) {
    support::test_random random(17);
    for (const index experts : {1, 2, 7, 32, 33, 65, 200}) {
      CAPTURE(experts);
      const index tokens = support::many_rows(experts > 64 ? 200 : 1500);
      const matrix<T, cpu> u = support::eventful_logits<T>(random, tokens, experts);
      const matrix<T, cpu> dg = support::random_matrix<T>(random, tokens, experts);
      const auto r = select(u);
      const auto du = backward(u, r, dg);
      std::string problem;
      for (index n = 0; n < tokens && problem.empty(); ++n) {
        const std::vector<double> logits = support::widened_row(u, n);
        // All experts that are not -inf.
        const auto expected = support::slow_top_k(logits, experts, support::weighing::raw);
        const auto gradient =
            support::slow_gradient(expected, support::widened_row(dg, n), support::weighing::raw);
        const double largest = testing::largest(dg.view().row_range(n, 1));
        // Difference to the largest logit, exponential, E additions, division.
        const double roundings =
            static_cast<double>(experts) + support::spread_of_row(logits) + 4.0;
        for (index e = 0; e < experts; ++e) {
          const auto i = static_cast<std::size_t>(e);
          if (r.view().on(n, e) != expected.on[i] ||
              !support::within(static_cast<double>(r.gates(n, e)), expected.gates[i],
                               support::rounding_bound<T>(roundings, expected.gates[i]) +
                                   static_cast<double>(std::numeric_limits<T>::denorm_min())) ||
              !support::within(static_cast<double>(du(n, e)), gradient[i],
                               support::rounding_bound<T>(3.0 * roundings, 2.0 * largest))) {
            problem = "token " + std::to_string(n) + ", expert " + std::to_string(e);
            break;
          }
        }
      }
      CHECK(problem == "");
    }
  }

  TEST_CASE("equal logits share equally, and a single expert has gate 1 and no gradient") {
    matrix<float, cpu> four(1, 4), one(3, 1), dg(3, 1);
    for (index e = 0; e < 4; ++e) four(0, e) = -3.5f;
    const auto r = select(four);
    for (index e = 0; e < 4; ++e) CHECK(r.gates(0, e) == 0.25f);
    for (index n = 0; n < 3; ++n) {
      one(n, 0) = static_cast<float>(100 * n - 100);
      dg(n, 0) = 2.0f;
    }
    const auto s = select(one);
    const auto du = backward(one, s, dg);
    for (index n = 0; n < 3; ++n) {
      CHECK(s.gates(n, 0) == 1.0f);
      CHECK(du(n, 0) == 0.0f);
    }
  }

  TEST_CASE("masked experts are off, and a probability that underflows is on with gate 0") {
    matrix<float, cpu> u(1, 4);
    u(0, 0) = -std::numeric_limits<float>::infinity();
    u(0, 1) = 0.0f;
    u(0, 2) = -std::numeric_limits<float>::max();
    u(0, 3) = 0.0f;
    const auto r = select(u);
    CHECK(r.mask(0, 0) == 0b1110u);
    CHECK(r.gates(0, 0) == 0.0f);
    CHECK(r.gates(0, 1) == 0.5f);
    CHECK(r.gates(0, 2) == 0.0f);
    CHECK(r.gates(0, 3) == 0.5f);
  }

  TEST_CASE("a recorded mask keeps the probabilities over all experts") {
    matrix<double, cpu> u(1, 3), gates(1, 3);
    u(0, 1) = std::log(3.0);
    u(0, 2) = std::log(4.0);
    matrix<std::uint32_t, cpu> mask(1, 1);
    mask(0, 0) = 0b011u;
    context<cpu> ctx(1);
    ops::replay(ctx, dense{}, u, {}, mask.view(), gates.view());
    const double bound = support::rounding_bound<double>(3.0 + 2.0 + 4.0, 1.0);
    CHECK(support::difference(gates.view(), {1, 3, {0.125, 0.375, 0.0}}, bound) == "");
  }
}

}  // namespace talpa::dense_test
