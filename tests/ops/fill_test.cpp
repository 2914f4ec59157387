// SPDX-License-Identifier: Apache-2.0
#include "support/padded.hpp"
#include "support/scalars.hpp"

#include <talpa/cpu/fill.hpp>

#include <doctest/doctest.h>

#include <cstdint>

namespace talpa::fill_test {

TEST_SUITE("ops/fill") {
  TEST_CASE_TEMPLATE("fill sets every element of a strided view and nothing between its rows", T,
                     TALPA_SCALARS) {
    for (const int threads : {1, 2, 3}) {
      context<cpu> ctx(threads);
      support::padded<T> y(700, 70);
      ops::fill(ctx, T{2.5}, y.view());
      CHECK(y.intact());
      index right = 0;
      for (index n = 0; n < 700; ++n) {
        for (index d = 0; d < 70; ++d) right += y.view()(n, d) == T{2.5} ? 1 : 0;
      }
      CHECK(right == 700 * 70);
    }
  }

  TEST_CASE("fill takes integers and empty views") {
    context<cpu> ctx(1);
    matrix<std::int32_t, cpu> labels(2, 3);
    ops::fill(ctx, -1, labels.view());
    for (index i = 0; i < labels.size(); ++i) CHECK(labels.data()[i] == -1);
    ops::fill(ctx, 1.0f, matrix_view<float, cpu>());
    ops::fill(ctx, 1.0f, matrix_view<float, cpu>(nullptr, 5, 0));
  }
}

}  // namespace talpa::fill_test
