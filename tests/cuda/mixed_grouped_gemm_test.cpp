// SPDX-License-Identifier: Apache-2.0
#include "support/parity.hpp"
#include "support/sanitized.hpp"
#include "support/scalars.hpp"
#include "support/stored.hpp"

#include <talpa/cuda/grouped_gemm.hpp>

#include <doctest/doctest.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace talpa::mixed_grouped_gemm_test {
using support::device;
using support::device_size;

namespace {

template <class C>
double number(C x) {
  return static_cast<double>(static_cast<float>(x));
}

/// A matrix on the device, its rows aligned to 16 bytes or not even its first number.
template <class T>
class placed {
 public:
  placed(matrix<T, cpu> values, bool aligned) : host_(std::move(values)), offset_(aligned ? 0 : 1) {
    const index stride = aligned ? ceil_div(host_.cols(), 8) * 8 + 8 : host_.cols() + 3;
    around_ = matrix<T, cpu>(host_.rows() + 1, stride);
    // NaN of every type, which a sum would keep.
    std::memset(static_cast<void*>(around_.data()), 0xff,
                static_cast<std::size_t>(around_.size()) * sizeof(T));
    for (index r = 0; r < host_.rows(); ++r) {
      for (index c = 0; c < host_.cols(); ++c) around_(r, offset_ + c) = host_(r, c);
    }
    device_ = to_device<device>(around_.view());
  }
  const matrix<T, cpu>& host() const { return host_; }
  matrix_view<T, device> view() {
    return device_.view().row_range(0, host_.rows()).col_range(offset_, host_.cols());
  }
  matrix_view<const T, device> input() { return view(); }
  matrix<T, cpu> now() { return to_host(view()); }
  bool intact() {
    const matrix<T, cpu> all = to_host(device_.view());
    for (index r = 0; r < all.rows(); ++r) {
      for (index c = 0; c < all.cols(); ++c) {
        const bool inside = r < host_.rows() && c >= offset_ && c < offset_ + host_.cols();
        if (!inside && std::memcmp(&all(r, c), &around_(r, c), sizeof(T)) != 0) return false;
      }
    }
    return true;
  }

 private:
  matrix<T, cpu> host_, around_;
  index offset_;
  matrix<T, device> device_;
};

/// Slots of groups of the given sizes, `spare` places behind them, and the row of each among
/// `tokens`.
struct layout {
  std::vector<index> sizes;
  index spare = 0;

  index groups() const { return static_cast<index>(sizes.size()); }
  index slots() const { return offsets()(0, groups()); }
  index places() const { return slots() + spare; }
  index tokens() const { return places() / 2 + 3; }
  matrix<index, cpu> offsets() const {
    matrix<index, cpu> all(1, groups() + 1);
    for (index e = 0; e < groups(); ++e) {
      all(0, e + 1) = all(0, e) + sizes[static_cast<std::size_t>(e)];
    }
    return all;
  }
  matrix<std::int32_t, cpu> rows() const {
    matrix<std::int32_t, cpu> all(1, places());
    for (index s = 0; s < places(); ++s) {
      // Places that are not in use name no row.
      all(0, s) = s < slots() ? static_cast<std::int32_t>((s * 7 + 2) % tokens()) : 1 << 30;
    }
    return all;
  }
};

/// Error of n products that a tensor core adds up: it aligns them to the largest and cuts them
/// off, at 2^-23 of it each, as it does the sum so far once in every 8 or 16 of them.
double tensor_bound(index n, double magnitude) {
  return support::sum_bound<float>(2 * (n + n / 8 + 2), magnitude);
}
/// Rounding of a sum to C, below the smallest normal number half the distance of two there.
template <class C>
double storage_bound(double value) {
  return support::storage_roundoff<C>() * std::abs(value) + 0x1p-25;
}

struct way {
  bool aligned = true;
  bool by_rows = false;
  grad_mode mode = grad_mode::overwrite;
};

template <class S, class C>
std::string product_difference(const layout& l, index rows, index cols, transpose tb,
                               const way& how) {
  support::test_random random(31);
  const index inner = tb == transpose::yes ? cols : rows;
  const index outer = tb == transpose::yes ? rows : cols;
  placed<S> a(support::random_stored<S>(random, how.by_rows ? l.tokens() : l.places(), inner),
              how.aligned);
  placed<S> bank(support::random_stored<S>(random, l.groups() * rows, cols), how.aligned);
  placed<C> c(support::random_stored<C>(random, l.places(), outer), how.aligned);
  const auto offsets = to_device<device>(l.offsets().view());
  const auto row_of_slot = to_device<device>(l.rows().view());
  vector_view<const std::int32_t, device> by;
  if (how.by_rows) by = {row_of_slot.data(), l.places()};
  context<device> ctx;
  ops::mixed_grouped_gemm(ctx, {offsets.data(), l.groups() + 1}, a.input(), by, bank.input(), tb,
                          c.view(), how.mode);
  ctx.synchronise();
  const auto got = c.now();
  const auto starts = l.offsets();
  const auto row = l.rows();
  for (index e = 0; e < l.groups(); ++e) {
    for (index s = starts(0, e); s < starts(0, e + 1); ++s) {
      for (index o = 0; o < outer; ++o) {
        double sum = how.mode == grad_mode::accumulate ? number(c.host()(s, o)) : 0.0;
        double size = std::abs(sum);
        for (index i = 0; i < inner; ++i) {
          const S weight =
              tb == transpose::yes ? bank.host()(e * rows + o, i) : bank.host()(e * rows + i, o);
          const double term = number(a.host()(how.by_rows ? row(0, s) : s, i)) * number(weight);
          sum += term;
          size += std::abs(term);
        }
        const double error = std::abs(number(got(s, o)) - sum);
        if (!(error <= tensor_bound(inner + 1, size) + storage_bound<C>(sum))) {
          return "slot " + std::to_string(s) + ", column " + std::to_string(o) + " is " +
                 std::to_string(number(got(s, o))) + ", expected " + std::to_string(sum);
        }
      }
    }
  }
  for (index s = l.slots(); s < l.places(); ++s) {
    for (index o = 0; o < outer; ++o) {
      if (number(got(s, o)) != number(c.host()(s, o))) return "a place without slot was written";
    }
  }
  return c.intact() ? "" : "something else was written";
}

template <class S>
std::string gradient_difference(const layout& l, index rows, index cols,
                                std::span<const row_run> runs, bool aligned, bool by_rows) {
  support::test_random random(32);
  placed<S> a(support::random_stored<S>(random, l.places(), rows), aligned);
  placed<S> b(support::random_stored<S>(random, by_rows ? l.tokens() : l.places(), cols), aligned);
  placed<float> dbank(support::random_matrix<float>(random, l.groups() * rows, cols), aligned);
  const auto offsets = to_device<device>(l.offsets().view());
  const auto row_of_slot = to_device<device>(l.rows().view());
  vector_view<const std::int32_t, device> by;
  if (by_rows) by = {row_of_slot.data(), l.places()};
  context<device> ctx;
  ops::mixed_grouped_gemm_gradient(ctx, {offsets.data(), l.groups() + 1}, a.input(), b.input(), by,
                                   runs, dbank.view());
  ctx.synchronise();
  const auto got = dbank.now();
  const auto starts = l.offsets();
  const auto row = l.rows();
  matrix<double, cpu> wanted(got.rows(), cols), size(got.rows(), cols);
  for (index i = 0; i < wanted.size(); ++i) {
    wanted.data()[i] = double(dbank.host().data()[i]);
    size.data()[i] = std::abs(wanted.data()[i]);
  }
  for (const row_run& run : runs) {
    for (index i = 0; i < run.rows; ++i) {
      const index e = (run.first + i) / rows;
      for (index s = starts(0, e); s < starts(0, e + 1); ++s) {
        for (index c = 0; c < cols; ++c) {
          const double term = number(a.host()(s, (run.first + i) % rows)) *
                              number(b.host()(by_rows ? row(0, s) : s, c));
          wanted(run.grad_first + i, c) += term;
          size(run.grad_first + i, c) += std::abs(term);
        }
      }
    }
  }
  for (index r = 0; r < got.rows(); ++r) {
    for (index c = 0; c < cols; ++c) {
      const double error = std::abs(double(got(r, c)) - wanted(r, c));
      if (!(error <= tensor_bound(l.slots() + 1, size(r, c)))) {
        return "row " + std::to_string(r) + ", column " + std::to_string(c) + " is " +
               std::to_string(got(r, c)) + ", expected " + std::to_string(wanted(r, c));
      }
    }
  }
  return dbank.intact() ? "" : "something else was written";
}

}  // namespace

TEST_SUITE("cuda/mixed_grouped_gemm") {
  TEST_CASE_TEMPLATE("products of halves agree with plain loops in double", S, TALPA_HALVES) {
    const layout few{{0, 3, 0, device_size(129, 3001), 1}, 5};
    for (const bool aligned : {true, false}) {
      for (const bool by_rows : {false, true}) {
        if (support::sanitized && aligned != by_rows) continue;
        CAPTURE(aligned);
        CAPTURE(by_rows);
        const way put{aligned, by_rows}, add{aligned, by_rows, grad_mode::accumulate};
        // Long and short sides, whole tiles and others.
        if (!support::sanitized || aligned) {
          CHECK(product_difference<S, S>(few, 16, 40, transpose::yes, put) == "");
          CHECK(product_difference<S, float>(few, 5, 130, transpose::no, add) == "");
        }
        if (!support::sanitized || !aligned) {
          CHECK(product_difference<S, float>(few, 131, 33, transpose::yes, put) == "");
          CHECK(product_difference<S, S>(few, 7, 9, transpose::no, add) == "");
        }
      }
    }
    CHECK(product_difference<S, S>({{0, 0}, 0}, 8, 8, transpose::yes, {}) == "");
    CHECK(product_difference<S, S>({{128}, 0}, 128, 200, transpose::yes, {}) == "");
    CHECK(product_difference<S, S>({{4, 2}, 0}, 64, 0, transpose::yes, {}) == "");
  }

  TEST_CASE_TEMPLATE("the gradient of a bank of halves adds the slots of each trained group", S,
                     TALPA_HALVES) {
    const layout few{{0, 3, device_size(67, 3001), 1}, 5};
    for (const bool aligned : {true, false}) {
      for (const bool by_rows : {false, true}) {
        if (support::sanitized && aligned != by_rows) continue;
        CAPTURE(aligned);
        CAPTURE(by_rows);
        for (const index rows : {index{5}, index{72}}) {
          const row_run all{0, few.groups() * rows, 0};
          CHECK(gradient_difference<S>(few, rows, 35, {&all, 1}, aligned, by_rows) == "");
        }
        // The last group in front, then the second.
        const row_run some[] = {{3 * 40, 40, 0}, {40, 40, 40}};
        CHECK(gradient_difference<S>(few, 40, 136, some, aligned, by_rows) == "");
      }
    }
  }

  TEST_CASE("shapes that do not fit are refused before any work") {
    const layout l{{1, 2}, 0};
    const auto offsets = to_device<device>(l.offsets().view());
    const matrix<bfloat16, device> a(3, 4), bank(6, 4), odd(5, 4);
    matrix<bfloat16, device> c(3, 3);
    matrix<float, device> dbank(6, 4);
    const matrix<std::int32_t, device> rows(1, 2);
    const vector_view<const index, device> starts(offsets.data(), 3);
    context<device> ctx;
    const auto product = [&](const auto& left, const auto& right, index row_count) {
      ops::mixed_grouped_gemm(ctx, starts, left.view(), {rows.data(), row_count}, right.view(),
                              transpose::yes, c.view());
    };
    CHECK_THROWS_WITH_AS(product(a, odd, 0),
                         "talpa::ops::mixed_grouped_gemm: 'bank' has shape [5, 4], expected "
                         "[P * 2, Q] = rows of all groups",
                         shape_error);
    CHECK_THROWS_WITH_AS(product(odd, bank, 0),
                         "talpa::ops::mixed_grouped_gemm: 'a' has shape [5, 4], expected [3, 4] = "
                         "slots, inner size of the bank's blocks",
                         shape_error);
    CHECK_THROWS_WITH_AS(
        product(a, bank, 2),
        "talpa::ops::mixed_grouped_gemm: 'row_of_slot' has shape [2], expected [3] = "
        "one row a slot",
        shape_error);
    const row_run all{0, 6, 0};
    CHECK_THROWS_WITH_AS(
        ops::mixed_grouped_gemm_gradient(ctx, starts, std::as_const(c).view(), odd.view(), {},
                                         std::span<const row_run>(&all, 1), dbank.view()),
        "talpa::ops::mixed_grouped_gemm_gradient: 'b' has shape [5, 4], expected [3, 4] = "
        "slots of a, columns of dbank",
        shape_error);
  }
}

}  // namespace talpa::mixed_grouped_gemm_test
