// SPDX-License-Identifier: Apache-2.0
#include "support/parity.hpp"
#include "support/scalars.hpp"

#include <talpa/cuda/ragged_gemm.hpp>

#include <doctest/doctest.h>

#include <cmath>
#include <span>

namespace talpa::cuda_ragged_gemm_test {
using support::device;
using support::on_device;
using support::table;

namespace {

/// Five groups: many slots, one, none, no bank rows, and some; two places behind the slots.
struct layout {
  index most;  // rows of the largest block
  matrix<index, cpu> offsets{1, 6}, blocks{1, 6};
  static constexpr index groups = 5;

  layout(index most_, index many) : most(most_) {
    const index sizes[] = {many, 1, 0, 3, 65}, rows[] = {most, 1, 4, 0, 2};
    for (index e = 0; e < groups; ++e) {
      offsets(0, e + 1) = offsets(0, e) + sizes[e];
      blocks(0, e + 1) = blocks(0, e) + rows[e];
    }
  }
  index places() const { return offsets(0, groups) + 2; }
  index bank_rows() const { return blocks(0, groups); }
  index group_of(index slot) const {
    index e = 0;
    while (e < groups && slot >= offsets(0, e + 1)) ++e;
    return e;
  }
};

struct reference {
  table value, bound;
  reference(const table& before, bool keeps) : value(before), bound(before.rows, before.cols) {
    kept = keeps ? 1.0 : 0.0;
  }
  double kept = 0.0;

  /// Element (r, c) becomes kept times what it was plus the sum of term(i).
  template <class T, class F>
  void sum(index r, index c, index terms, F term) {
    double total = kept * value(r, c), size = std::abs(total);
    for (index i = 0; i < terms; ++i) {
      total += term(i);
      size += std::abs(term(i));
    }
    value(r, c) = total;
    bound(r, c) = support::sum_bound<T>(terms + 1, size);
  }
};

template <class T>
struct on_both {
  context<device> ctx;
  matrix<index, device> offsets, blocks;
  vector_view<const index, device> of_slots, of_bank;
  explicit on_both(const layout& l)
      : offsets(to_device<device>(l.offsets.view())),
        blocks(to_device<device>(l.blocks.view())),
        of_slots(offsets.data(), layout::groups + 1),
        of_bank(blocks.data(), layout::groups + 1) {}
};

template <class T>
std::string product_difference(const layout& l, index width, transpose tb, grad_mode mode) {
  support::test_random random(3);
  const bool up = tb == transpose::no;
  on_device<T> bank(support::random_matrix<T>(random, l.bank_rows(), width));
  on_device<T> a(support::random_matrix<T>(random, l.places(), up ? l.most : width));
  on_device<T> c(support::random_matrix<T>(random, l.places(), up ? width : l.most));
  on_both<T> on(l);
  ops::ragged_gemm(on.ctx, on.of_slots, on.of_bank, a.view(), bank.view(), tb, c.view(), mode);
  on.ctx.synchronise();
  reference r(support::to_table(c.host().view()), mode == grad_mode::accumulate);
  for (index s = 0; s < l.offsets(0, layout::groups); ++s) {
    const index e = l.group_of(s), first = l.blocks(0, e), ranks = l.blocks(0, e + 1) - first;
    for (index o = 0; o < (up ? width : ranks); ++o) {
      r.sum<T>(s, o, up ? ranks : width, [&](index i) {
        return double(a.host()(s, i)) *
               double(up ? bank.host()(first + i, o) : bank.host()(first + o, i));
      });
    }
  }
  return support::difference(c.now().view(), r.value, r.bound) +
         (c.intact() ? "" : "something else was written");
}

template <class T>
std::string gradient_difference(const layout& l, index width, std::span<const row_run> runs) {
  support::test_random random(4);
  on_device<T> a(support::random_matrix<T>(random, l.places(), l.most));
  on_device<T> b(support::random_matrix<T>(random, l.places(), width));
  on_device<T> dbank(support::random_matrix<T>(random, l.bank_rows(), width));
  on_both<T> on(l);
  ops::ragged_gemm_gradient(on.ctx, on.of_slots, on.of_bank, a.view(), b.view(), runs,
                            dbank.view());
  on.ctx.synchronise();
  reference r(support::to_table(dbank.host().view()), true);
  for (index e = 0; e < layout::groups; ++e) {
    const index first = l.offsets(0, e), slots = l.offsets(0, e + 1) - first;
    if (slots == 0) continue;
    for (index row = l.blocks(0, e); row < l.blocks(0, e + 1); ++row) {
      for (const row_run& run : runs) {
        if (row < run.first || row >= run.first + run.rows) continue;
        for (index d = 0; d < width; ++d) {
          r.sum<T>(run.grad_first + row - run.first, d, slots, [&](index s) {
            return double(a.host()(first + s, row - l.blocks(0, e))) *
                   double(b.host()(first + s, d));
          });
        }
      }
    }
  }
  return support::difference(dbank.now().view(), r.value, r.bound) +
         (dbank.intact() ? "" : "something else was written");
}

}  // namespace

TEST_SUITE("cuda/ragged_gemm") {
  TEST_CASE_TEMPLATE("each slot meets the block of its group, and nothing beyond it", T,
                     TALPA_SCALARS) {
    // Narrow tiles, then wide ones.
    for (const index most : {index{5}, index{66}}) {
      const layout l(most, support::device_size(129, 3001));
      CAPTURE(most);
      CHECK(product_difference<T>(l, 23, transpose::yes, grad_mode::overwrite) == "");
      CHECK(product_difference<T>(l, 23, transpose::yes, grad_mode::accumulate) == "");
      CHECK(product_difference<T>(l, 70, transpose::no, grad_mode::overwrite) == "");
      CHECK(product_difference<T>(l, 7, transpose::no, grad_mode::accumulate) == "");
    }
  }

  TEST_CASE_TEMPLATE("the gradient adds the slots of each group to the rows of any runs", T,
                     TALPA_SCALARS) {
    for (const index most : {index{5}, index{66}}) {
      const layout l(most, support::device_size(129, 3001));
      CAPTURE(most);
      const row_run all{0, l.bank_rows(), 0};
      CHECK(gradient_difference<T>(l, 67, {&all, 1}) == "");
      // From the middle of the first block into the third; the last row of all.
      const row_run some[] = {{2, most, 1}, {l.bank_rows() - 1, 1, 0}};
      CHECK(gradient_difference<T>(l, 19, some) == "");
    }
  }

  TEST_CASE("no slots write nothing") {
    const layout l(3, 1);
    on_both<float> on(l);
    const matrix<index, cpu> zeros(1, layout::groups + 1);
    on.offsets = to_device<device>(zeros.view());
    on.of_slots = {on.offsets.data(), layout::groups + 1};
    support::test_random random(5);
    on_device<float> a(support::random_matrix<float>(random, 2, 3)),
        b(support::random_matrix<float>(random, 2, 4)),
        bank(support::random_matrix<float>(random, l.bank_rows(), 4));
    ops::ragged_gemm(on.ctx, on.of_slots, on.of_bank, a.view(), bank.view(), transpose::no,
                     b.view());
    const row_run all{0, l.bank_rows(), 0};
    ops::ragged_gemm_gradient(on.ctx, on.of_slots, on.of_bank, a.view(), b.view(),
                              std::span<const row_run>(&all, 1), bank.view());
    on.ctx.synchronise();
    CHECK(support::bit_difference(b.now(), b.host()) == "");
    CHECK(support::bit_difference(bank.now(), bank.host()) == "");
  }
}

}  // namespace talpa::cuda_ragged_gemm_test
