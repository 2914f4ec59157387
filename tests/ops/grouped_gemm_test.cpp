// SPDX-License-Identifier: Apache-2.0
#include "support/cpu_products.hpp"
#include "support/padded.hpp"
#include "support/random.hpp"
#include "support/scalars.hpp"
#include "support/tolerance.hpp"

#include <talpa/core/transfer.hpp>
#include <talpa/cpu/gemm.hpp>
#include <talpa/cpu/grouped_gemm.hpp>
#include <talpa/cpu/streamed_tile.hpp>
#include <talpa/ops/gemm.hpp>
#include <talpa/ops/grouped_gemm.hpp>
#include <talpa/testing/bounds.hpp>

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <string>
#include <utility>
#include <vector>

namespace talpa::grouped_gemm_test {

namespace {

using support::table;

/// Offsets of groups of the given sizes.
vector<index, cpu> offsets_of(const std::vector<index>& sizes) {
  vector<index, cpu> offsets(static_cast<index>(sizes.size()) + 1);
  for (std::size_t e = 0; e < sizes.size(); ++e) {
    offsets[static_cast<index>(e) + 1] = offsets[static_cast<index>(e)] + sizes[e];
  }
  return offsets;
}

/// c_s = a_s op(block of its group), and the sums of absolute terms.
struct slow_product {
  table value, magnitude;
};
slow_product slow_grouped(const vector<index, cpu>& offsets, const table& a, const table& bank,
                          index rows, transpose tb) {
  const index outer = tb == transpose::yes ? rows : bank.cols;
  const index inner = tb == transpose::yes ? bank.cols : rows;
  slow_product p{table(a.rows, outer), table(a.rows, outer)};
  for (index e = 0; e + 1 < offsets.size(); ++e) {
    for (index s = offsets[e]; s < offsets[e + 1]; ++s) {
      for (index o = 0; o < outer; ++o) {
        for (index i = 0; i < inner; ++i) {
          const double factor =
              tb == transpose::yes ? bank(e * rows + o, i) : bank(e * rows + i, o);
          p.value(s, o) += a(s, i) * factor;
          p.magnitude(s, o) += std::abs(a(s, i) * factor);
        }
      }
    }
  }
  return p;
}

/// Sizes of groups: some empty, one long enough for two tasks.
const std::vector<std::vector<index>> layouts = {
    {5}, {0, 3, 0, 0, 4, 1}, {0, 0, 7}, {2, 0}, {300, 0, 17}, {1, 1, 1, 1}, {0, 513},
};

/// Sizes of five groups: of few slots, of panels full and not, of one chunk, of several, and of so
/// many that other loops take them.
const std::vector<std::vector<index>> sizes_of_large = {
    {1, 0, 3, 8, 9},      {16, 17, 31, 5, 0}, {48, 49, 2, 100, 33},
    {300, 0, 20, 400, 1}, {0, 0, 530, 0, 0},
};

/// Adds what a result held before.
template <class T>
void add_before(slow_product& p, const matrix<T, cpu>& before) {
  for (index i = 0; i < before.rows(); ++i) {
    for (index j = 0; j < before.cols(); ++j) {
      p.value(i, j) += static_cast<double>(before(i, j));
      p.magnitude(i, j) += std::abs(static_cast<double>(before(i, j)));
    }
  }
}

/// Slots [first, end) hold what they held.
template <class T>
void keep_before(slow_product& p, const matrix<T, cpu>& before, index first, index end) {
  for (index s = first; s < end; ++s) {
    for (index j = 0; j < before.cols(); ++j) {
      p.value(s, j) = static_cast<double>(before(s, j));
      p.magnitude(s, j) = 0.0;
    }
  }
}

/// Where streamed_tile, its left side as rows or packed, and register_tile differ.
template <class T, index Bytes, index Registers>
std::string streamed_tile_difference(support::test_random& random) {
  using packed_tile = detail::register_tile<T, Bytes, Registers>;
  constexpr index rows = packed_tile::rows, panels = packed_tile::panels;
  constexpr index cols = packed_tile::cols, width = detail::panel_width<T>;
  using tile = detail::streamed_tile<T, panels, rows, Bytes>;
  const index depth = 37;
  const matrix<T, cpu> a = support::random_matrix<T>(random, rows, depth);
  const matrix<T, cpu> b = support::random_matrix<T>(random, panels * depth, width);
  const matrix<T, cpu> before = support::random_matrix<T>(random, rows, cols);
  matrix<T, cpu> turned(depth, rows);
  for (index i = 0; i < rows; ++i) {
    for (index k = 0; k < depth; ++k) turned(k, i) = a(i, k);
  }
  const T* right[panels];
  for (index p = 0; p < panels; ++p) right[p] = b.data() + p * depth * width;
  for (const bool add : {false, true}) {
    matrix<T, cpu> expected = detail::copy_of(before.view()),
                   by_rows = detail::copy_of(before.view()),
                   by_cols = detail::copy_of(before.view());
    packed_tile::run(depth, turned.data(), right, T{1}, add ? T{1} : T{0}, expected.data(), cols);
    tile::template run<true>(depth, a.data(), depth, b.data(), add, by_rows.data(), cols, {});
    tile::template run<false>(depth, turned.data(), 0, b.data(), add, by_cols.data(), cols, {});
    const std::string found =
        testing::first_difference(by_rows, expected) + testing::first_difference(by_cols, expected);
    if (!found.empty()) return found;
  }
  return "";
}

}  // namespace

TEST_SUITE("ops/grouped_gemm") {
  TEST_CASE("two groups, by hand") {
    // Blocks [1 2] and [3 4]; slots 0 and 1 belong to group 0, slot 2 to group 1.
    context<cpu> ctx(1);
    const vector<index, cpu> offsets = offsets_of({2, 1});
    matrix<float, cpu> bank(2, 2), a(3, 2), c(3, 1), wide(3, 2), ones(3, 1), dbank(2, 2);
    for (index i = 0; i < 4; ++i) bank.data()[i] = static_cast<float>(i + 1);
    for (index i = 0; i < 6; ++i) a.data()[i] = static_cast<float>(i + 1);
    ops::grouped_gemm(ctx, offsets, a, bank, transpose::yes, c.view());
    CHECK(c(0, 0) == 5.0f);   // 1 1 + 2 2
    CHECK(c(1, 0) == 11.0f);  // 3 1 + 4 2
    CHECK(c(2, 0) == 39.0f);  // 5 3 + 6 4
    ops::grouped_gemm(ctx, offsets, a, bank, transpose::yes, c.view(), grad_mode::accumulate);
    CHECK(c(0, 0) == 10.0f);
    CHECK(c(2, 0) == 78.0f);
    ops::grouped_gemm(ctx, offsets, a, bank, transpose::yes, c.view(), grad_mode::ignore);
    CHECK(c(2, 0) == 78.0f);
    ops::grouped_gemm(ctx, offsets, a, bank, transpose::yes, c.view());
    CHECK(c(2, 0) == 39.0f);
    for (index s = 0; s < 3; ++s) ones(s, 0) = static_cast<float>(s + 1);
    ops::grouped_gemm(ctx, offsets, ones, bank, transpose::no, wide.view());
    CHECK(wide(1, 0) == 2.0f);
    CHECK(wide(1, 1) == 4.0f);
    CHECK(wide(2, 0) == 9.0f);
    CHECK(wide(2, 1) == 12.0f);
    // dbank_0 = 1 a_0 + 2 a_1, dbank_1 = 3 a_2, added to what is there.
    for (index i = 0; i < 4; ++i) dbank.data()[i] = 100.0f;
    const row_run all{0, 2, 0};
    ops::grouped_gemm_gradient(ctx, offsets, ones, a, {&all, 1}, dbank.view());
    CHECK(dbank(0, 0) == 107.0f);
    CHECK(dbank(0, 1) == 110.0f);
    CHECK(dbank(1, 0) == 115.0f);
    CHECK(dbank(1, 1) == 118.0f);
  }

  TEST_CASE_TEMPLATE("grouped_gemm agrees with plain loops over random strided shapes", T,
                     TALPA_SCALARS) {
    support::test_random random(31);
    for (const auto& layout : layouts) {
      const vector<index, cpu> offsets = offsets_of(layout);
      const auto groups = static_cast<index>(layout.size());
      const index slots = offsets[groups];
      for (const transpose tb : {transpose::no, transpose::yes}) {
        const index rows = 1 + random.below(9), cols = 2 + random.below(40);
        const index inner = tb == transpose::yes ? cols : rows;
        const index outer = tb == transpose::yes ? rows : cols;
        CAPTURE(slots);
        CAPTURE(rows);
        CAPTURE(cols);
        support::padded<T> bank(support::random_matrix<T>(random, groups * rows, cols));
        support::padded<T> a(support::random_matrix<T>(random, slots, inner));
        support::padded<T> c(slots, outer);
        context<cpu> ctx(2);
        ops::grouped_gemm(ctx, offsets, a.view(), bank.view(), tb, c.view());
        const auto expected = slow_grouped(offsets, support::to_table(a.view()),
                                           support::to_table(bank.view()), rows, tb);
        const table bounds = support::each(
            expected.magnitude, [&](double m) { return support::sum_bound<T>(inner, m); });
        CHECK(support::difference(c.view(), expected.value, bounds) == "");
        CHECK(a.intact());
        CHECK(bank.intact());
        CHECK(c.intact());
      }
    }
  }

  TEST_CASE_TEMPLATE("the gradient adds up the slots of each trained group", T, TALPA_SCALARS) {
    support::test_random random(32);
    for (const auto& layout : layouts) {
      const vector<index, cpu> offsets = offsets_of(layout);
      const auto groups = static_cast<index>(layout.size());
      const index slots = offsets[groups], rows = 1 + random.below(6), cols = 2 + random.below(30);
      CAPTURE(slots);
      support::padded<T> a(support::random_matrix<T>(random, slots, rows));
      support::padded<T> b(support::random_matrix<T>(random, slots, cols));
      // All groups, then every second one: their gradients lie one behind the other.
      for (const index step : {1, 2}) {
        std::vector<row_run> runs;
        for (index e = 0; e < groups; e += step) {
          runs.push_back({e * rows, rows, e / step * rows});
        }
        if (step == 1) runs = {{0, groups * rows, 0}};
        const index trained = (groups + step - 1) / step * rows;
        const matrix<T, cpu> before = support::random_matrix<T>(random, trained, cols);
        support::padded<T> dbank(before);
        context<cpu> ctx(3);
        ops::grouped_gemm_gradient(ctx, offsets, a.view(), b.view(), runs, dbank.view());
        table expected = support::to_table(before.view());
        table bounds = support::absolute(expected);
        for (index e = 0; e < groups; e += step) {
          for (index r = 0; r < rows; ++r) {
            for (index c = 0; c < cols; ++c) {
              for (index s = offsets[e]; s < offsets[e + 1]; ++s) {
                const double term =
                    static_cast<double>(a.view()(s, r)) * static_cast<double>(b.view()(s, c));
                expected(e / step * rows + r, c) += term;
                bounds(e / step * rows + r, c) += std::abs(term);
              }
            }
          }
        }
        const index longest = *std::max_element(layout.begin(), layout.end());
        bounds =
            support::each(bounds, [&](double m) { return support::sum_bound<T>(longest + 1, m); });
        CHECK(support::difference(dbank.view(), expected, bounds) == "");
        CHECK(dbank.intact());
      }
    }
  }

  TEST_CASE_TEMPLATE("any number of threads gives the same bits", T, TALPA_SCALARS) {
    support::test_random random(33);
    struct load {
      index rows, cols;
      std::vector<index> sizes;
    };
    // A narrow bank, and large ones that stream.
    for (const load& of : {load{8, 700, {300, 0, 41, 600, 7}}, load{260, 256, sizes_of_large[2]},
                           load{260, 256, sizes_of_large[3]}}) {
      const index rows = of.rows, cols = of.cols;
      const vector<index, cpu> offsets = offsets_of(of.sizes);
      const index slots = offsets[5];
      const matrix<T, cpu> bank = support::random_matrix<T>(random, 5 * rows, cols);
      const matrix<T, cpu> a = support::random_matrix<T>(random, slots, cols);
      const matrix<T, cpu> z = support::random_matrix<T>(random, slots, rows);
      const row_run all{0, 5 * rows, 0};
      const auto run = [&](int threads, matrix<T, cpu>& u, matrix<T, cpu>& y, matrix<T, cpu>& d) {
        context<cpu> ctx(threads);
        ops::grouped_gemm(ctx, offsets, a, bank, transpose::yes, u.view());
        ops::grouped_gemm(ctx, offsets, z, bank, transpose::no, y.view());
        ops::grouped_gemm_gradient(ctx, offsets, z, a, {&all, 1}, d.view());
      };
      matrix<T, cpu> u(slots, rows), y(slots, cols), d(5 * rows, cols);
      run(1, u, y, d);
      for (const int threads : {2, 3}) {
        matrix<T, cpu> u2(slots, rows), y2(slots, cols), d2(5 * rows, cols);
        run(threads, u2, y2, d2);
        CHECK(testing::first_difference(u2, u) == "");
        CHECK(testing::first_difference(y2, y) == "");
        CHECK(testing::first_difference(d2, d) == "");
      }
    }
  }

  TEST_CASE_TEMPLATE("groups of narrow banks have the bits of gemm", T, TALPA_SCALARS) {
    support::test_random random(34);
    const std::vector<index> sizes = {300, 0, 20, 260};
    const vector<index, cpu> offsets = offsets_of(sizes);
    const index slots = offsets[4], rows = 48, cols = 96;
    CHECK(detail::tiles_pay(sizes[3], rows, cols));
    CHECK(!detail::streaming_pays(rows, cols));
    const matrix<T, cpu> bank = support::random_matrix<T>(random, 4 * rows, cols);
    const matrix<T, cpu> a = support::random_matrix<T>(random, slots, cols);
    const matrix<T, cpu> z = support::random_matrix<T>(random, slots, rows);
    for (const grad_mode mode : {grad_mode::overwrite, grad_mode::accumulate}) {
      const T kept = mode == grad_mode::accumulate ? T{1} : T{0};
      support::padded<T> u(z), y(a), u2(z), y2(a);
      context<cpu> one(1), several(3);
      for (index e = 0; e < 4; ++e) {
        const index first = offsets[e], count = sizes[static_cast<std::size_t>(e)];
        const auto block = bank.view().row_range(e * rows, rows);
        ops::gemm(one, T{1}, a.view().row_range(first, count), transpose::no, block, transpose::yes,
                  kept, u.view().row_range(first, count));
        ops::gemm(one, T{1}, z.view().row_range(first, count), transpose::no, block, transpose::no,
                  kept, y.view().row_range(first, count));
      }
      ops::grouped_gemm(several, offsets, a, bank, transpose::yes, u2.view(), mode);
      ops::grouped_gemm(several, offsets, z, bank, transpose::no, y2.view(), mode);
      CHECK(testing::first_difference<T>(u2.view(), u.view()) == "");
      CHECK(testing::first_difference<T>(y2.view(), y.view()) == "");
      CHECK((u2.intact() && y2.intact()));
    }
  }

  TEST_CASE_TEMPLATE("banks that stream agree with plain loops, whatever the groups have", T,
                     TALPA_SCALARS) {
    support::test_random random(36);
    for (const auto& [bank_rows, bank_cols] :
         {std::pair<index, index>{64, 64}, {129, 75}, {67, 1100}}) {
      const index rows = bank_rows, cols = bank_cols;  // lambdas take them
      support::padded<T> bank(support::random_matrix<T>(random, 5 * rows, cols));
      for (const auto& layout : sizes_of_large) {
        const vector<index, cpu> offsets = offsets_of(layout);
        const index slots = offsets[5];
        // Long rows, for which slots are cut as everywhere, meet few of them.
        if (slots > (cols > 1000 ? 100 : cols > 64 ? 300 : slots)) continue;
        CAPTURE(rows);
        CAPTURE(cols);
        CAPTURE(slots);
        for (const transpose tb : {transpose::no, transpose::yes}) {
          const index inner = tb == transpose::yes ? cols : rows;
          const index outer = tb == transpose::yes ? rows : cols;
          support::padded<T> a(support::random_matrix<T>(random, slots, inner));
          const matrix<T, cpu> before = support::random_matrix<T>(random, slots, outer);
          const slow_product product = slow_grouped(offsets, support::to_table(a.view()),
                                                    support::to_table(bank.view()), rows, tb);
          for (const bool add : {false, true}) {
            support::padded<T> c(before);
            context<cpu> ctx(2);
            detail::streamed_product<T>(ctx, offsets.view(), a.view(), bank.view(), rows, tb,
                                        c.view(), add);
            slow_product expected = product;
            if (add) add_before(expected, before);
            for (index e = 0; e < 5; ++e) {
              if (offsets[e + 1] - offsets[e] <= detail::most_streamed(tb)) continue;
              keep_before(expected, before, offsets[e], offsets[e + 1]);
            }
            const table bounds = support::each(
                expected.magnitude, [&](double m) { return support::sum_bound<T>(inner + 1, m); });
            CHECK(support::difference(c.view(), expected.value, bounds) == "");
            CHECK((a.intact() && bank.intact() && c.intact()));
          }
        }
      }
    }
  }

  TEST_CASE_TEMPLATE("gradients that stream, whatever the groups have", T, TALPA_SCALARS) {
    support::test_random random(37);
    for (const auto& [bank_rows, bank_cols] :
         {std::pair<index, index>{64, 64}, {129, 75}, {67, 300}}) {
      const index rows = bank_rows, cols = bank_cols;
      for (const auto& layout : sizes_of_large) {
        const vector<index, cpu> offsets = offsets_of(layout);
        const index slots = offsets[5];
        CAPTURE(rows);
        CAPTURE(cols);
        CAPTURE(slots);
        support::padded<T> a(support::random_matrix<T>(random, slots, rows));
        support::padded<T> b(support::random_matrix<T>(random, slots, cols));
        const matrix<T, cpu> before = support::random_matrix<T>(random, 3 * rows, cols);
        // Groups 1 to 3, whose gradients lie at the beginning.
        support::padded<T> dbank(before);
        context<cpu> ctx(2);
        detail::streamed_gradient<T>(ctx, offsets.view(), a.view(), b.view(), {rows, 3 * rows, 0},
                                     dbank.view());
        slow_product expected{table(3 * rows, cols), table(3 * rows, cols)};
        index longest = 0;
        for (index e = 1; e < 4; ++e) {
          const index count = offsets[e + 1] - offsets[e];
          if (count > detail::most_streamed_gradient) continue;
          longest = std::max(longest, count);
          for (index s = offsets[e]; s < offsets[e + 1]; ++s) {
            for (index r = 0; r < rows; ++r) {
              for (index c = 0; c < cols; ++c) {
                const double term =
                    static_cast<double>(a.view()(s, r)) * static_cast<double>(b.view()(s, c));
                expected.value((e - 1) * rows + r, c) += term;
                expected.magnitude((e - 1) * rows + r, c) += std::abs(term);
              }
            }
          }
        }
        add_before(expected, before);
        const table bounds = support::each(
            expected.magnitude, [&](double m) { return support::sum_bound<T>(longest + 1, m); });
        CHECK(support::difference(dbank.view(), expected.value, bounds) == "");
        CHECK((a.intact() && b.intact() && dbank.intact()));
      }
    }
  }

  TEST_CASE_TEMPLATE("every group of a large bank gets its product and its gradient", T,
                     TALPA_SCALARS) {
    support::test_random random(40);
    const index rows = 260, cols = 256;
    CHECK(detail::streaming_pays(rows, cols));
    // Of those each loop takes some: few, some, more than stream in one of them and in all.
    for (const auto& layout : std::vector<std::vector<index>>{{3, 0, 60}, {300, 2, 390}}) {
      const vector<index, cpu> offsets = offsets_of(layout);
      const index slots = offsets[3];
      const matrix<T, cpu> bank = support::random_matrix<T>(random, 3 * rows, cols);
      const matrix<T, cpu> x = support::random_matrix<T>(random, slots, cols);
      const matrix<T, cpu> z = support::random_matrix<T>(random, slots, rows);
      matrix<T, cpu> u(slots, rows), y(slots, cols), d(3 * rows, cols);
      matrix<T, cpu> u2(slots, rows), y2(slots, cols), d2(3 * rows, cols);
      context<cpu> ctx(2);
      const row_run all{0, 3 * rows, 0};
      ops::grouped_gemm(ctx, offsets, x, bank, transpose::yes, u.view());
      ops::grouped_gemm(ctx, offsets, z, bank, transpose::no, y.view());
      ops::grouped_gemm_gradient(ctx, offsets, z, x, {&all, 1}, d.view());
      for (index e = 0; e < 3; ++e) {
        const auto of = [&](const matrix<T, cpu>& m) {
          return m.view().row_range(offsets[e], offsets[e + 1] - offsets[e]);
        };
        const auto block = bank.view().row_range(e * rows, rows);
        ops::gemm(ctx, T{1}, of(x), transpose::no, block, transpose::yes, T{0},
                  u2.view().row_range(offsets[e], of(x).rows));
        ops::gemm(ctx, T{1}, of(z), transpose::no, block, transpose::no, T{0},
                  y2.view().row_range(offsets[e], of(x).rows));
        if (of(x).rows == 0) continue;
        ops::gemm(ctx, T{1}, of(z), transpose::yes, of(x), transpose::no, T{0},
                  d2.view().row_range(e * rows, rows));
      }
      // Elements lie in +-4; each of two sums is off by at most its bound.
      const auto close = [](const matrix<T, cpu>& a, const matrix<T, cpu>& b, index terms) {
        const double bound = 2.0 * support::sum_bound<T>(terms, 16.0 * static_cast<double>(terms));
        for (index i = 0; i < a.size(); ++i) {
          if (!(std::abs(static_cast<double>(a.data()[i] - b.data()[i])) <= bound)) return false;
        }
        return true;
      };
      CHECK(close(u, u2, cols));
      CHECK(close(y, y2, rows));
      CHECK(close(d, d2, slots));
    }
  }

  TEST_CASE("a tile that streams has the bits of a packed one, for every width of a register") {
    support::test_random random(39);
    CHECK(streamed_tile_difference<float, 16, 16>(random) == "");
    CHECK(streamed_tile_difference<float, 32, 16>(random) == "");
    CHECK(streamed_tile_difference<float, 64, 32>(random) == "");
    CHECK(streamed_tile_difference<double, 32, 16>(random) == "");
    CHECK(streamed_tile_difference<double, 64, 32>(random) == "");
  }

  TEST_CASE("groups that grow take no further scratch") {
    support::test_random random(35);
    for (const index rows : {40, 128}) {  // the second streams
      const index cols = 700, slots = 480;
      const matrix<float, cpu> bank = support::random_matrix<float>(random, 4 * rows, cols);
      const matrix<float, cpu> a = support::random_matrix<float>(random, slots, cols);
      matrix<float, cpu> z(slots, rows), y(slots, cols), d(4 * rows, cols);
      const row_run all{0, 4 * rows, 0};
      context<cpu> ctx(3);
      index blocks = 0;
      for (const auto& sizes : std::vector<std::vector<index>>{
               {120, 120, 120, 120}, {260, 220, 0, 0}, {480, 0, 0, 0}, {1, 2, 3, 4}}) {
        const vector<index, cpu> offsets = offsets_of(sizes);
        ops::grouped_gemm(ctx, offsets, a, bank, transpose::yes, z.view());
        ops::grouped_gemm(ctx, offsets, z, bank, transpose::no, y.view());
        ops::grouped_gemm_gradient(ctx, offsets, z, a, {&all, 1}, d.view());
        if (blocks == 0) blocks = ctx.scratch.allocations();
        CHECK(ctx.scratch.allocations() == blocks);
        CHECK(ctx.scratch.used() == 0);
      }
    }
  }

  TEST_CASE("no slots at all is legal, and the gradient stays as it was") {
    context<cpu> ctx(2);
    const vector<index, cpu> offsets = offsets_of({0, 0, 0});
    const matrix<float, cpu> bank(6, 4), a(0, 4), z(0, 2);
    matrix<float, cpu> u(0, 2), dbank(6, 4);
    for (index i = 0; i < dbank.size(); ++i) dbank.data()[i] = 2.0f;
    const row_run all{0, 6, 0};
    CHECK_NOTHROW(ops::grouped_gemm(ctx, offsets, a, bank, transpose::yes, u.view()));
    CHECK_NOTHROW(ops::grouped_gemm_gradient(ctx, offsets, z, a, {&all, 1}, dbank.view()));
    for (index i = 0; i < dbank.size(); ++i) CHECK(dbank.data()[i] == 2.0f);
  }

  TEST_CASE("what a slot held before is overwritten, NaN included") {
    context<cpu> ctx(1);
    const vector<index, cpu> offsets = offsets_of({1, 2});
    const matrix<double, cpu> bank(4, 3), a(3, 3);
    matrix<double, cpu> c(3, 2);
    for (index i = 0; i < c.size(); ++i) c.data()[i] = std::numeric_limits<double>::quiet_NaN();
    ops::grouped_gemm(ctx, offsets, a, bank, transpose::yes, c.view());
    for (index i = 0; i < c.size(); ++i) CHECK(c.data()[i] == 0.0);
  }

  TEST_CASE("shapes that do not fit are refused") {
    context<cpu> ctx(1);
    const vector<index, cpu> offsets = offsets_of({1, 2});
    const matrix<float, cpu> bank(4, 3), odd(5, 3), a(3, 3), z(3, 2);
    matrix<float, cpu> c(3, 2);
    CHECK_THROWS_WITH_AS(ops::grouped_gemm(ctx, offsets, a, odd, transpose::yes, c.view()),
                         "talpa::ops::grouped_gemm: 'bank' has shape [5, 3], expected [P * 2, Q] = "
                         "rows of all groups",
                         shape_error);
    CHECK_THROWS_WITH_AS(ops::grouped_gemm(ctx, offsets, z, bank, transpose::yes, c.view()),
                         "talpa::ops::grouped_gemm: 'a' has shape [3, 2], expected [3, 3] = slots, "
                         "inner size of the bank's blocks",
                         shape_error);
    CHECK_THROWS_WITH_AS(ops::grouped_gemm(ctx, offsets, z, bank, transpose::no, c.view()),
                         "talpa::ops::grouped_gemm: 'c' has shape [3, 2], expected [3, 3] = slots, "
                         "outer size of the bank's blocks",
                         shape_error);
    matrix<float, cpu> dbank(4, 2);
    const row_run all{0, 4, 0};
    CHECK_THROWS_WITH_AS(ops::grouped_gemm_gradient(ctx, offsets, z, a, {&all, 1}, dbank.view()),
                         "talpa::ops::grouped_gemm_gradient: 'b' has shape [3, 3], expected [3, 2] "
                         "= slots of a, columns of dbank",
                         shape_error);
  }
}

}  // namespace talpa::grouped_gemm_test
