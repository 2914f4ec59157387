// SPDX-License-Identifier: Apache-2.0
#include "support/both_segments.hpp"
#include "support/parity.hpp"
#include "support/scalars.hpp"

#include <talpa/cpu/indexed_gemm.hpp>
#include <talpa/cuda/indexed_gemm.hpp>
#include <talpa/cuda/segments.hpp>

#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <span>
#include <string>
#include <vector>

namespace talpa::cuda_indexed_gemm_test {
using support::both_segments;
using support::device;
using support::on_device;

namespace {

struct sizes {
  index tokens, experts, ranks, cols;
};

/// Rows of z beyond the slots in use hold NaN: nobody may look at them.
template <class T>
matrix<T, cpu> over_slots(support::test_random& random, const segments<cpu>& s, index cols) {
  matrix<T, cpu> z = support::random_matrix<T>(random, s.capacity(), cols);
  for (index i = s.offsets[s.experts()]; i < z.rows(); ++i) {
    for (index c = 0; c < cols; ++c) z(i, c) = std::numeric_limits<T>::quiet_NaN();
  }
  return z;
}
matrix<double, cpu> magnitudes(matrix<double, cpu> m) {
  for (index i = 0; i < m.size(); ++i) m.data()[i] = std::abs(m.data()[i]);
  return m;
}

/// Empty, or the first of `rows` rows with an element further from the host's in double than the
/// bound of a sum of that many terms, whose sizes add up to `size`.
template <class T>
std::string difference(const matrix<T, cpu>& found, const matrix<double, cpu>& wanted,
                       const matrix<double, cpu>& size, index terms, index rows) {
  for (index r = 0; r < rows; ++r) {
    for (index c = 0; c < found.cols(); ++c) {
      // Both sides round.
      const double bound = support::sum_bound<T>(terms + 1, size(r, c)) +
                           support::sum_bound<double>(terms + 1, size(r, c));
      if (!(std::abs(static_cast<double>(found(r, c)) - wanted(r, c)) <= bound)) {
        return "row " + std::to_string(r) + ", column " + std::to_string(c);
      }
    }
  }
  return "";
}

template <class T>
void compare(const sizes& z) {
  CAPTURE(z.tokens);
  CAPTURE(z.experts);
  CAPTURE(z.ranks);
  CAPTURE(z.cols);
  context<cpu> host(1);
  context<device> ctx;
  const both_segments s(host, ctx, z.tokens, z.experts);
  const index places = s.host.capacity(), used = s.host.offsets[z.experts];
  support::test_random random(21);
  on_device<T> x(support::random_matrix<T>(random, z.tokens, z.cols));
  on_device<T> bank(support::random_matrix<T>(random, z.experts * z.ranks, z.cols));
  const auto xd = support::in_double(x.host()), bankd = support::in_double(bank.host());
  const auto x_size = magnitudes(xd), bank_size = magnitudes(bankd);

  on_device<T> u(support::random_matrix<T>(random, places, z.ranks));
  ops::indexed_shrink(ctx, s.on, x.view(), bank.view(), u.view());
  ctx.synchronise();
  matrix<double, cpu> ud(places, z.ranks), u_size(places, z.ranks);
  ops::indexed_shrink(host, s.host, xd, bankd, ud.view());
  ops::indexed_shrink(host, s.host, x_size, bank_size, u_size.view());
  CHECK(difference(u.now(), ud, u_size, z.cols, used) == "");
  CHECK(u.intact());
  for (index i = used; i < places; ++i) CHECK(u.now()(i, 0) == u.host()(i, 0));

  on_device<T> factors(over_slots<T>(random, s.host, z.ranks));
  const auto factorsd = support::in_double(factors.host());
  const auto factors_size = magnitudes(factorsd);
  for (const grad_mode mode : {grad_mode::overwrite, grad_mode::accumulate}) {
    on_device<T> y(support::random_matrix<T>(random, z.tokens, z.cols));
    ops::indexed_expand(ctx, s.on, factors.view(), bank.view(), y.view(), mode);
    ctx.synchronise();
    auto yd = support::in_double(y.host()), y_size = magnitudes(yd);
    ops::indexed_expand(host, s.host, factorsd, bankd, yd.view(), mode);
    ops::indexed_expand(host, s.host, factors_size, bank_size, y_size.view(), mode);
    CHECK(difference(y.now(), yd, y_size, 3 * z.ranks + 1, z.tokens) == "");
    CHECK(y.intact());
  }

  std::vector<row_run> runs;  // of every second expert
  for (index e = 0; e < z.experts; e += 2) {
    runs.push_back({e * z.ranks, z.ranks, static_cast<index>(runs.size()) * z.ranks});
  }
  const std::span<const row_run> trained(runs);
  on_device<T> dbank(
      support::random_matrix<T>(random, static_cast<index>(runs.size()) * z.ranks, z.cols));
  ops::indexed_gradient(ctx, s.on, factors.view(), x.view(), trained, dbank.view());
  ctx.synchronise();
  auto dbankd = support::in_double(dbank.host()), dbank_size = magnitudes(dbankd);
  ops::indexed_gradient(host, s.host, factorsd, xd, trained, dbankd.view());
  ops::indexed_gradient(host, s.host, factors_size, x_size, trained, dbank_size.view());
  CHECK(difference(dbank.now(), dbankd, dbank_size, z.tokens + 1, dbank.host().rows()) == "");
  CHECK(dbank.intact());
}

}  // namespace

TEST_SUITE("cuda/indexed_gemm") {
  TEST_CASE_TEMPLATE("products of rows by index agree with the host", T, TALPA_SCALARS) {
    compare<T>({0, 3, 4, 9});
    compare<T>({1, 1, 1, 1});
    compare<T>({support::device_size(70, 2000), 5, 3, 23});
    compare<T>({support::device_size(67, 4099), 40, 8, 64});
    compare<T>({9, 4, 17, 140});
  }

  // The quads of columns of one launch are the single columns of another.
  TEST_CASE("aligned and unaligned rows have the same bits") {
    context<cpu> host(1);
    context<device> ctx;
    constexpr index tokens = 30, experts = 6, ranks = 4, cols = 24;
    const both_segments s(host, ctx, tokens, experts);
    support::test_random random(22);
    const auto z = over_slots<float>(random, s.host, ranks);
    const auto bank = support::random_matrix<float>(random, experts * ranks, cols);
    const auto z_on = to_device<device>(z.view()), bank_on = to_device<device>(bank.view());
    on_device<float> apart(bank);
    matrix<float, device> quads(tokens, cols), singles(tokens, cols);
    ops::indexed_expand(ctx, s.on, z_on, bank_on, quads.view(), grad_mode::overwrite);
    ops::indexed_expand(ctx, s.on, z_on, apart.view(), singles.view(), grad_mode::overwrite);
    ctx.synchronise();
    CHECK(support::bit_difference(to_host(quads.view()), to_host(singles.view())) == "");
  }

  TEST_CASE("a token with slots beyond the places gets NaN, the others what they are due") {
    context<device> ctx;
    const auto mask = support::crowded_mask();
    const segments<device> s = support::crowded_segments(ctx, mask.view());
    matrix<float, cpu> values(4, 1), rows(2, 1);
    for (index i = 0; i < 4; ++i) values(i, 0) = static_cast<float>(i + 1);
    rows(0, 0) = 1.0f, rows(1, 0) = 10.0f;
    const auto z = to_device<device>(values.view()), bank = to_device<device>(rows.view());
    matrix<float, device> y(3, 1);
    ops::indexed_expand(ctx, s, z, bank, y.view(), grad_mode::overwrite);
    ctx.synchronise();
    const auto sums = to_host(y.view());
    CHECK(sums(0, 0) == 1.0f + 40.0f);
    CHECK(std::isnan(sums(1, 0)));
    CHECK(std::isnan(sums(2, 0)));
  }
}

}  // namespace talpa::cuda_indexed_gemm_test
