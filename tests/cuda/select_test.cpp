// SPDX-License-Identifier: Apache-2.0
#include "support/sanitized.hpp"
#include "support/scalars.hpp"
#include "support/selection.hpp"

#include <talpa/cuda/warp_tile.hpp>
#include <talpa/selectors/dynamic_entropy.hpp>
#include <talpa/selectors/top_k.hpp>
#include <talpa/selectors/top_p.hpp>

#include <doctest/doctest.h>

#include <cmath>
#include <limits>

namespace talpa::cuda_select_test {
using support::selection_difference;

namespace {

/// Numbers of experts that meet each lane group, with and without a free place at the end.
constexpr index row_sizes[] = {1, 5, 8, 16, 23, 32, 40, 64, 100, 128, 300};

/// Empty when the steps give a / b for each of the pairs that they claim to.
template <class T>
std::string quotient_difference(support::test_random& random, int pairs) {
  using over = detail::exact_quotient<T>;
  int covered = 0;
  for (int i = 0; i < pairs; ++i) {
    // Mantissas with all, few or many bits set are the hard ones.
    const auto number = [&](int exponents) {
      T m = T{1} + static_cast<T>(random.uniform(0.0, 1.0));
      if (i % 3 == 1) m = std::nextafter(T{2}, T{0}) - static_cast<T>(random.below(4)) * T(0x1p-22);
      if (i % 5 == 2)
        m = T{1} + static_cast<T>(random.below(4)) * std::numeric_limits<T>::epsilon();
      return std::ldexp(m, static_cast<int>(random.below(2 * exponents)) - exponents);
    };
    const T b = number(12), a = random.below(9) == 0 ? T{0} : number(90);
    const over q(b);
    if (!q.covers() || !over::covers(a)) continue;
    ++covered;
    const T got = q(a), wanted = a / b;
    if (std::memcmp(&got, &wanted, sizeof(T)) != 0) {
      return std::to_string(a) + " / " + std::to_string(b);
    }
  }
  return covered > pairs / 3 ? "" : "few pairs are covered";
}

}  // namespace

TEST_SUITE("cuda/select") {
  TEST_CASE_TEMPLATE("division by multiply-adds has the bits of division", T, TALPA_SCALARS) {
    support::test_random random(91);
    CHECK(quotient_difference<T>(random, 200000) == "");
    using over = detail::exact_quotient<T>;
    for (const T a : {std::numeric_limits<T>::denorm_min(), over::least / T{2}}) {
      CAPTURE(a);
      CHECK_FALSE(over::covers(a));
      CHECK_FALSE(over(a).covers());
      const T several[] = {T{1}, T{0}, a, over::least};
      CHECK_FALSE(over::covers(several, 4));
      CHECK(over::covers(several, 2));
    }
    const T nan = std::numeric_limits<T>::quiet_NaN(), quotient = over(T{3})(nan);
    CHECK(quotient != quotient);
    CHECK_FALSE(over(nan).covers());
    CHECK_FALSE(over(T{0}).covers());
    CHECK_FALSE(over(std::numeric_limits<T>::infinity()).covers());
  }

  TEST_CASE("top_k has the bits of the host for every lane group") {
    const index tokens = support::device_size(29, 1000);
    for (const index experts : row_sizes) {
      for (const index k : {index{1}, index{4}, index{7}, index{8}, index{11}}) {
        if (k > experts || (k == 7 && experts != 128 && experts != 40)) continue;
        if (support::sanitized && k != 1 && k != 8) continue;
        CAPTURE(experts);
        CAPTURE(k);
        CHECK(selection_difference<float>(top_k<gate::renormalised>{k}, tokens, experts) == "");
      }
    }
    CHECK(selection_difference<float>(top_k<gate::renormalised>{2}, 0, 8) == "");
    CHECK(selection_difference<double>(top_k<gate::renormalised>{8}, tokens, 64) == "");
  }

  TEST_CASE("logits far apart, whose weights are subnormal or nothing, have the bits of the host") {
    const index tokens = support::device_size(29, 1000);
    for (const index experts : {index{8}, index{64}, index{128}}) {
      CAPTURE(experts);
      CHECK(selection_difference<float>(top_k<gate::raw>{8}, tokens, experts, 0, 40.0) == "");
      // Of some warps all rows have their eight within 45, of others some have not.
      for (const double spread : {5.0, 15.0, 40.0}) {
        CHECK(selection_difference<float>(top_k<gate::renormalised>{8}, tokens, experts, 0,
                                          spread) == "");
      }
    }
  }

  TEST_CASE("raw gates have the bits of the host") {
    const index tokens = support::device_size(29, 1000);
    CHECK(selection_difference<float>(top_k<gate::raw>{3}, tokens, 5) == "");
    CHECK(selection_difference<float>(top_k<gate::raw>{3}, tokens, 32) == "");
  }

  TEST_CASE("dynamic_entropy has the bits of the host") {
    const index tokens = support::device_size(29, 1000);
    for (const index experts : {index{5}, index{8}, index{64}, index{128}}) {
      CAPTURE(experts);
      CHECK(selection_difference<float>(dynamic_entropy<>{.threshold = 0.7}, tokens, experts) ==
            "");
    }
    CHECK(selection_difference<double>(dynamic_entropy<>{.threshold = 0.7}, tokens, 20) == "");
  }

  TEST_CASE("top_p has the bits of the host wherever it ends") {
    using kept = top_p<gate::raw, crossing::kept>;
    using dropped = top_p<gate::raw, crossing::dropped>;
    const index tokens = support::device_size(29, 1000);
    for (const index experts : {index{3}, index{23}, index{128}, index{300}}) {
      if (support::sanitized && experts != 23 && experts != 128) continue;
      CAPTURE(experts);
      for (const double p : {0.0, 0.6, 0.999, 1.0}) {
        if (support::sanitized && p != 0.6) continue;
        CAPTURE(p);
        const bool inclusive = experts != 23;
        CHECK(selection_difference<float>(kept{p, 1, inclusive}, tokens, experts, 0, 0.3) == "");
        CHECK(selection_difference<float>(dropped{p, 7}, tokens, experts) == "");
      }
      const index beyond = index{1} << 40;
      CHECK(selection_difference<float>(dropped{0.5, beyond}, tokens, experts) == "");
    }
  }
}

}  // namespace talpa::cuda_select_test
