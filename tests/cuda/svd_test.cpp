// SPDX-License-Identifier: Apache-2.0
#include "products.hpp"
#include "support/parity.hpp"
#include "support/scalars.hpp"

#include <talpa/cpu/gemm.hpp>
#include <talpa/cpu/svd.hpp>
#include <talpa/cuda/svd.hpp>
#include <talpa/layers/svd_segments.hpp>

#include <doctest/doctest.h>

#include <cmath>
#include <utility>

namespace talpa::cuda_svd_test {
using support::device;
using support::on_device;

TEST_SUITE("cuda/svd") {
  TEST_CASE_TEMPLATE("singular values and vectors have the bits of the host's", T, TALPA_SCALARS) {
    context<device> ctx;
    context<cpu> host(1);
    support::test_random random(92);
    for (const auto& shape : {std::pair<index, index>{0, 3}, {1, 1}, {7, 12}, {12, 7}}) {
      const index rows = shape.first, cols = shape.second;
      CAPTURE(rows);
      const index rank = rows < cols ? rows : cols;
      on_device<T> w(support::random_matrix<T>(random, rows, cols));
      on_device<T> u(matrix<T, cpu>(rank, rows)), s(matrix<T, cpu>(1, rank)),
          v(matrix<T, cpu>(rank, cols));
      ops::svd(ctx, w.view(), u.view(), s.view(), v.view());
      matrix<T, cpu> left(rank, rows), values(1, rank), right(rank, cols);
      ops::svd(host, w.host(), left.view(), values.view(), right.view());
      CHECK(support::same_bits(u.now().view(), left.view()));
      CHECK(support::same_bits(s.now().view(), values.view()));
      CHECK(support::same_bits(v.now().view(), right.view()));
      CHECK(u.intact());
      CHECK(s.intact());
      CHECK(v.intact());
    }
  }

  TEST_CASE("experts begin as segments of their base as on the host") {
    const lora expert{.rank = 2, .alpha = 4.0};
    context<device> ctx;
    context<cpu> host(1);
    generator random(7), same(7);
    auto here = expert.init<float, cpu>(12, 9, 3, random, "");
    auto there = expert.init<float, device>(12, 9, 3, same, "");
    support::test_random numbers(93);
    const matrix<float, cpu> w = support::random_matrix<float>(numbers, 9, 12);
    parameter<float, cpu> base("base", matrix<float, cpu>(w));
    parameter<float, device> base_on("base", to_device<device>(w.view()));
    begin_as_segments(host, expert, here, base);
    begin_as_segments(ctx, expert, there, base_on);
    CHECK(support::same_bits(to_host(there.a.value()).view(), here.a.value()));
    CHECK(support::same_bits(to_host(there.b.value()).view(), here.b.value()));
    // W - c B^T A: seven terms, and the roundings of c and of its product.
    const matrix<float, cpu> now = to_host(base_on.value());
    const double factor = expert.scale() / 3.0;
    bool right = true;
    for (index o = 0; o < 9; ++o) {
      for (index d = 0; d < 12; ++d) {
        double sum = static_cast<double>(w(o, d)), magnitude = std::abs(sum);
        for (index k = 0; k < 6; ++k) {
          const double term = factor * static_cast<double>(here.b.value()(k, o)) *
                              static_cast<double>(here.a.value()(k, d));
          sum -= term;
          magnitude += std::abs(term);
        }
        const double bound = support::sum_bound<float>(7 + 2, magnitude);
        right = right && support::within(static_cast<double>(now(o, d)), sum, bound) &&
                support::within(static_cast<double>(base.value()(o, d)), sum, bound);
      }
    }
    CHECK(right);
  }
}

}  // namespace talpa::cuda_svd_test
