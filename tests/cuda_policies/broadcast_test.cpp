// SPDX-License-Identifier: Apache-2.0
#include "support/selection.hpp"

#include <talpa/cpu/overlay_rows.hpp>
#include <talpa/cuda/overlay_rows.hpp>
#include <talpa/selectors/broadcast.hpp>
#include <talpa/selectors/top_k.hpp>

#include <doctest/doctest.h>

namespace talpa::cuda_broadcast_test {
using support::selection_difference;

namespace {

using inner = top_k<gate::renormalised>;

}  // namespace

TEST_SUITE("cuda_policies/broadcast") {
  TEST_CASE("broadcast has the bits of the host") {
    using each = broadcast<inner>;
    const index tokens = support::device_size(29, 1000);
    CHECK(selection_difference<float>(each{.inner = {2}, .threshold = 0.7}, tokens, 8) == "");
    CHECK(selection_difference<float>(each{.inner = {2}, .threshold = 0.7}, tokens, 40) == "");
    CHECK(selection_difference<float>(each{.inner = {1}, .threshold = 0.0}, tokens, 1) == "");
    CHECK(selection_difference<float>(each{.inner = {2}}, 0, 8) == "");
    CHECK(selection_difference<float>(each{.inner = {2}, .threshold = 0.7}.at(mode::inference),
                                      tokens, 8) == "");
  }

  TEST_CASE("broadcast with slots for some tokens of a sequence has the bits of the host") {
    using some = broadcast<inner, entropy::shannon, slots::per_sequence>;
    const index length = support::device_size(10, 500);
    const some selector{.inner = {2}, .threshold = 0.5, .slots = {2}};
    CHECK(selection_difference<float>(selector, 3 * length, 8, length) == "");
    CHECK(selection_difference<float>(selector, 0, 8) == "");
  }
}

}  // namespace talpa::cuda_broadcast_test
