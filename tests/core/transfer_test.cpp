// SPDX-License-Identifier: Apache-2.0
#include "support/padded.hpp"
#include "support/random.hpp"

#include <talpa/core/transfer.hpp>
#include <talpa/testing/simulated.hpp>

#include <doctest/doctest.h>

#include <utility>

namespace talpa::transfer_test {

TEST_SUITE("core/transfer") {
  TEST_CASE("a matrix comes back as it went, from longer rows too") {
    support::test_random random(3);
    support::padded<float> host(support::random_matrix<float>(random, 5, 7));
    const auto there = to_device<simulated>(host.view());
    const auto back = to_host(there.view());
    for (index r = 0; r < 5; ++r) {
      for (index c = 0; c < 7; ++c) CHECK(back(r, c) == host.view()(r, c));
    }
    matrix<float, simulated> wide(6, 9);
    to_device<float, simulated>(host.view(), wide.view().row_range(1, 5).col_range(1, 7));
    const auto all = to_host(std::as_const(wide).view());
    CHECK(all(0, 1) == 0.0f);
    CHECK(all(1, 0) == 0.0f);
    CHECK(all(1, 1) == back(0, 0));
    CHECK(all(5, 7) == back(4, 6));
    CHECK(host.intact());
  }

  TEST_CASE("nothing is legal, another shape is refused") {
    const matrix<float, cpu> none(0, 3), some(2, 3);
    CHECK(to_host(to_device<simulated>(none.view()).view()).rows() == 0);
    matrix<float, simulated> other(3, 2);
    CHECK_THROWS_WITH_AS((to_device<float, simulated>(some.view(), other.view())),
                         "talpa::to_device: 'to' has shape [3, 2], expected [2, 3] = shape of from",
                         shape_error);
    matrix<float, cpu> back(2, 3);
    CHECK_THROWS_WITH_AS((to_host<float, simulated>(other.view(), back.view())),
                         "talpa::to_host: 'to' has shape [2, 3], expected [3, 2] = shape of from",
                         shape_error);
  }
}

}  // namespace talpa::transfer_test
