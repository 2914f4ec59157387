// SPDX-License-Identifier: Apache-2.0
#include "support/scalars.hpp"

#include <talpa/cpu/item.hpp>

#include <doctest/doctest.h>

#include <concepts>

namespace talpa::item_test {

TEST_SUITE("ops/item") {
  TEST_CASE_TEMPLATE("item reads the one number of a mutable or a const view", T, TALPA_SCALARS) {
    context<cpu> ctx(1);
    matrix<T, cpu> x(1, 1);
    x(0, 0) = T{2.5};
    CHECK(ops::item(ctx, x.view()) == T{2.5});
    const matrix_view<const T, cpu> read_only = x.view();
    static_assert(std::same_as<decltype(ops::item(ctx, read_only)), T>);
    CHECK(ops::item(ctx, read_only) == T{2.5});
  }

  TEST_CASE("item refuses what is not one number") {
    context<cpu> ctx(1);
    matrix<float, cpu> x(1, 2);
    CHECK_THROWS_WITH_AS(ops::item(ctx, x.view()),
                         "talpa::ops::item: 'x' has shape [1, 2], expected [1, 1] = one number",
                         shape_error);
  }
}

}  // namespace talpa::item_test
