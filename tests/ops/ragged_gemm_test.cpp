// SPDX-License-Identifier: Apache-2.0
#include "support/cpu_products.hpp"
#include "support/random.hpp"
#include "support/scalars.hpp"
#include "support/tolerance.hpp"

#include <talpa/cpu/ragged_gemm.hpp>
#include <talpa/testing/bounds.hpp>

#include <doctest/doctest.h>

#include <cmath>
#include <span>
#include <vector>

namespace talpa::ragged_gemm_test {

namespace {

/// Four groups: many slots, one, none, and some; blocks of 3, 1, 4 and 2 rows.
struct layout {
  std::vector<index> offsets{0, 700, 701, 701, 760}, blocks{0, 3, 4, 8, 10};
  static constexpr index slots = 760, most = 4, rows = 10, cols = 23;

  vector_view<const index, cpu> of_slots() const {
    return {offsets.data(), static_cast<index>(offsets.size())};
  }
  vector_view<const index, cpu> of_bank() const {
    return {blocks.data(), static_cast<index>(blocks.size())};
  }
  index ranks(std::size_t e) const { return blocks[e + 1] - blocks[e]; }
};

}  // namespace

TEST_SUITE("ops/ragged_gemm") {
  TEST_CASE_TEMPLATE("each slot meets the block of its group, and nothing beyond it", T,
                     TALPA_SCALARS) {
    const layout l;
    support::test_random random(3);
    const matrix<T, cpu> bank = support::random_matrix<T>(random, l.rows, l.cols);
    const matrix<T, cpu> x = support::random_matrix<T>(random, l.slots, l.cols);
    const matrix<T, cpu> z = support::random_matrix<T>(random, l.slots, l.most);
    for (const int threads : {1, 3}) {
      context<cpu> ctx(threads);
      matrix<T, cpu> u(l.slots, l.most), y(l.slots, l.cols), dbank(l.rows, l.cols);
      for (auto* m : {&u, &y}) {
        for (index i = 0; i < m->size(); ++i) m->data()[i] = T{1};
      }
      ops::ragged_gemm(ctx, l.of_slots(), l.of_bank(), x, bank, transpose::yes, u.view());
      ops::ragged_gemm(ctx, l.of_slots(), l.of_bank(), z, bank, transpose::no, y.view(),
                       grad_mode::accumulate);
      const row_run all{0, l.rows, 0};
      ops::ragged_gemm_gradient(ctx, l.of_slots(), l.of_bank(), z, x,
                                std::span<const row_run>(&all, 1), dbank.view());
      for (std::size_t e = 0; e < 4; ++e) {
        for (index s = l.offsets[e]; s < l.offsets[e + 1]; ++s) {
          for (index r = 0; r < l.most; ++r) {
            if (r >= l.ranks(e)) {
              CHECK(u(s, r) == T{1});
              continue;
            }
            double sum = 0.0, size = 0.0;
            for (index d = 0; d < l.cols; ++d) {
              const double term = double(x(s, d)) * double(bank(l.blocks[e] + r, d));
              sum += term;
              size += std::abs(term);
            }
            CHECK(std::abs(double(u(s, r)) - sum) <= testing::gamma<T>(l.cols + 1.0) * size);
          }
          for (index d = 0; d < l.cols; ++d) {
            double sum = 1.0, size = 1.0;
            for (index r = 0; r < l.ranks(e); ++r) {
              const double term = double(z(s, r)) * double(bank(l.blocks[e] + r, d));
              sum += term;
              size += std::abs(term);
            }
            CHECK(std::abs(double(y(s, d)) - sum) <= testing::gamma<T>(l.most + 2.0) * size);
          }
        }
        for (index r = 0; r < l.ranks(e); ++r) {
          for (index d = 0; d < l.cols; ++d) {
            double sum = 0.0, size = 0.0;
            for (index s = l.offsets[e]; s < l.offsets[e + 1]; ++s) {
              sum += double(z(s, r)) * double(x(s, d));
              size += std::abs(double(z(s, r)) * double(x(s, d)));
            }
            CHECK(std::abs(double(dbank(l.blocks[e] + r, d)) - sum) <=
                  testing::gamma<T>(l.slots + 1.0) * size);
          }
        }
      }
      // Rows 1, 2 of the first block and the whole last one, one behind the other.
      const row_run some[] = {{1, 2, 0}, {8, 2, 2}};
      matrix<T, cpu> part(4, l.cols);
      ops::ragged_gemm_gradient(ctx, l.of_slots(), l.of_bank(), z, x,
                                std::span<const row_run>(some), part.view());
      CHECK(testing::first_difference<T>(part.view().row_range(2, 2),
                                         dbank.view().row_range(8, 2)) == "");
      CHECK(testing::first_excess(part.view().row_range(0, 2), dbank.view().row_range(1, 2),
                                  [&](index, index) {
                                    // Two sums of 700 products of numbers of at most one.
                                    return 2.0 * testing::gamma<T>(701.0) * 700.0 *
                                           testing::largest(z.view()) * testing::largest(x.view());
                                  }) == "");
    }
  }

  TEST_CASE("ragged_gemm names what does not fit") {
    const layout l;
    context<cpu> ctx(1);
    matrix<float, cpu> bank(l.rows, l.cols), a(l.slots, l.cols + 1), c(l.slots, l.most);
    CHECK_THROWS_WITH_AS(
        ops::ragged_gemm(ctx, l.of_slots(), l.of_bank(), a, bank, transpose::yes, c.view()),
        "talpa::ops::ragged_gemm: 'a' has shape [760, 24], expected [760, 23] = slots, inner size "
        "of the bank's blocks",
        shape_error);
    CHECK_THROWS_AS(ops::ragged_gemm(ctx, l.of_slots(), {l.blocks.data(), 4}, a, bank,
                                     transpose::yes, c.view()),
                    shape_error);
    CHECK_THROWS_AS(
        ops::ragged_gemm_gradient(ctx, l.of_slots(), l.of_bank(), c, a, {}, bank.view()),
        shape_error);
  }
}

}  // namespace talpa::ragged_gemm_test
