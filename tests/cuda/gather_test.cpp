// SPDX-License-Identifier: Apache-2.0
#include "support/both_segments.hpp"
#include "support/parity.hpp"
#include "support/scalars.hpp"

#include <talpa/cpu/gather.hpp>
#include <talpa/cuda/gather.hpp>
#include <talpa/cuda/segments.hpp>

#include <doctest/doctest.h>

#include <cmath>

namespace talpa::cuda_gather_test {
using support::both_segments;
using support::device;
using support::on_device;

TEST_SUITE("cuda/gather") {
  // Copies, and sums in one order: the same bits on every backend.
  TEST_CASE_TEMPLATE("gather and combine have the bits of the host", T, TALPA_SCALARS) {
    for (const index tokens : {index{0}, index{1}, support::device_size(129, 5003)}) {
      CAPTURE(tokens);
      context<cpu> host(1);
      context<device> ctx;
      const both_segments s(host, ctx, tokens, 5);
      const index places = s.host.capacity(), width = 35;
      support::test_random random(12);
      on_device<T> x(support::random_matrix<T>(random, tokens, width));
      on_device<T> y(support::random_matrix<T>(random, places, width));
      matrix<T, cpu> slots = y.host();
      ops::gather(host, s.host, x.host(), slots.view());
      ops::gather(ctx, s.on, x.view(), y.view());
      ctx.synchronise();
      CHECK(support::bit_difference(y.now(), slots) == "");
      CHECK(y.intact());
      ops::clear_unused(host, s.host, slots.view());
      ops::clear_unused(ctx, s.on, y.view());
      ctx.synchronise();
      CHECK(support::bit_difference(y.now(), slots) == "");
      CHECK(y.intact());

      on_device<T> terms(support::random_matrix<T>(random, places, width));
      for (const grad_mode mode : {grad_mode::overwrite, grad_mode::accumulate}) {
        on_device<T> sums(support::random_matrix<T>(random, tokens, width));
        matrix<T, cpu> expected = sums.host();
        ops::combine(host, s.host, terms.host(), expected.view(), mode);
        ops::combine(ctx, s.on, terms.view(), sums.view(), mode);
        ctx.synchronise();
        CHECK(support::bit_difference(sums.now(), expected) == "");
        CHECK(sums.intact());
      }
    }
  }

  TEST_CASE("a token with slots beyond the places gets NaN, the others what they are due") {
    context<device> ctx;
    const auto on = support::crowded_mask();
    const segments<device> s = support::crowded_segments(ctx, on.view());
    matrix<float, cpu> values(4, 1);
    for (index i = 0; i < 4; ++i) values(i, 0) = static_cast<float>(i + 1);
    const auto x = to_device<device>(values.view());
    matrix<float, device> y(3, 1);
    ops::combine(ctx, s, x, y.view(), grad_mode::overwrite);
    matrix<float, device> dgates(3, 2);
    ops::build_segments_backward(ctx, on, s, vector_view<const float, device>(x.data(), 4),
                                 dgates.view(), grad_mode::overwrite);
    ctx.synchronise();
    const auto sums = to_host(y.view()), back = to_host(dgates.view());
    CHECK(sums(0, 0) == 1.0f + 4.0f);
    CHECK(std::isnan(sums(1, 0)));
    CHECK(std::isnan(sums(2, 0)));
    CHECK(back(0, 1) == 4.0f);
    CHECK(std::isnan(back(1, 1)));
  }
}

}  // namespace talpa::cuda_gather_test
