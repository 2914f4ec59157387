// SPDX-License-Identifier: Apache-2.0
#include "support/random.hpp"
#include "support/sanitized.hpp"

#include <talpa/cpu/select.hpp>
#include <talpa/ops/select.hpp>
#include <talpa/routing/routing.hpp>
#include <talpa/selectors/top_k.hpp>
#include <talpa/testing/bounds.hpp>
#include <talpa/testing/inputs.hpp>
#include <talpa/testing/lanes.hpp>

#include <doctest/doctest.h>

#include <limits>

namespace talpa::select_test {

namespace {

using selector_type = top_k<gate::renormalised>;

/// Everything ops::select and its backward take, of right sizes.
struct arguments {
  context<cpu> ctx{1};
  selector_type selector{.k = 2};
  matrix<float, cpu> logits;
  vector<std::uint8_t, cpu> padding;
  routing<float, cpu> r;
  matrix<float, cpu> dgates, dlogits;

  arguments(index tokens, index experts)
      : logits(tokens, experts),
        padding(tokens),
        r(tokens, experts),
        dgates(tokens, experts),
        dlogits(tokens, experts) {
    support::test_random random(3);
    logits = support::random_matrix<float>(random, tokens, experts);
    dgates = support::random_matrix<float>(random, tokens, experts);
    for (index n = 0; n < tokens; ++n) padding[n] = 1;
  }
  void select() {
    ops::select(ctx, selector, logits, padding.view(), r.gates.view(), r.mask.view());
  }
  void replay() {
    ops::replay(ctx, selector, logits, padding.view(), r.mask.view(), r.gates.view());
  }
  void backward() {
    ops::select_backward(ctx, selector, logits, r.gates.view(), r.mask.view(), dgates,
                         dlogits.view());
  }
};

}  // namespace

TEST_SUITE("ops/select") {
  TEST_CASE("one row of 4 experts, by hand") {
    arguments a(1, 4);
    a.logits(0, 0) = 1.0f;
    a.logits(0, 1) = -1.0f;
    a.logits(0, 2) = 1.0f;
    a.logits(0, 3) = 0.0f;
    a.select();
    CHECK(a.r.mask(0, 0) == 0b0101u);
    CHECK(a.r.gates(0, 0) == 0.5f);
    CHECK(a.r.gates(0, 1) == 0.0f);
    CHECK(a.r.gates(0, 2) == 0.5f);
    // du = g (dg - (dg_0 + dg_2) / 2).
    a.dgates(0, 0) = 3.0f;
    a.dgates(0, 2) = 1.0f;
    a.backward();
    CHECK(a.dlogits(0, 0) == 0.5f);
    CHECK(a.dlogits(0, 1) == 0.0f);
    CHECK(a.dlogits(0, 2) == -0.5f);
    // The recorded mask decides, whatever the logits say.
    a.r.mask(0, 0) = 0b1010u;
    a.logits(0, 3) = -1.0f;
    a.replay();
    CHECK(a.r.mask(0, 0) == 0b1010u);
    CHECK(a.r.gates(0, 0) == 0.0f);
    CHECK(a.r.gates(0, 1) == 0.5f);
    CHECK(a.r.gates(0, 3) == 0.5f);
  }

  TEST_CASE("the group that suits the number of experts changes no bit") {
    // Packs of tokens up to 256 experts, single rows beyond.
    for (const index experts : {63, 64, 65, 255, 256, 257}) {
      CAPTURE(experts);
      for (const index tokens : {1, 15, 16, 17, 1024, 1025, 1100}) {
        // Several tasks of either kind are enough for a sanitizer.
        if (support::sanitized && tokens > 17 && experts != 65 && experts != 257) continue;
        CAPTURE(tokens);
        arguments a(tokens, experts);
        a.select();
        CHECK(a.r == testing::select_on<serial>(a.selector, a.logits));
        a.backward();
        CHECK(
            testing::first_difference(
                a.dlogits,
                testing::select_backward_on<serial>(a.selector, a.logits, a.r, a.dgates).dlogits) ==
            "");
      }
    }
  }

  TEST_CASE("a token without a set bit gets no gradient, even from logits that are not numbers") {
    arguments a(3, 5);
    // With raw gates every logit of a token has a gradient.
    const top_k<gate::raw> raw{.k = 2};
    ops::select(a.ctx, raw, a.logits, {}, a.r.gates.view(), a.r.mask.view());
    for (index e = 0; e < 5; ++e) a.logits(1, e) = std::numeric_limits<float>::quiet_NaN();
    a.r.mask(1, 0) = 0;
    testing::poison<float>(a.dlogits.view());
    ops::select_backward(a.ctx, raw, a.logits, a.r.gates.view(), a.r.mask.view(), a.dgates,
                         a.dlogits.view());
    for (index e = 0; e < 5; ++e) {
      CHECK(a.dlogits(1, e) == 0.0f);
      CHECK(a.dlogits(0, e) != 0.0f);
      CHECK(a.dlogits(2, e) != 0.0f);
    }
  }

  TEST_CASE("scratch is handed back") {
    arguments a(100, 8);
    const auto before = a.ctx.scratch.used();
    a.select();
    a.replay();
    a.backward();
    CHECK(a.ctx.scratch.used() == before);
    CHECK(a.ctx.memory.used() == 0);
  }

  TEST_CASE("shapes are checked before any work") {
    arguments a(3, 40);
    a.r.gates = matrix<float, cpu>(3, 39);
    CHECK_THROWS_WITH_AS(
        a.select(), "talpa::top_k: 'gates' has shape [3, 39], expected [3, 40] = shape of logits",
        shape_error);
    CHECK_THROWS_WITH_AS(
        a.replay(), "talpa::top_k: 'gates' has shape [3, 39], expected [3, 40] = shape of logits",
        shape_error);
    CHECK_THROWS_WITH_AS(
        a.backward(), "talpa::top_k: 'gates' has shape [3, 39], expected [3, 40] = shape of logits",
        shape_error);
    a = arguments(3, 40);
    a.r.mask = matrix<std::uint32_t, cpu>(3, 1);
    const char* const mask =
        "talpa::top_k: 'mask' has shape [3, 1], expected [3, 2] = tokens, mask words of the "
        "experts";
    CHECK_THROWS_WITH_AS(a.select(), mask, shape_error);
    CHECK_THROWS_WITH_AS(a.replay(), mask, shape_error);
    CHECK_THROWS_WITH_AS(a.backward(), mask, shape_error);
    a = arguments(3, 40);
    a.padding = vector<std::uint8_t, cpu>(4);
    const char* const padding =
        "talpa::top_k: 'padding_mask' has shape [4], expected [3] = one flag a token";
    CHECK_THROWS_WITH_AS(a.select(), padding, shape_error);
    CHECK_THROWS_WITH_AS(a.replay(), padding, shape_error);
    a = arguments(3, 40);
    a.dgates = matrix<float, cpu>(2, 40);
    CHECK_THROWS_WITH_AS(
        a.backward(),
        "talpa::top_k: 'dgates' has shape [2, 40], expected [3, 40] = shape of logits",
        shape_error);
    a = arguments(3, 40);
    a.dlogits = matrix<float, cpu>(3, 41);
    CHECK_THROWS_WITH_AS(
        a.backward(),
        "talpa::top_k: 'dlogits' has shape [3, 41], expected [3, 40] = shape of logits",
        shape_error);
    a = arguments(3, 1);
    CHECK_THROWS_WITH_AS(a.replay(), "talpa::top_k: 'k' is 2, expected 1..1 = experts",
                         value_error);
  }

  TEST_CASE("a checked context names the logit that makes gates NaN") {
    arguments a(4, 3);
    a.ctx.checked = true;
    CHECK_NOTHROW(a.select());
    a.logits(2, 1) = std::numeric_limits<float>::quiet_NaN();
    const char* const nan =
        "talpa::top_k: 'logits' is nan at [2, 1], expected finite values, or -inf = expert masked "
        "for this token";
    CHECK_THROWS_WITH_AS(a.select(), nan, value_error);
    CHECK_THROWS_WITH_AS(a.replay(), nan, value_error);
    a.logits(2, 1) = std::numeric_limits<float>::infinity();
    CHECK_THROWS_WITH_AS(a.select(),
                         "talpa::top_k: 'logits' is inf at [2, 1], expected finite values, or -inf "
                         "= expert masked for this token",
                         value_error);
    for (index e = 0; e < 3; ++e) a.logits(2, e) = -std::numeric_limits<float>::infinity();
    CHECK_THROWS_WITH_AS(a.select(),
                         "talpa::top_k: 'logits' is -inf in all of row 2, expected at least one "
                         "finite value = an expert to choose",
                         value_error);
    a.logits(2, 0) = 0.0f;
    CHECK_NOTHROW(a.select());
  }
}

}  // namespace talpa::select_test
