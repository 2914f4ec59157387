// SPDX-License-Identifier: Apache-2.0
#include "support/parity.hpp"
#include "support/scalars.hpp"

#include <talpa/cpu/pair_gates.hpp>
#include <talpa/cuda/pair_gates.hpp>
#include <talpa/testing/inputs.hpp>

#include <doctest/doctest.h>

#include <cmath>
#include <cstdint>
#include <limits>

namespace talpa::cuda_pair_gates_test {
using support::device;
using support::on_device;

TEST_SUITE("cuda/pair_gates") {
  TEST_CASE_TEMPLATE("pair_gates and its gradient have the bits of the host", T, TALPA_SCALARS) {
    context<device> ctx;
    context<cpu> host(1);
    generator random(5);
    support::test_random values(6);
    const auto compare = [&](index tokens, index own, index other) {
      CAPTURE(tokens);
      CAPTURE(own);
      CAPTURE(other);
      on_device<T> logits(support::random_matrix<T>(values, tokens, own));
      on_device<T> dgates(support::random_matrix<T>(values, tokens, own));
      // Gates with ties.
      matrix<T, cpu> ties(tokens, other);
      for (index i = 0; i < ties.size(); ++i) {
        ties.data()[i] = static_cast<T>(values.below(8)) / T{8};
      }
      on_device<T> from(ties);
      on_device<std::uint32_t> mask(testing::random_mask(tokens, own, 0.3, random));
      on_device<std::uint32_t> from_mask(testing::random_mask(tokens, other, 0.3, random));
      on_device<T> gates(support::random_matrix<T>(values, tokens, own));
      on_device<T> dfrom(support::random_matrix<T>(values, tokens, other));
      matrix<T, cpu> expected(tokens, own), expected_dfrom = dfrom.host();
      ops::pair_gates(host, logits.host(), mask.host(), from.host(), from_mask.host(),
                      expected.view());
      ops::pair_gates_backward(host, logits.host(), mask.host(), from.host(), from_mask.host(),
                               dgates.host(), expected_dfrom.view());
      ops::pair_gates(ctx, logits.view(), mask.view(), from.view(), from_mask.view(), gates.view());
      ops::pair_gates_backward(ctx, logits.view(), mask.view(), from.view(), from_mask.view(),
                               dgates.view(), dfrom.view());
      ctx.synchronise();
      CHECK(support::bit_difference(gates.now(), expected) == "");
      CHECK(support::bit_difference(dfrom.now(), expected_dfrom) == "");
      CHECK(gates.intact());
      CHECK(dfrom.intact());
      CHECK(ctx.scratch.used() == 0);
    };
    compare(0, 3, 4);
    compare(1, 1, 1);
    compare(support::device_size(129, 4001), 33, 40);
    compare(support::device_size(129, 4001), 40, 7);
    compare(support::device_size(17, 4001), 7, 70);
  }

  TEST_CASE("NaN gates are the last in order") {
    constexpr float nan = std::numeric_limits<float>::quiet_NaN();
    context<device> ctx;
    matrix<float, cpu> choices(1, 3), weights(1, 4);
    matrix<std::uint32_t, cpu> all(1, 1), bits(1, 1);
    all(0, 0) = 7u;
    bits(0, 0) = 13u;  // not expert 1
    choices(0, 0) = 1.0f;
    choices(0, 1) = 3.0f;
    choices(0, 2) = 2.0f;
    weights(0, 0) = nan;
    weights(0, 1) = 9.0f;
    weights(0, 2) = 0.25f;
    weights(0, 3) = 0.75f;
    on_device<float> logits(choices), from(weights), gates(choices);
    on_device<std::uint32_t> mask(all), from_mask(bits);
    ops::pair_gates(ctx, logits.view(), mask.view(), from.view(), from_mask.view(), gates.view());
    ctx.synchronise();
    CHECK(std::isnan(gates.now()(0, 0)));
    CHECK(gates.now()(0, 1) == 0.75f);
    CHECK(gates.now()(0, 2) == 0.25f);
  }
}

}  // namespace talpa::cuda_pair_gates_test
