// SPDX-License-Identifier: Apache-2.0
#include "support/random.hpp"
#include "support/scalars.hpp"
#include "support/totals.hpp"

#include <talpa/cpu/assign_balanced.hpp>
#include <talpa/cpu/route.hpp>
#include <talpa/ops/route.hpp>
#include <talpa/selectors/base_assignment.hpp>
#include <talpa/selectors/top_k.hpp>

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

namespace talpa::route_test {
using support::all_totals;

namespace {

/// What route and the two ops that it stands for read and write.
template <class T>
struct arguments {
  matrix<T, cpu> logits, gates;
  matrix<std::uint32_t, cpu> mask;
  vector<std::uint8_t, cpu> real;

  arguments(index tokens, index experts)
      : gates(tokens, experts), mask(tokens, mask_words(experts)), real(tokens) {
    support::test_random random(51);
    logits = support::random_matrix<T>(random, tokens, experts, 2.0);
    for (index n = 0; n < tokens; ++n) {
      real[n] = random.below(5) != 0 ? 1 : 0;
      if (real[n] == 0) {
        std::fill_n(logits.data() + n * experts, experts, std::numeric_limits<T>::quiet_NaN());
      }
    }
  }
};

/// Whether route does what select and then routing_sums do, on any number of threads.
template <class T, class Selector>
bool equals_its_parts(const Selector& selector, index tokens, index experts, index group_rows,
                      grad_mode mode) {
  arguments<T> parts(tokens, experts), whole(tokens, experts);
  const index groups = group_rows == 0 ? 1 : tokens / group_rows;
  all_totals<T> expected(groups, experts, 7), found(groups, experts, 7);
  context<cpu> one(1), several(3);
  ops::select(one, selector, parts.logits, parts.real.view(), parts.gates.view(),
              parts.mask.view());
  ops::routing_sums(one, {parts.logits, parts.gates, parts.mask, parts.real.view(), group_rows},
                    expected.view(), mode);
  ops::route(several, selector, whole.logits, whole.real.view(), whole.gates.view(),
             whole.mask.view(), {found.view(), mode, group_rows});
  return found == expected && several.scratch.used() == 0 && several.memory.used() == 0 &&
         std::equal(parts.gates.data(), parts.gates.data() + parts.gates.size(),
                    whole.gates.data()) &&
         std::equal(parts.mask.data(), parts.mask.data() + parts.mask.size(), whole.mask.data());
}

}  // namespace

TEST_SUITE("ops/route") {
  TEST_CASE("two rows of two experts, by hand") {
    // Rows (0, ln 3) and (ln 3, 0): p = (1/4, 3/4), (3/4, 1/4); gates of the best expert.
    matrix<double, cpu> logits(2, 2), gates(2, 2);
    logits(0, 1) = logits(1, 0) = std::log(3.0);
    matrix<std::uint32_t, cpu> mask(2, 1);
    all_totals<double> totals(1, 2, 7);
    context<cpu> ctx(1);
    ops::route(ctx, top_k<gate::raw>{1}, logits, {}, gates.view(), mask.view(), {totals.view()});
    CHECK(mask(0, 0) == 0b10u);
    CHECK(mask(1, 0) == 0b01u);
    CHECK(totals.tokens[0] == 2);
    for (index e = 0; e < 2; ++e) {
      CHECK(totals.counts(0, e) == 1);
      CHECK(std::abs(totals.importance(0, e) - 0.75) < 1e-15);
      CHECK(std::abs(totals.probability(0, e) - 1.0) < 1e-15);
    }
    CHECK(std::abs(totals.squared_logsumexp[0] - 2.0 * std::pow(std::log(4.0), 2)) < 1e-14);
    CHECK(std::abs(totals.entropy[0] - 2.0 * (std::log(4.0) - 0.75 * std::log(3.0))) < 1e-14);
  }

  TEST_CASE_TEMPLATE("route has the bits of select and routing_sums", T, TALPA_SCALARS) {
    for (const grad_mode mode : {grad_mode::overwrite, grad_mode::accumulate}) {
      for (const index tokens : {index{0}, index{1}, index{300}}) {
        CAPTURE(tokens);
        CHECK(equals_its_parts<T>(top_k<gate::renormalised>{1}, tokens, 1, 0, mode));
        CHECK(equals_its_parts<T>(top_k<gate::renormalised>{2}, tokens, 9, 0, mode));
        CHECK(equals_its_parts<T>(top_k<gate::raw>{8}, tokens, 100, 0, mode));
      }
      CHECK(equals_its_parts<T>(top_k<gate::renormalised>{2}, 300, 8, 15, mode));
      CHECK(equals_its_parts<T>(top_k<gate::renormalised>{2}, 0, 8, 15, mode));
      CHECK(equals_its_parts<T>(base_assignment{}, 40, 4, 0, mode));
    }
  }

  TEST_CASE("totals that are ignored stay as they are") {
    arguments<float> a(4, 3);
    all_totals<float> totals(1, 3, 7);
    const all_totals<float> before = totals;
    context<cpu> ctx(1);
    ops::route(ctx, top_k<gate::raw>{2}, a.logits, a.real.view(), a.gates.view(), a.mask.view(),
               {totals.view(), grad_mode::ignore});
    CHECK(totals == before);
    CHECK(a.mask(0, 0) + a.mask(1, 0) + a.mask(2, 0) + a.mask(3, 0) > 0u);
  }

  TEST_CASE("what does not fit is refused before any work") {
    arguments<float> a(6, 3);
    all_totals<float> totals(2, 3, 7);
    context<cpu> ctx(1);
    const auto route = [&](const wanted_totals<float, cpu>& wanted) {
      ops::route(ctx, top_k<gate::raw>{2}, a.logits, a.real.view(), a.gates.view(), a.mask.view(),
                 wanted);
    };
    CHECK_THROWS_WITH_AS(route({totals.view(), grad_mode::overwrite, 4}),
                         "talpa::top_k: 'group_rows' is 4, expected a divisor of 6 = tokens, or 0",
                         value_error);
    CHECK_THROWS_WITH_AS(route({totals.view()}),
                         "talpa::top_k: 'tokens' has shape [2], expected [1] = groups",
                         shape_error);
    a.gates = matrix<float, cpu>(6, 2);
    CHECK_THROWS_WITH_AS(
        route({totals.view(), grad_mode::overwrite, 3}),
        "talpa::top_k: 'gates' has shape [6, 2], expected [6, 3] = shape of logits", shape_error);
  }
}

}  // namespace talpa::route_test
