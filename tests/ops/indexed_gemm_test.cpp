// SPDX-License-Identifier: Apache-2.0
#include "support/padded.hpp"
#include "support/routed.hpp"
#include "support/sanitized.hpp"
#include "support/scalars.hpp"
#include "support/segments.hpp"
#include "support/tolerance.hpp"

#include <talpa/cpu/bias.hpp>
#include <talpa/cpu/indexed_gemm.hpp>
#include <talpa/cpu/segments.hpp>
#include <talpa/testing/bounds.hpp>
#include <talpa/testing/inputs.hpp>

#include <doctest/doctest.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <span>
#include <vector>

namespace talpa::indexed_gemm_test {

using namespace support;

namespace {

/// Tokens with no expert, all experts, or about `mean` of them; expert 0 has none where there are
/// several.
template <class T>
routed_layer<T> random_mask(test_random& random, index tokens, index experts, double mean) {
  routed_layer<T> layer(tokens, experts);
  for (index n = 0; n < tokens; ++n) {
    const index kind = random.below(8);
    if (kind == 0) continue;
    for (index e = experts > 2 ? 1 : 0; e < experts; ++e) {
      const double share = mean / static_cast<double>(experts);
      if (kind == 1 || random.uniform(0.0, 1.0) < share) layer.turn_on(n, e, 1.0);
    }
  }
  return layer;
}

template <class T>
bool selected(const routed_layer<T>& layer, index n) {
  for (index e = 0; e < layer.experts(); ++e) {
    if (layer.on(n, e)) return true;
  }
  return false;
}

/// NaN in the rows of tokens without slots: nobody may look at them.
template <class T>
void hide_unused(const routed_layer<T>& layer, matrix_view<T, cpu> x) {
  for (index n = 0; n < x.rows; ++n) {
    if (!selected(layer, n)) {
      std::fill_n(x.row(n), x.cols, std::numeric_limits<T>::quiet_NaN());
    }
  }
}

/// Empty, or the first element that is further from its sum of products than the bound of a sum of
/// `terms` in any order.
struct expected_sum {
  double value = 0.0, magnitude = 0.0;
  index terms = 0;

  void add(double a, double b) {
    value += a * b;
    magnitude += std::abs(a * b);
    ++terms;
  }
  template <class T>
  bool allows(T found) const {
    return within(static_cast<double>(found), value, sum_bound<T>(terms + 1, magnitude));
  }
};

template <class T>
void compare(index tokens, index experts, index ranks, index cols, double mean, test_random& random,
             int threads) {
  CAPTURE(tokens);
  CAPTURE(experts);
  CAPTURE(ranks);
  CAPTURE(cols);
  const routed_layer<T> layer = random_mask<T>(random, tokens, experts, mean);
  context<cpu> ctx(threads);
  const segments<cpu> s = segments_of(ctx, layer, 3);
  const index slots = s.capacity(), used = s.offsets[experts];
  padded<T> x(random_matrix<T>(random, tokens, cols));
  padded<T> bank(random_matrix<T>(random, experts * ranks, cols));
  hide_unused<T>(layer, x.view());
  const auto value = [](T v) { return static_cast<double>(v); };

  // From width to ranks.
  padded<T> u(slots, ranks);
  ops::indexed_shrink(ctx, s, x.view(), bank.view(), u.view());
  bool right = true, untouched = true;
  for (index e = 0; e < experts; ++e) {
    for (index slot = s.offsets[e]; slot < s.offsets[e + 1]; ++slot) {
      for (index r = 0; r < ranks; ++r) {
        expected_sum sum;
        for (index d = 0; d < cols; ++d) {
          sum.add(value(x.view()(s.token_of_slot[slot], d)), value(bank.view()(e * ranks + r, d)));
        }
        right = right && sum.allows(u.view()(slot, r));
      }
    }
  }
  for (index slot = used; slot < slots; ++slot) {
    for (index r = 0; r < ranks; ++r) untouched = untouched && std::isnan(u.view()(slot, r));
  }
  CHECK(right);
  CHECK(untouched);
  CHECK(u.intact());

  // From ranks to width, where places beyond the slots hold NaN.
  padded<T> z(slots, ranks);
  for (index slot = 0; slot < used; ++slot) {
    for (index r = 0; r < ranks; ++r) z.view()(slot, r) = static_cast<T>(random.uniform(-1.0, 1.0));
  }
  const matrix<T, cpu> before = random_matrix<T>(random, tokens, cols);
  for (const grad_mode mode : {grad_mode::overwrite, grad_mode::accumulate, grad_mode::ignore}) {
    padded<T> y(before);
    if (mode == grad_mode::overwrite) testing::poison<T>(y.view());
    ops::indexed_expand(ctx, s, z.view(), bank.view(), y.view(), mode);
    right = true;
    for (index n = 0; n < tokens; ++n) {
      for (index d = 0; d < cols; ++d) {
        expected_sum sum;
        if (mode != grad_mode::overwrite) sum.add(value(before(n, d)), 1.0);
        for (index i = s.slot_offset_of_token[n]; i < s.slot_offset_of_token[n + 1]; ++i) {
          const index slot = s.slot_of_token[i];
          index e = 0;
          while (slot >= s.offsets[e + 1]) ++e;
          for (index r = 0; mode != grad_mode::ignore && r < ranks; ++r) {
            sum.add(value(z.view()(slot, r)), value(bank.view()(e * ranks + r, d)));
          }
        }
        right = right && sum.allows(y.view()(n, d));
      }
    }
    CHECK(right);
    CHECK(y.intact());
  }

  // The gradient of every second expert.
  std::vector<row_run> runs;
  for (index e = 0; e < experts; e += 2) {
    runs.push_back({e * ranks, ranks, static_cast<index>(runs.size()) * ranks});
  }
  const index trained = static_cast<index>(runs.size()) * ranks;
  const matrix<T, cpu> start = random_matrix<T>(random, trained, cols);
  padded<T> dbank(start);
  ops::indexed_gradient(ctx, s, z.view(), x.view(), std::span<const row_run>(runs), dbank.view());
  right = true;
  for (index row = 0; row < trained; ++row) {
    const index e = row / ranks * 2;
    for (index d = 0; d < cols; ++d) {
      expected_sum sum;
      sum.add(value(start(row, d)), 1.0);
      for (index slot = s.offsets[e]; slot < s.offsets[e + 1]; ++slot) {
        sum.add(value(z.view()(slot, row % ranks)), value(x.view()(s.token_of_slot[slot], d)));
      }
      right = right && sum.allows(dbank.view()(row, d));
    }
  }
  CHECK(right);
  CHECK(dbank.intact());
}

/// All three products of one routing.
template <class T>
struct products {
  matrix<T, cpu> u, y, dbank;
};
template <class T>
products<T> run(context<cpu>& ctx, const segments<cpu>& s, matrix_view<const T, cpu> x,
                const matrix<T, cpu>& bank) {
  const index ranks = bank.rows() / s.experts();
  products<T> p{matrix<T, cpu>(s.capacity(), ranks), matrix<T, cpu>(x.rows, x.cols),
                matrix<T, cpu>(bank.rows(), bank.cols())};
  const row_run all{0, bank.rows(), 0};
  ops::indexed_shrink(ctx, s, x, bank, p.u.view());
  ops::indexed_expand(ctx, s, p.u, bank, p.y.view(), grad_mode::overwrite);
  ops::indexed_gradient(ctx, s, p.u, x, std::span<const row_run>(&all, 1), p.dbank.view());
  return p;
}

/// Inner products, a sum of rows and a sum of outer products by registers of a given width, the
/// last two cut to the columns that the narrowest has.
template <class T, index Bytes, index Registers>
products<T> tile_of(const matrix<T, cpu>& x, const matrix<T, cpu>& bank) {
  using tile = detail::indexed_tile<T, Bytes, Registers>;
  constexpr index cols = 128;
  products<T> p{matrix<T, cpu>(2, tile::ranks), matrix<T, cpu>(3, tile::sum_cols),
                matrix<T, cpu>(1, cols)};
  T out[2][tile::ranks][tile::lanes];
  const std::uintptr_t soon[tile::fetched] = {};
  for (const index begin : {index{0}, cols / 2}) {
    tile::template inner<2>(
        begin, begin + cols / 2, {x.view().row(0), x.view().row(1)},
        {bank.view().row(0), bank.view().row(1), bank.view().row(2), bank.view().row(3)}, soon,
        begin > 0, out);
  }
  for (index i = 0; i < 2; ++i) {
    for (index r = 0; r < tile::ranks; ++r) p.u(i, r) = tile::total(out[i][r]);
  }
  typename tile::row_factors terms[] = {{x.view().row(0), 2, 2}, {x.view().row(1), 0, 3}};
  // Rows that are alike may be summed together.
  typename tile::row_factors other[] = {{x.view().row(2), 1, 2}, {x.view().row(3), 0, 3}};
  typename tile::row_factors single[] = {{x.view().row(3), 0, 4}};
  const typename tile::row_terms lists[] = {{single, 1}, {terms, 2}, {other, 2}};
  tile::sum_rows(3, lists, bank.data(), bank.cols(), {}, p.y.data(), tile::sum_cols, 0);
  const T* const rows[] = {bank.view().row(0), bank.view().row(1), bank.view().row(2),
                           bank.view().row(3)};
  tile::template outer<4>(cols / tile::outer_cols, 1,
                          {x.view().row(0), x.view().row(1), x.view().row(2), x.view().row(3)},
                          rows, rows, p.dbank.data());
  return p;
}

/// Sizes of slots' sums, of the product that they join, and of a low-rank one.
struct shape {
  index tokens, experts, ranks, inner, cols, more = 0;
};

}  // namespace

TEST_SUITE("ops/indexed_gemm") {
  TEST_CASE("two tokens and two experts of rank 1, by hand") {
    // Token 0 has both experts, token 1 the second. Slots: (0, 0), (0, 1), (1, 1).
    routed_layer<float> layer(2, 2);
    layer.turn_on(0, 0, 1.0);
    layer.turn_on(0, 1, 1.0);
    layer.turn_on(1, 1, 1.0);
    context<cpu> ctx(1);
    const segments<cpu> s = segments_of(ctx, layer);
    matrix<float, cpu> x(2, 2), bank(2, 2), u(3, 1), y(2, 2), dbank(2, 2);
    for (index i = 0; i < 4; ++i) {
      x.data()[i] = static_cast<float>(i + 1);     // (1, 2), (3, 4)
      bank.data()[i] = static_cast<float>(i + 5);  // (5, 6), (7, 8)
      dbank.data()[i] = 100.0f;
    }
    ops::indexed_shrink(ctx, s, x, bank, u.view());
    CHECK(difference(u.view(), table(3, 1, {17, 23, 53}), 0.0) == "");
    std::copy_n(std::vector<float>{1, 2, 3}.data(), 3, u.data());
    ops::indexed_expand(ctx, s, u, bank, y.view(), grad_mode::overwrite);
    CHECK(difference(y.view(), table(2, 2, {19, 22, 21, 24}), 0.0) == "");
    ops::indexed_expand(ctx, s, u, bank, y.view(), grad_mode::accumulate);
    CHECK(difference(y.view(), table(2, 2, {38, 44, 42, 48}), 0.0) == "");
    const row_run all{0, 2, 0};
    ops::indexed_gradient(ctx, s, u, x, std::span<const row_run>(&all, 1), dbank.view());
    CHECK(difference(dbank.view(), table(2, 2, {101, 102, 111, 116}), 0.0) == "");
  }

  TEST_CASE_TEMPLATE("indexed products agree with plain loops over random shapes", T,
                     TALPA_SCALARS) {
    test_random random(41);
    for (int i = 0; i < 24; ++i) {
      const index experts = 1 + random.below(9);
      compare<T>(1 + random.below(40), experts, 1 + random.below(9), 1 + random.below(150), 2.0,
                 random, 1 + i % 3);
    }
  }

  TEST_CASE_TEMPLATE("indexed products agree with plain loops at the edges", T, TALPA_SCALARS) {
    using tile = detail::indexed_tile<T>;
    test_random random(42);
    for (const index tokens : {0, 1, 129}) {
      for (const index experts : {1, 3, 40}) {
        compare<T>(tokens, experts, 2, 2 * tile::sum_cols, 2.0, random, 2);
        compare<T>(tokens, experts, 5, tile::sum_cols + 1, 3.0, random, 3);
      }
    }
    for (const index cols : {tile::lanes - 1, tile::lanes, tile::outer_cols, tile::outer_cols + 1,
                             tile::sum_cols - 1, 5 * tile::sum_cols + tile::outer_cols}) {
      compare<T>(70, 4, tile::ranks, cols, 2.0, random, 2);
    }
    // Several pieces of rows and blocks of ranks in an inner product, and blocks of tokens.
    const index piece = detail::inner_piece_bytes / static_cast<index>(sizeof(T));
    compare<T>(90, 2, detail::inner_bank_blocks * tile::ranks + 1, 2 * piece + tile::lanes + 1, 2.0,
               random, 2);
    // Several chunks of columns in a gradient.
    const index ranks = 64;
    compare<T>(
        30, 2, ranks,
        detail::outer_sum_bytes / ranks / static_cast<index>(sizeof(T)) + tile::outer_cols + 1, 1.0,
        random, 2);
  }

  TEST_CASE_TEMPLATE("threads and other tokens change no bit", T, TALPA_SCALARS) {
    test_random random(43);
    const index tokens = 300, experts = 6, ranks = 5, cols = 201;
    const routed_layer<T> layer = random_mask<T>(random, tokens, experts, 2.0);
    const matrix<T, cpu> x = random_matrix<T>(random, tokens, cols);
    const matrix<T, cpu> bank = random_matrix<T>(random, experts * ranks, cols);
    context<cpu> serial(1);
    const segments<cpu> s = segments_of(serial, layer);
    const products<T> one = run<T>(serial, s, x, bank);
    for (const int threads : {2, 4}) {
      context<cpu> ctx(threads);
      const products<T> many = run<T>(ctx, s, x, bank);
      CHECK(testing::first_difference(many.u, one.u) == "");
      CHECK(testing::first_difference(many.y, one.y) == "");
      CHECK(testing::first_difference(many.dbank, one.dbank) == "");
    }
    // A few tokens alone, with which the bank is read in place.
    const index first = 101, few = 7;
    REQUIRE(few < detail::panel_tokens * experts);
    routed_layer<T> part(few, experts);
    for (index n = 0; n < few; ++n) {
      for (index e = 0; e < experts; ++e) {
        if (layer.on(first + n, e)) part.turn_on(n, e, 1.0);
      }
    }
    const segments<cpu> t = segments_of(serial, part);
    REQUIRE(t.capacity() > 0);
    const products<T> alone = run<T>(serial, t, x.view().row_range(first, few), bank);
    CHECK(testing::first_difference<T>(alone.y.view(), one.y.view().row_range(first, few)) == "");
    for (index n = 0; n < few; ++n) {
      const index here = t.slot_offset_of_token[n], there = s.slot_offset_of_token[first + n];
      for (index i = 0; i < t.slot_offset_of_token[n + 1] - here; ++i) {
        CHECK(testing::first_difference<T>(alone.u.view().row_range(t.slot_of_token[here + i], 1),
                                           one.u.view().row_range(s.slot_of_token[there + i], 1)) ==
              "");
      }
    }
  }

  TEST_CASE_TEMPLATE("sums of rows have the same bits for registers of every width", T,
                     TALPA_SCALARS) {
    test_random random(44);
    const matrix<T, cpu> x = random_matrix<T>(random, 4, 128);
    const matrix<T, cpu> bank = random_matrix<T>(random, 4, 512);
    const products<T> narrow = tile_of<T, 16, 16>(x, bank);
    const auto agrees = [&](const products<T>& wide) {
      const index cols = narrow.y.cols();
      CHECK(testing::first_difference<T>(wide.y.view().col_range(0, cols), narrow.y.view()) == "");
      CHECK(testing::first_difference(wide.dbank, narrow.dbank) == "");
      for (index i = 0; i < 2; ++i) {
        for (index r = 0; r < 4; ++r) {
          expected_sum sum;
          for (index d = 0; d < 128; ++d) {
            sum.add(static_cast<double>(x(i, d)), static_cast<double>(bank(r, d)));
          }
          CHECK(sum.allows(wide.u(i, r)));
        }
      }
    };
    agrees(narrow);
    agrees(tile_of<T, 16, 32>(x, bank));
    agrees(tile_of<T, 32, 16>(x, bank));
    agrees(tile_of<T, 64, 32>(x, bank));
  }

  TEST_CASE_TEMPLATE("a sum on top of a product has the bits of one after the other", T,
                     TALPA_SCALARS) {
    test_random random(46);
    const index width = detail::indexed_tile<T>::sum_cols;
    const index deep = detail::tile_depth<T> + 5, wide = 8 * detail::register_tile<T>::cols + 3;
    const index many = support::many_rows(300);
    for (const shape& s :
         {shape{0, 3, 2, 4, 5}, shape{1, 1, 1, 1, 1}, shape{129, 4, 3, 20, 2 * width + 1},
          shape{many, 5, 2, deep, wide}, shape{40, 40, 3, 7, width},
          shape{many / 2, 2, 8, 2 * deep, wide}, shape{70, 3, 2, 0, width + 2}}) {
      CAPTURE(s.tokens);
      CAPTURE(s.inner);
      const routed_layer<T> layer = random_mask<T>(random, s.tokens, s.experts, 2.0);
      context<cpu> ctx(1);
      const segments<cpu> slots = segments_of(ctx, layer, 2);
      const index used = slots.offsets[s.experts];
      padded<T> a(random_matrix<T>(random, s.tokens, s.inner));
      padded<T> bank(random_matrix<T>(random, s.experts * s.ranks, s.cols));
      padded<T> z(slots.capacity(), s.ranks);
      for (index slot = 0; slot < used; ++slot) {
        for (index r = 0; r < s.ranks; ++r) {
          z.view()(slot, r) = static_cast<T>(random.uniform(-1.0, 1.0));
        }
      }
      const packed_matrix<T, cpu> b(ctx, random_matrix<T>(random, s.inner, s.cols), transpose::no);
      const matrix<T, cpu> before = random_matrix<T>(random, s.tokens, s.cols);
      padded<T> bias(random_matrix<T>(random, 1, s.cols));
      for (const grad_mode mode :
           {grad_mode::overwrite, grad_mode::accumulate, grad_mode::ignore}) {
        for (const bool biased : {false, true}) {
          CAPTURE(biased);
          padded<T> expected(before);
          if (mode != grad_mode::ignore) {
            ops::gemm(ctx, a.view(), transpose::no, b, mode == grad_mode::overwrite ? T{0} : T{1},
                      expected.view());
            if (biased) ops::add_bias(ctx, expected.view(), bias.view(), expected.view());
            ops::indexed_expand(ctx, slots, z.view(), bank.view(), expected.view(),
                                grad_mode::accumulate);
          }
          packed_product<T, cpu> product{a.view(), &b};
          if (biased) product.bias = bias.view();
          for (const int threads : {1, 3}) {
            context<cpu> other(threads);
            padded<T> y(before);
            if (mode == grad_mode::overwrite) testing::poison<T>(y.view());
            ops::indexed_expand(other, slots, z.view(), bank.view(), product, y.view(), mode);
            CHECK(testing::first_difference<T>(y.view(), expected.view()) == "");
            CHECK(y.intact());
            CHECK(other.scratch.used() == 0);
          }
        }
      }
    }
  }

  TEST_CASE("a sum on top of a product with a rounded weight has the bits of one after the other") {
    test_random random(48);
    const index tokens = 70, experts = 3, ranks = 2, inner = 33, cols = 70;
    const routed_layer<float> layer = random_mask<float>(random, tokens, experts, 2.0);
    context<cpu> ctx(2);
    const segments<cpu> slots = segments_of(ctx, layer, 2);
    const auto a = random_matrix<float>(random, tokens, inner);
    const auto bank = random_matrix<float>(random, experts * ranks, cols);
    const auto z = random_matrix<float>(random, slots.capacity(), ranks);
    const packed_matrix<float, cpu> b(ctx, random_matrix<float>(random, inner, cols), transpose::no,
                                      weight_storage::bfloat16);
    matrix<float, cpu> y(tokens, cols), expected(tokens, cols);
    ops::gemm(ctx, a, transpose::no, b, 0.0f, expected.view());
    ops::indexed_expand(ctx, slots, z, bank, expected.view(), grad_mode::accumulate);
    ops::indexed_expand(ctx, slots, z, bank, {a, &b}, y.view(), grad_mode::overwrite);
    CHECK(testing::first_difference(y, expected) == "");
  }

  TEST_CASE_TEMPLATE("a low-rank product joins the sum", T, TALPA_SCALARS) {
    test_random random(47);
    const index width = detail::indexed_tile<T>::sum_cols;
    for (const shape& s :
         {shape{1, 1, 1, 1, 1, 1}, shape{129, 4, 3, 20, width + 1, 4},
          shape{support::many_rows(300), 2, 2, 30, 8 * detail::register_tile<T>::cols + 3, 9},
          shape{40, 3, 2, 0, width + 2, 2}, shape{0, 2, 2, 3, 4, 2}}) {
      CAPTURE(s.tokens);
      const routed_layer<T> layer = random_mask<T>(random, s.tokens, s.experts, 2.0);
      context<cpu> ctx(1);
      const segments<cpu> slots = segments_of(ctx, layer, 2);
      const matrix<T, cpu> a = random_matrix<T>(random, s.tokens, s.inner);
      const matrix<T, cpu> b = random_matrix<T>(random, s.inner, s.cols);
      const matrix<T, cpu> bank = random_matrix<T>(random, s.experts * s.ranks, s.cols);
      const matrix<T, cpu> z = random_matrix<T>(random, slots.capacity(), s.ranks);
      padded<T> d(random_matrix<T>(random, s.tokens, s.more));
      padded<T> w(random_matrix<T>(random, s.more, s.cols));
      const packed_matrix<T, cpu> packed(ctx, b, transpose::no);
      const matrix<T, cpu> before = random_matrix<T>(random, s.tokens, s.cols);
      for (const grad_mode mode : {grad_mode::overwrite, grad_mode::accumulate}) {
        padded<T> y(before), again(before);
        ops::indexed_expand(ctx, slots, z, bank, {a.view(), &packed}, y.view(), mode,
                            {d.view(), w.view()});
        context<cpu> other(3);
        ops::indexed_expand(other, slots, z, bank, {a.view(), &packed}, again.view(), mode,
                            {d.view(), w.view()});
        CHECK(testing::first_difference<T>(y.view(), again.view()) == "");
        CHECK(y.intact());
        bool right = true;
        for (index n = 0; n < s.tokens; ++n) {
          for (index q = 0; q < s.cols; ++q) {
            expected_sum sum;
            const auto add = [&](T left, T factor) {
              sum.add(static_cast<double>(left), static_cast<double>(factor));
            };
            if (mode == grad_mode::accumulate) add(before(n, q), T{1});
            for (index i = 0; i < s.inner; ++i) add(a(n, i), b(i, q));
            for (index i = 0; i < s.more; ++i) add(d.view()(n, i), w.view()(i, q));
            for (index e = 0; e < s.experts; ++e) {
              for (index slot = slots.offsets[e]; slot < slots.offsets[e + 1]; ++slot) {
                for (index r = 0; r < s.ranks && slots.token_of_slot[slot] == n; ++r) {
                  add(z(slot, r), bank(e * s.ranks + r, q));
                }
              }
            }
            right = right && sum.allows(y.view()(n, q));
          }
        }
        CHECK(right);
      }
    }
  }

  TEST_CASE_TEMPLATE("of the slots' sum what a mask keeps, of all the rest everything", T,
                     TALPA_SCALARS) {
    // Widths of whole panels, with a word of the mask that begins within one, and of parts.
    constexpr index width = detail::indexed_tile<T>::sum_cols;
    constexpr random_stream stream{5, 8};
    test_random random(47);
    for (const shape& s : {shape{130, 5, 3, 9, 3 * width, 4}, shape{33, 4, 2, 7, width + 35, 1},
                           shape{40, 3, 2, 6, 13, 2}, shape{0, 2, 2, 3, 4, 2}}) {
      CAPTURE(s.cols);
      const routed_layer<T> layer = random_mask<T>(random, s.tokens, s.experts, 2.0);
      context<cpu> ctx(1), other(3);
      const segments<cpu> slots = segments_of(ctx, layer, 2);
      const matrix<T, cpu> a = random_matrix<T>(random, s.tokens, s.inner);
      const matrix<T, cpu> b = random_matrix<T>(random, s.inner, s.cols);
      const matrix<T, cpu> bank = random_matrix<T>(random, s.experts * s.ranks, s.cols);
      const matrix<T, cpu> z = random_matrix<T>(random, slots.capacity(), s.ranks);
      const matrix<T, cpu> d = random_matrix<T>(random, s.tokens, s.more);
      const matrix<T, cpu> w = random_matrix<T>(random, s.more, s.cols);
      const matrix<T, cpu> bias = random_matrix<T>(random, 1, s.cols);
      const packed_matrix<T, cpu> packed(ctx, b, transpose::no);
      const packed_product<T, cpu> product{a.view(), &packed, bias.view()};
      const matrix<T, cpu> before = random_matrix<T>(random, s.tokens, s.cols);
      // What stays is doubled, which rounds nothing.
      matrix<std::uint32_t, cpu> words(s.tokens, mask_words(s.cols));
      const dropout_bits<cpu> kept{words.view(), 0.5f};
      ops::draw_dropout(ctx, stream, s.cols, kept);
      for (const grad_mode mode : {grad_mode::overwrite, grad_mode::accumulate}) {
        padded<T> alone(before), on_top(before), again(before);
        ops::indexed_expand(ctx, slots, z, bank, alone.view(), mode, kept);
        ops::indexed_expand(ctx, slots, z, bank, product, on_top.view(), mode, {d.view(), w.view()},
                            kept);
        ops::indexed_expand(other, slots, z, bank, product, again.view(), mode,
                            {d.view(), w.view()}, kept);
        CHECK(testing::first_difference<T>(on_top.view(), again.view()) == "");
        CHECK(alone.intact());
        CHECK(on_top.intact());
        bool right = true;
        for (index n = 0; n < s.tokens; ++n) {
          for (index q = 0; q < s.cols; ++q) {
            expected_sum slot_sum, sum;
            const auto add = [](expected_sum& to, T left, double factor) {
              to.add(static_cast<double>(left), factor);
            };
            const bool stays = keep(stream, static_cast<std::uint64_t>(n * s.cols + q), 0.5f);
            for (index slot = 0; stays && slot < slots.offsets[s.experts]; ++slot) {
              if (slots.token_of_slot[slot] != n) continue;
              const index e =
                  std::upper_bound(slots.offsets.data, slots.offsets.data + s.experts, slot) -
                  slots.offsets.data - 1;
              for (index r = 0; r < s.ranks; ++r) {
                const double factor = 2.0 * static_cast<double>(bank(e * s.ranks + r, q));
                add(slot_sum, z(slot, r), factor);
                add(sum, z(slot, r), factor);
              }
            }
            if (mode == grad_mode::accumulate) {
              add(slot_sum, before(n, q), 1.0);
              add(sum, before(n, q), 1.0);
            }
            for (index i = 0; i < s.inner; ++i) add(sum, a(n, i), static_cast<double>(b(i, q)));
            add(sum, bias(0, q), 1.0);
            for (index i = 0; i < s.more; ++i) add(sum, d(n, i), static_cast<double>(w(i, q)));
            right = right && slot_sum.allows(alone.view()(n, q)) && sum.allows(on_top.view()(n, q));
          }
        }
        CHECK(right);
      }
    }
    context<cpu> ctx(1);
    const routed_layer<T> layer = random_mask<T>(random, 3, 2, 1.0);
    const segments<cpu> slots = segments_of(ctx, layer);
    const matrix<T, cpu> z(slots.capacity(), 2), bank(4, 40);
    matrix<T, cpu> y(3, 40);
    matrix<std::uint32_t, cpu> words(3, 1);
    CHECK_THROWS_WITH_AS(
        ops::indexed_expand(ctx, slots, z, bank, y.view(), grad_mode::overwrite,
                            dropout_bits<cpu>{words.view(), 0.5f}),
        "talpa::ops::indexed_expand: 'words' has shape [3, 1], expected [3, 2] = rows, words of "
        "the columns",
        shape_error);
    const packed_matrix<T, cpu> b(ctx, matrix<T, cpu>(6, 40), transpose::no);
    const matrix<T, cpu> a(3, 6);
    CHECK_THROWS_WITH_AS(
        ops::indexed_expand(ctx, slots, z, bank, {a.view(), &b}, y.view(), grad_mode::overwrite, {},
                            dropout_bits<cpu>{words.view(), 0.5f}),
        "talpa::ops::indexed_expand: 'words' has shape [3, 1], expected [3, 2] = rows, words of "
        "the columns",
        shape_error);
  }

  TEST_CASE("a second call takes no memory") {
    test_random random(45);
    const routed_layer<float> layer = random_mask<float>(random, 150, 5, 2.0);
    context<cpu> ctx(2);
    const segments<cpu> s = segments_of(ctx, layer);
    const matrix<float, cpu> x = random_matrix<float>(random, 150, 70);
    const matrix<float, cpu> bank = random_matrix<float>(random, 20, 70);
    const packed_matrix<float, cpu> b(ctx, bank, transpose::no);
    const matrix<float, cpu> a(150, 20), z(s.capacity(), 4);
    matrix<float, cpu> y(150, 70);
    const auto all = [&] {
      run<float>(ctx, s, x, bank);
      ops::indexed_expand(ctx, s, z, bank, {a.view(), &b}, y.view(), grad_mode::overwrite,
                          {a.view(), bank.view()});
    };
    all();
    const index allocations = ctx.scratch.allocations();
    all();
    CHECK(ctx.scratch.allocations() == allocations);
    CHECK(ctx.scratch.used() == 0);
  }

  TEST_CASE("shapes that do not fit are refused, and results stay as they were") {
    routed_layer<float> layer(3, 2);
    layer.turn_on(0, 1, 1.0);
    layer.turn_on(2, 0, 1.0);
    context<cpu> ctx(1);
    const segments<cpu> s = segments_of(ctx, layer);
    const matrix<float, cpu> x(3, 5), bank(8, 5), z(2, 4);
    matrix<float, cpu> u(2, 4), y(3, 5), dbank(8, 5);
    u(1, 3) = 7.0f;
    CHECK_THROWS_WITH_AS(
        ops::indexed_shrink(ctx, s, x, bank, matrix<float, cpu>(3, 4).view()),
        "talpa::ops::indexed_shrink: 'u' has shape [3, 4], expected [2, 4] = places for slots, "
        "ranks of an expert",
        shape_error);
    CHECK_THROWS_WITH_AS(ops::indexed_shrink(ctx, s, x, matrix<float, cpu>(9, 5), u.view()),
                         "talpa::ops::indexed_shrink: 'bank' has shape [9, 5], expected [8, ...] = "
                         "ranks of all experts",
                         shape_error);
    CHECK_THROWS_WITH_AS(ops::indexed_shrink(ctx, s, matrix<float, cpu>(3, 4), bank, u.view()),
                         "talpa::ops::indexed_shrink: 'x' has shape [3, 4], expected [3, 5] = "
                         "tokens, columns of bank",
                         shape_error);
    CHECK(u(1, 3) == 7.0f);
    const grad_mode add = grad_mode::accumulate;
    CHECK_THROWS_WITH_AS(
        ops::indexed_expand(ctx, s, matrix<float, cpu>(1, 4), bank, y.view(), add),
        "talpa::ops::indexed_expand: 'z' has shape [1, 4], expected [2, 4] = places for slots, "
        "ranks of an expert",
        shape_error);
    CHECK_THROWS_WITH_AS(ops::indexed_expand(ctx, s, z, matrix<float, cpu>(6, 5), y.view(), add),
                         "talpa::ops::indexed_expand: 'bank' has shape [6, 5], expected [8, ...] = "
                         "ranks of all experts",
                         shape_error);
    CHECK_THROWS_WITH_AS(
        ops::indexed_expand(ctx, s, z, bank, matrix<float, cpu>(2, 5).view(), add),
        "talpa::ops::indexed_expand: 'y' has shape [2, 5], expected [3, 5] = tokens, columns of "
        "bank",
        shape_error);
    const packed_matrix<float, cpu> b(ctx, matrix<float, cpu>(6, 5), transpose::no);
    y(2, 4) = 7.0f;
    const auto on_top_of = [&](index rows, index cols) {
      const matrix<float, cpu> a(rows, cols);
      ops::indexed_expand(ctx, s, z, bank, {a.view(), &b}, y.view(), add);
    };
    CHECK_THROWS_WITH_AS(on_top_of(2, 6),
                         "talpa::ops::indexed_expand: 'a' has shape [2, 6], expected [3, 6] = "
                         "tokens, rows of b",
                         shape_error);
    CHECK_THROWS_WITH_AS(on_top_of(3, 7),
                         "talpa::ops::indexed_expand: 'a' has shape [3, 7], expected [3, 6] = "
                         "tokens, rows of b",
                         shape_error);
    const packed_matrix<float, cpu> narrow(ctx, matrix<float, cpu>(6, 4), transpose::no);
    CHECK_THROWS_WITH_AS(
        ops::indexed_expand(ctx, s, z, bank, {matrix<float, cpu>(3, 6).view(), &narrow}, y.view(),
                            add),
        "talpa::ops::indexed_expand: 'b' has shape [6, 4], expected [..., 5] = columns of bank",
        shape_error);
    const matrix<float, cpu> product(3, 6), short_bias(1, 4);
    CHECK_THROWS_WITH_AS(
        ops::indexed_expand(ctx, s, z, bank, {product.view(), &b, short_bias.view()}, y.view(),
                            add),
        "talpa::ops::indexed_expand: 'bias' has shape [1, 4], expected [1, 5] = "
        "one row, columns of b",
        shape_error);
    const auto beside = [&](index rows, index inner, index cols) {
      const matrix<float, cpu> a(3, 6), d(rows, inner), w(2, cols);
      ops::indexed_expand(ctx, s, z, bank, {a.view(), &b}, y.view(), add, {d.view(), w.view()});
    };
    CHECK_THROWS_WITH_AS(beside(2, 2, 5),
                         "talpa::ops::indexed_expand: 'd' has shape [2, 2], expected [3, 2] = "
                         "tokens, rows of w",
                         shape_error);
    CHECK_THROWS_WITH_AS(beside(3, 3, 5),
                         "talpa::ops::indexed_expand: 'd' has shape [3, 3], expected [3, 2] = "
                         "tokens, rows of w",
                         shape_error);
    CHECK_THROWS_WITH_AS(beside(3, 2, 4),
                         "talpa::ops::indexed_expand: 'w' has shape [2, 4], expected [2, 5] = "
                         "columns of d, columns of bank",
                         shape_error);
    CHECK(y(2, 4) == 7.0f);
    CHECK_THROWS_WITH_AS(
        ops::indexed_gradient(ctx, s, matrix<float, cpu>(5, 4), x, {}, dbank.view()),
        "talpa::ops::indexed_gradient: 'z' has shape [5, 4], expected [2, 4] = places for slots, "
        "ranks of an expert",
        shape_error);
    CHECK_THROWS_WITH_AS(
        ops::indexed_gradient(ctx, s, z, matrix<float, cpu>(3, 6), {}, dbank.view()),
        "talpa::ops::indexed_gradient: 'x' has shape [3, 6], expected [3, 5] = tokens, columns of "
        "dbank",
        shape_error);
  }
}

}  // namespace talpa::indexed_gemm_test
