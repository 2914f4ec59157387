// SPDX-License-Identifier: Apache-2.0
#include "support/padded.hpp"
#include "support/random.hpp"
#include "support/refused.hpp"
#include "support/sanitized.hpp"
#include "support/scalars.hpp"
#include "support/tolerance.hpp"

#include <talpa/cpu/packed_gemm.hpp>
#include <talpa/testing/bounds.hpp>

#include <doctest/doctest.h>

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <limits>
#include <span>
#include <string>
#include <vector>

namespace talpa::packed_gemm_test {

using namespace support;

namespace {

constexpr transpose both[] = {transpose::no, transpose::yes};

/// [rows, cols], or [cols, rows] to be read transposed.
template <class T>
padded<T> operand(test_random& random, index rows, index cols, transpose t) {
  return padded<T>(t == transpose::no ? random_matrix<T>(random, rows, cols)
                                      : random_matrix<T>(random, cols, rows));
}

/// alpha op(a) op(b) + beta c in double against a computed c, each element within the bound of its
/// sum of absolute terms: K multiply-adds, the factors alpha and beta, and the addition of at most
/// K parts, which are fewer than the terms that they replace.
template <class T>
std::string against_loops(double alpha, matrix_view<const T, cpu> a, transpose ta,
                          matrix_view<const T, cpu> b, transpose tb, double beta,
                          const matrix<T, cpu>& before, matrix_view<const T, cpu> c) {
  const index k = detail::cols_of(a, ta);
  for (index i = 0; i < c.rows; ++i) {
    for (index j = 0; j < c.cols; ++j) {
      double sum = 0.0, magnitude = 0.0;
      for (index l = 0; l < k; ++l) {
        const double left = static_cast<double>(ta == transpose::no ? a(i, l) : a(l, i));
        const double right = static_cast<double>(tb == transpose::no ? b(l, j) : b(j, l));
        sum += left * right;
        magnitude += std::abs(left * right);
      }
      const double kept = beta == 0.0 ? 0.0 : beta * static_cast<double>(before(i, j));
      const double bound = sum_bound<T>(k + 3, std::abs(alpha) * magnitude + std::abs(kept));
      if (!within(static_cast<double>(c(i, j)), alpha * sum + kept, bound)) {
        return detail::concat("element ", detail::shape_text(i, j));
      }
    }
  }
  return "";
}

template <class T>
void compare(index m, index n, index k, T alpha, T beta, test_random& random, int threads) {
  CAPTURE(m);
  CAPTURE(n);
  CAPTURE(k);
  context<cpu> ctx(threads);
  for (const transpose ta : both) {
    for (const transpose tb : both) {
      auto a = operand<T>(random, m, k, ta), b = operand<T>(random, k, n, tb);
      matrix<T, cpu> before = random_matrix<T>(random, m, n);
      if (beta == T{0}) {
        for (index i = 0; i < before.size(); ++i) {
          before.data()[i] = std::numeric_limits<T>::quiet_NaN();
        }
      }
      padded<T> c(before), d(before);
      const packed_matrix<T, cpu> packed(ctx, b.view(), tb);
      ops::gemm(ctx, alpha, a.view(), ta, packed, beta, c.view());
      CHECK(against_loops<T>(static_cast<double>(alpha), a.view(), ta, b.view(), tb,
                             static_cast<double>(beta), before, c.view()) == "");
      CHECK(a.intact());
      CHECK(b.intact());
      CHECK(c.intact());
      if (m > 0 && n > 0 && k > 0) {
        detail::tiled_product<T>(ctx, alpha, a.view(), ta, b.view(), tb, beta, d.view());
        CHECK(testing::first_difference<T>(d.view(), c.view()) == "");
      }
    }
  }
}

/// One tile by registers of another width.
template <class T, index Bytes, index Registers>
matrix<T, cpu> tile_of(index depth, const matrix<T, cpu>& a, const matrix<T, cpu>& b) {
  using tile = detail::register_tile<T, Bytes, Registers>;
  constexpr index width = detail::panel_width<T>;
  context<cpu> ctx(1);
  const packed_matrix<T, cpu> packed(ctx, b, transpose::no);
  matrix<T, cpu> block(depth, tile::rows), c(tile::rows, tile::cols);
  detail::pack_panel<tile::rows, T>(a, true, 0, tile::rows, 0, depth, block.data());
  const T* const first = reinterpret_cast<const T*>(packed.memory().data());
  const T* panels[tile::panels];
  for (index p = 0; p < tile::panels; ++p) panels[p] = first + p * depth * width;
  tile::run(depth, block.data(), panels, T{1}, T{0}, c.data(), tile::cols);
  return c;
}

}  // namespace

TEST_SUITE("ops/packed_gemm") {
  TEST_CASE("a product with a packed matrix, by hand") {
    context<cpu> ctx(1);
    // a = [[1, 2], [3, 4]], b = [[5, 6], [7, 8]].
    matrix<float, cpu> a(2, 2), b(2, 2), c(2, 2);
    for (index i = 0; i < 4; ++i) {
      a.data()[i] = static_cast<float>(1 + i);
      b.data()[i] = static_cast<float>(5 + i);
    }
    const auto is = [&](float c00, float c01, float c10, float c11) {
      return c(0, 0) == c00 && c(0, 1) == c01 && c(1, 0) == c10 && c(1, 1) == c11;
    };
    const packed_matrix<float, cpu> plain(ctx, b, transpose::no), turned(ctx, b, transpose::yes);
    b(0, 0) = 100.0f;
    ops::gemm(ctx, a, transpose::no, plain, 0.0f, c.view());
    CHECK(is(19, 22, 43, 50));
    ops::gemm(ctx, a, transpose::yes, turned, 0.0f, c.view());
    CHECK(is(23, 31, 34, 46));
    ops::gemm(ctx, 2.0f, a, transpose::no, plain, -1.0f, c.view());
    CHECK(is(15, 13, 52, 54));
  }

  TEST_CASE_TEMPLATE("a packed product agrees with plain loops over random shapes", T,
                     TALPA_SCALARS) {
    test_random random(31);
    for (int i = 0; i < 30; ++i) {
      const T alpha = i % 4 == 0 ? T{1} : static_cast<T>(random.uniform(-2.0, 2.0));
      const T betas[] = {T{0}, T{1}, static_cast<T>(random.uniform(-2.0, 2.0))};
      compare<T>(1 + random.below(40), 1 + random.below(70), 1 + random.below(60), alpha,
                 betas[i % 3], random, 1 + i % 3);
    }
  }

  TEST_CASE_TEMPLATE("a packed product agrees with plain loops at the edges of tiles and tasks", T,
                     TALPA_SCALARS) {
    using tile = detail::register_tile<T>;
    test_random random(32);
    for (const index m : {index{0}, index{1}, tile::rows, tile::rows + 1}) {
      for (const index n : {index{0}, index{1}, tile::cols, tile::cols + 1, 2 * tile::cols}) {
        for (const index k : {index{0}, index{1}, index{17}}) {
          compare<T>(m, n, k, T{2}, m % 2 == 0 ? T{0} : T{3}, random, 2);
        }
      }
    }
    compare<T>(2 * detail::tile_task_rows + 5, 9, 3, T{1}, T{1}, random, 3);
    compare<T>(3, 5 * tile::cols + 9, 5, T{1}, T{0}, random, 3);
    compare<T>(7, 19, 2 * detail::tile_depth<T> + 3, T{-1}, T{0.5}, random, 2);
  }

  TEST_CASE_TEMPLATE("tasks make up a product, whatever the number of threads", T, TALPA_SCALARS) {
    using tile = detail::register_tile<T>;
    for (const index m : {index{0}, index{1}, tile::rows + 1, index{512}, index{4099}}) {
      for (const index n : {index{1}, tile::cols + 1, index{768}}) {
        for (const index threads : {1, 2, 3, 16, 200}) {
          CAPTURE(m);
          CAPTURE(n);
          CAPTURE(threads);
          const detail::tile_tasks_of<T, tile> cut(m, n, 5000, threads);
          CHECK(cut.depth <= detail::tile_depth<T>);
          CHECK(cut.first_row(0) == 0);
          CHECK(cut.first_row(cut.row_tasks) >= m);
          for (index task = 0; task < cut.row_tasks; ++task) {
            const index rows = cut.first_row(task + 1) - cut.first_row(task);
            CHECK(rows % tile::rows == 0);
            CHECK((rows > 0 || m == 0));
            CHECK(rows <= std::max<index>(tile::rows, detail::tile_task_rows));
            CHECK(rows * cut.depth <= cut.block_size());
          }
          CHECK((cut.col_tasks - 1) * cut.cols < n);
          CHECK(cut.col_tasks * cut.cols >= n);
          // With one thread nothing of a is packed twice.
          if (threads == 1) CHECK(cut.col_tasks == 1);
        }
      }
    }
    // Two threads have as much to do.
    const detail::tile_tasks_of<T, tile> two(512, 768, 768, 2);
    CHECK(two.row_tasks % 2 == 0);
    CHECK(two.col_tasks == 1);
  }

  TEST_CASE_TEMPLATE("pieces of a large right operand make up the whole", T, TALPA_SCALARS) {
    test_random random(33);
    const index k = detail::packed_depth + 10, n = detail::packed_cols + 7;
    // Small integers: sums are exact in any order.
    matrix<T, cpu> a(2, k), b(k, n), c(2, n), d(2, n);
    for (index i = 0; i < a.size(); ++i) a.data()[i] = static_cast<T>(random.below(5) - 2);
    for (index i = 0; i < b.size(); ++i) b.data()[i] = static_cast<T>(random.below(5) - 2);
    context<cpu> ctx(2);
    const packed_matrix<T, cpu> packed(ctx, b, transpose::no);
    ops::gemm(ctx, a, transpose::no, packed, T{0}, c.view());
    detail::tiled_product<T>(ctx, T{1}, a.view(), transpose::no, b.view(), transpose::no, T{0},
                             d.view());
    CHECK(testing::first_difference(d, c) == "");
    CHECK(against_loops<T>(1.0, a.view(), transpose::no, b.view(), transpose::no, 0.0, d,
                           d.view()) == "");
  }

  TEST_CASE("a weight stored as bfloat16 has the bits of the rounded weight") {
    test_random random(37);
    using tile = detail::register_tile<float>;
    struct shape {
      index m, n, k;
    };
    for (const shape& s :
         {shape{1, 1, 1}, shape{3, 17, 2}, shape{tile::rows + 1, tile::cols + 5, 7},
          shape{2 * detail::tile_task_rows + 3, 2 * tile::cols, 31},
          shape{2, 3, detail::tile_depth<float> + 5}}) {
      for (const transpose tb : both) {
        CAPTURE(s.m);
        CAPTURE(s.k);
        context<cpu> ctx(2);
        auto a = operand<float>(random, s.m, s.k, transpose::no);
        auto b = operand<float>(random, s.k, s.n, tb);
        const matrix<float, cpu> before = random_matrix<float>(random, s.m, s.n);
        const packed_matrix<float, cpu> packed(ctx, b.view(), tb, weight_storage::bfloat16);
        const matrix_view<float, cpu> rounded = b.view();
        for (index i = 0; i < rounded.rows; ++i) {
          for (index j = 0; j < rounded.cols; ++j) {
            rounded(i, j) = static_cast<float>(bfloat16(rounded(i, j)));
          }
        }
        const packed_matrix<float, cpu> exact(ctx, b.view(), tb);
        padded<float> c(before), expected(before);
        ops::gemm(ctx, -2.0f, a.view(), transpose::no, packed, 0.5f, c.view());
        ops::gemm(ctx, -2.0f, a.view(), transpose::no, exact, 0.5f, expected.view());
        CHECK(testing::first_difference<float>(c.view(), expected.view()) == "");
        CHECK(c.intact());
        CHECK(packed.rows() == s.k);
        CHECK(packed.cols() == s.n);
        CHECK(packed.storage() == weight_storage::bfloat16);
        if (s.k % 2 == 0) CHECK(2 * packed.bytes() == exact.bytes());
      }
    }
  }

  TEST_CASE("doubles are not stored as bfloat16") {
    context<cpu> ctx(1);
    const matrix<double, cpu> b(2, 2);
    CHECK_THROWS_WITH_AS(
        (packed_matrix<double, cpu>(ctx, b, transpose::no, weight_storage::bfloat16)),
        "talpa::packed_matrix: 'storage' is bfloat16, expected exact = storage of doubles",
        value_error);
  }

  TEST_CASE_TEMPLATE("any number of threads and of rows gives the same bits", T, TALPA_SCALARS) {
    test_random random(34);
    const index m = 2 * detail::tile_task_rows + 3, n = 5 * detail::register_tile<T>::cols + 33;
    const index k = support::sanitized ? 20 : 300;
    const matrix<T, cpu> a = random_matrix<T>(random, m, k), b = random_matrix<T>(random, k, n);
    context<cpu> serial(1);
    const packed_matrix<T, cpu> packed(serial, b, transpose::no);
    matrix<T, cpu> one(m, n);
    ops::gemm(serial, a, transpose::no, packed, T{0}, one.view());
    for (const int threads : {2, 3}) {
      context<cpu> ctx(threads);
      matrix<T, cpu> many(m, n), pieces(m, n);
      ops::gemm(ctx, a, transpose::no, packed, T{0}, many.view());
      CHECK(testing::first_difference(many, one) == "");
      detail::tiled_product<T>(ctx, T{1}, a.view(), transpose::no, b.view(), transpose::no, T{0},
                               pieces.view());
      CHECK(testing::first_difference(pieces, one) == "");
    }
    for (const index rows : {1, 5, 64}) {
      matrix<T, cpu> some(rows, n);
      ops::gemm(serial, a.view().row_range(7, rows), transpose::no, packed, T{0}, some.view());
      CHECK(testing::first_difference<T>(some.view(), one.view().row_range(7, rows)) == "");
    }
  }

  TEST_CASE_TEMPLATE("registers of every width give the same bits", T, TALPA_SCALARS) {
    test_random random(35);
    const index depth = 37;
    const matrix<T, cpu> a = random_matrix<T>(random, 16, depth);
    const matrix<T, cpu> b = random_matrix<T>(random, depth, 32);
    const matrix<T, cpu> narrow = tile_of<T, 16, 16>(depth, a, b);
    const auto agrees = [&](const matrix<T, cpu>& wide) {
      return testing::first_difference<T>(
          wide.view().row_range(0, narrow.rows()).col_range(0, narrow.cols()), narrow.view());
    };
    CHECK(agrees(tile_of<T, 16, 32>(depth, a, b)) == "");
    CHECK(agrees(tile_of<T, 32, 16>(depth, a, b)) == "");
    CHECK(agrees(tile_of<T, 64, 32>(depth, a, b)) == "");
  }

  TEST_CASE("a packed matrix owns whole panels, copies by value, and may be empty") {
    context<cpu> ctx(1);
    const matrix<float, cpu> b(3, 17);
    const packed_matrix<float, cpu> packed(ctx, b, transpose::no), turned(ctx, b, transpose::yes);
    CHECK(packed.rows() == 3);
    CHECK(packed.cols() == 17);
    CHECK(packed.bytes() == 3 * 32 * sizeof(float));
    CHECK(turned.rows() == 17);
    CHECK(turned.cols() == 3);
    CHECK(turned.bytes() == 17 * 16 * sizeof(float));
    const packed_matrix<float, cpu> copy = packed;
    CHECK(copy.memory().data() != packed.memory().data());
    CHECK(copy.memory().size() == packed.bytes());
    CHECK(packed_matrix<float, cpu>().bytes() == 0);
  }

  TEST_CASE_TEMPLATE("panels in memory of the caller's give the bits of those that are owned", T,
                     TALPA_SCALARS) {
    test_random random(36);
    context<cpu> ctx(1);
    const index m = 5, k = 7, n = 2 * detail::panel_width<T> + 1;
    const matrix<T, cpu> a = random_matrix<T>(random, m, k), b = random_matrix<T>(random, n, k);
    std::vector<weight_storage> storages{weight_storage::exact};
    if (std::same_as<T, float>) storages.push_back(weight_storage::bfloat16);
    for (const weight_storage storage : storages) {
      using packed = packed_matrix<T, cpu>;
      const packed owner(ctx, b, transpose::yes, storage);
      const std::size_t bytes = packed::bytes_for(k, n, storage);
      CHECK(bytes == owner.bytes());
      CHECK(bytes % packed::alignment == 0);
      // Room for one line more, which stays as it is.
      vector<std::byte, cpu> mine(static_cast<index>(bytes + packed::alignment));
      std::fill_n(mine.data(), mine.size(), std::byte{7});
      const std::span<std::byte> room(mine.data(), static_cast<std::size_t>(mine.size()));
      const packed into(ctx, b, transpose::yes, room, storage);
      const packed over = packed::borrow(room.first(bytes), k, n, storage);
      CHECK(std::count(mine.data() + bytes, mine.data() + mine.size(), std::byte{7}) ==
            static_cast<std::ptrdiff_t>(packed::alignment));
      const packed copy = over;
      matrix<T, cpu> expected(m, n);
      ops::gemm(ctx, a, transpose::no, owner, T{0}, expected.view());
      for (const packed* found : {&into, &over, &copy}) {
        CHECK(found->memory().data() == mine.data());
        CHECK(found->bytes() == bytes);
        CHECK(found->rows() == k);
        CHECK(found->cols() == n);
        CHECK(found->storage() == storage);
        matrix<T, cpu> c(m, n);
        ops::gemm(ctx, a, transpose::no, *found, T{0}, c.view());
        CHECK(testing::first_difference(c, expected) == "");
      }
    }
  }

  TEST_CASE("memory that panels do not fit is refused, and nothing is written to it") {
    context<cpu> ctx(1);
    matrix<float, cpu> b(3, 17);
    std::fill_n(b.data(), b.size(), 1.0f);
    using packed = packed_matrix<float, cpu>;
    vector<std::byte, cpu> mine(448);
    const std::span<std::byte> room(mine.data(), 448);
    const auto into = [&](std::span<std::byte> memory) {
      return refused([&] { packed(ctx, b, transpose::no, memory); });
    };
    const auto over = [&](std::span<const std::byte> memory, index rows, index cols,
                          weight_storage storage = weight_storage::exact) {
      return refused([&] { packed::borrow(memory, rows, cols, storage); });
    };
    CHECK(into(room.first(383)) ==
          "talpa::packed_matrix: 'memory' is 383 bytes, expected >= 384 bytes = panels of [3, 17]");
    CHECK(into(room.subspan(4)) ==
          "talpa::packed_matrix: 'memory' is 4 bytes past a multiple of 64, expected a multiple of "
          "64 = alignment of what lies there");
    CHECK(into({}) ==
          "talpa::packed_matrix: 'memory' is 0 bytes, expected >= 384 bytes = panels of [3, 17]");
    CHECK(std::count(mine.data(), mine.data() + mine.size(), std::byte{0}) == mine.size());
    CHECK(into(room) == "");
    CHECK(over(room, 3, 17) ==
          "talpa::packed_matrix::borrow: 'memory' is 448 bytes, expected 384 bytes = panels of "
          "[3, 17]");
    CHECK(over(room.first(384), 3, 17) == "");
    // Of another shape, and of another scalar.
    CHECK(over(room.first(384), 4, 17) ==
          "talpa::packed_matrix::borrow: 'memory' is 384 bytes, expected 512 bytes = panels of "
          "[4, 17]");
    CHECK(over(room.first(384), 3, 17, weight_storage::bfloat16) ==
          "talpa::packed_matrix::borrow: 'memory' is 384 bytes, expected 256 bytes = panels of "
          "[3, 17]");
    CHECK(refused([&] { packed_matrix<double, cpu>::borrow(room.first(384), 3, 17); }) ==
          "talpa::packed_matrix::borrow: 'memory' is 384 bytes, expected 576 bytes = panels of "
          "[3, 17]");
    CHECK(
        refused([&] { packed_matrix<double, cpu>::borrow({}, 0, 0, weight_storage::bfloat16); }) ==
        "talpa::packed_matrix::borrow: 'storage' is bfloat16, expected exact = storage of "
        "doubles");
    CHECK(over(room.subspan(60, 384), 3, 17) ==
          "talpa::packed_matrix::borrow: 'memory' is 60 bytes past a multiple of 64, expected a "
          "multiple of 64 = alignment of what lies there");
    CHECK(over(room, -1, 17) ==
          "talpa::packed_matrix::borrow: 'rows' is -1, expected >= 0 = rows of the matrix");
    CHECK(over(room, 3, -1) ==
          "talpa::packed_matrix::borrow: 'cols' is -1, expected >= 0 = columns of the matrix");
    CHECK(over({}, 3, 0) == "");
  }

  TEST_CASE("a second equal product takes no memory") {
    context<cpu> ctx(2);
    const matrix<float, cpu> a(150, 20), b(20, 40);
    matrix<float, cpu> c(150, 40);
    const packed_matrix<float, cpu> packed(ctx, b, transpose::no);
    ops::gemm(ctx, a, transpose::no, packed, 0.0f, c.view());
    const index allocations = ctx.scratch.allocations();
    ops::gemm(ctx, a, transpose::no, packed, 0.0f, c.view());
    CHECK(ctx.scratch.allocations() == allocations);
    CHECK(ctx.scratch.used() == 0);
  }

  TEST_CASE("a packed matrix of another shape is refused, and c stays as it was") {
    context<cpu> ctx(1);
    const matrix<float, cpu> a(2, 3), b(4, 5), right(3, 5);
    matrix<float, cpu> c(2, 5), wrong(5, 2);
    c(1, 4) = 7.0f;
    const packed_matrix<float, cpu> packed(ctx, b, transpose::no), fits(ctx, right, transpose::no);
    CHECK_THROWS_WITH_AS(
        ops::gemm(ctx, a, transpose::no, packed, 0.0f, c.view()),
        "talpa::ops::gemm: 'b' has shape [4, 5], expected [3, ...] = inner size of a", shape_error);
    CHECK_THROWS_WITH_AS(
        ops::gemm(ctx, a, transpose::no, {}, 0.0f, c.view()),
        "talpa::ops::gemm: 'b' has shape [0, 0], expected [3, ...] = inner size of a", shape_error);
    CHECK(c(1, 4) == 7.0f);
    CHECK_THROWS_WITH_AS(
        ops::gemm(ctx, a, transpose::no, fits, 0.0f, wrong.view()),
        "talpa::ops::gemm: 'c' has shape [5, 2], expected [2, 5] = rows of op(a), columns of b",
        shape_error);
  }
}

}  // namespace talpa::packed_gemm_test
