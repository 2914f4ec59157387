// SPDX-License-Identifier: Apache-2.0
#include "support/parity.hpp"
#include "support/scalars.hpp"

#include <talpa/cuda/grouped_gemm.hpp>

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <span>
#include <vector>

namespace talpa::cuda_grouped_gemm_test {
using support::device;
using support::on_device;
using support::table;

namespace {

/// Groups of the given sizes, and `spare` rows for slots behind them.
struct layout {
  std::vector<index> sizes;
  index spare = 0;

  index groups() const { return static_cast<index>(sizes.size()); }
  matrix<index, cpu> offsets() const {
    matrix<index, cpu> all(1, groups() + 1);
    for (index e = 0; e < groups(); ++e) {
      all(0, e + 1) = all(0, e) + sizes[static_cast<std::size_t>(e)];
    }
    return all;
  }
  index places() const { return offsets()(0, groups()) + spare; }
};

const std::vector<layout> layouts = {
    {{0, 0}, 0}, {{1}, 0}, {{0, 3, 0, 64, 65}, 5}, {{support::device_size(129, 3001), 0, 7}, 0}};

struct reference {
  table value, bound;
};

/// Plain loops in double; rows behind the last slot keep what they had.
template <class T>
reference slow_product(const layout& l, const matrix<T, cpu>& a, const matrix<T, cpu>& bank,
                       transpose tb, const matrix<T, cpu>& before, grad_mode mode) {
  const auto offsets = l.offsets();
  const index rows = bank.rows() / l.groups();
  const index inner = tb == transpose::yes ? bank.cols() : rows;
  reference r{support::to_table(before.view()), table(before.rows(), before.cols())};
  for (index e = 0; e < l.groups(); ++e) {
    for (index s = offsets(0, e); s < offsets(0, e + 1); ++s) {
      for (index o = 0; o < before.cols(); ++o) {
        double sum = mode == grad_mode::accumulate ? r.value(s, o) : 0.0, size = std::abs(sum);
        for (index i = 0; i < inner; ++i) {
          const double term =
              double(a(s, i)) *
              double(tb == transpose::yes ? bank(e * rows + o, i) : bank(e * rows + i, o));
          sum += term;
          size += std::abs(term);
        }
        r.value(s, o) = sum;
        r.bound(s, o) = support::sum_bound<T>(inner + 1, size);
      }
    }
  }
  return r;
}

template <class T>
reference slow_gradient(const layout& l, const matrix<T, cpu>& a, const matrix<T, cpu>& b,
                        std::span<const row_run> runs, const matrix<T, cpu>& before) {
  const auto offsets = l.offsets();
  const index rows = a.cols();
  reference r{support::to_table(before.view()), table(before.rows(), before.cols())};
  for (const row_run& run : runs) {
    for (index i = 0; i < run.rows; ++i) {
      const index e = (run.first + i) / rows, to = run.grad_first + i;
      const index first = offsets(0, e), last = offsets(0, e + 1);
      for (index c = 0; c < b.cols() && first < last; ++c) {
        double size = std::abs(r.value(to, c));
        for (index s = first; s < last; ++s) {
          const double term = double(a(s, (run.first + i) % rows)) * double(b(s, c));
          r.value(to, c) += term;
          size += std::abs(term);
        }
        r.bound(to, c) = support::sum_bound<T>(last - first + 1, size);
      }
    }
  }
  return r;
}

template <class T>
std::string product_difference(const layout& l, index rows, index cols, transpose tb,
                               grad_mode mode) {
  support::test_random random(31);
  const index inner = tb == transpose::yes ? cols : rows;
  const index outer = tb == transpose::yes ? rows : cols;
  on_device<T> a(support::random_matrix<T>(random, l.places(), inner));
  on_device<T> bank(support::random_matrix<T>(random, l.groups() * rows, cols));
  on_device<T> c(support::random_matrix<T>(random, l.places(), outer));
  auto offsets = to_device<device>(l.offsets().view());
  context<device> ctx;
  const vector_view<const index, device> starts(offsets.data(), l.groups() + 1);
  ops::grouped_gemm(ctx, starts, a.view(), bank.view(), tb, c.view(), mode);
  ctx.synchronise();
  const reference r = slow_product(l, a.host(), bank.host(), tb, c.host(), mode);
  return support::difference(c.now().view(), r.value, r.bound) +
         (c.intact() ? "" : "something else was written");
}

template <class T>
std::string gradient_difference(const layout& l, index rows, index cols,
                                std::span<const row_run> runs) {
  support::test_random random(32);
  on_device<T> a(support::random_matrix<T>(random, l.places(), rows));
  on_device<T> b(support::random_matrix<T>(random, l.places(), cols));
  on_device<T> dbank(support::random_matrix<T>(random, l.groups() * rows, cols));
  auto offsets = to_device<device>(l.offsets().view());
  context<device> ctx;
  const vector_view<const index, device> starts(offsets.data(), l.groups() + 1);
  ops::grouped_gemm_gradient(ctx, starts, a.view(), b.view(), runs, dbank.view());
  ctx.synchronise();
  const reference r = slow_gradient(l, a.host(), b.host(), runs, dbank.host());
  return support::difference(dbank.now().view(), r.value, r.bound) +
         (dbank.intact() ? "" : "something else was written");
}

}  // namespace

TEST_SUITE("cuda/grouped_gemm") {
  TEST_CASE_TEMPLATE("grouped_gemm agrees with plain loops in double", T, TALPA_SCALARS) {
    for (const layout& l : layouts) {
      CAPTURE(l.places());
      // Narrow and wide tiles, their sizes and others.
      CHECK(product_difference<T>(l, 5, 37, transpose::yes, grad_mode::overwrite) == "");
      CHECK(product_difference<T>(l, 5, 70, transpose::no, grad_mode::accumulate) == "");
      CHECK(product_difference<T>(l, 67, 33, transpose::yes, grad_mode::accumulate) == "");
      CHECK(product_difference<T>(l, 16, 64, transpose::no, grad_mode::overwrite) == "");
    }
  }

  TEST_CASE_TEMPLATE("the gradient adds the slots of each trained group", T, TALPA_SCALARS) {
    for (const layout& l : layouts) {
      CAPTURE(l.places());
      for (const index rows : {index{5}, index{67}}) {
        const row_run all{0, l.groups() * rows, 0};
        CHECK(gradient_difference<T>(l, rows, 35, {&all, 1}) == "");
      }
      // The last group in front, then the first.
      const row_run some[] = {{(l.groups() - 1) * 16, 16, 0}, {0, 16, 16}};
      if (l.groups() > 1) CHECK(gradient_difference<T>(l, 16, 65, some) == "");
    }
  }

  TEST_CASE("what a slot held before is overwritten, NaN included, and no terms sum to zero") {
    matrix<float, cpu> nan(3, 2);
    std::fill_n(nan.data(), nan.size(), std::numeric_limits<float>::quiet_NaN());
    on_device<float> c(nan), a(matrix<float, cpu>(3, 0)), bank(matrix<float, cpu>(4, 0));
    auto offsets = to_device<device>(layout{{1, 2}}.offsets().view());
    context<device> ctx;
    ops::grouped_gemm(ctx, {offsets.data(), 3}, a.view(), bank.view(), transpose::yes, c.view());
    ctx.synchronise();
    CHECK(support::bit_difference(c.now(), matrix<float, cpu>(3, 2)) == "");
    CHECK(c.intact());
  }
}

}  // namespace talpa::cuda_grouped_gemm_test
