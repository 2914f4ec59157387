// SPDX-License-Identifier: Apache-2.0
#include "support/random.hpp"

#include <talpa/analysis/best_subset.hpp>
#include <talpa/core/error.hpp>

#include <doctest/doctest.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

namespace talpa::best_subset_test {

using namespace support;

namespace {

/// The bits with k ones whose sum of outputs is nearest, by counting through all masks; of equal
/// ones that with the lowest experts, which is the first in lexicographic order.
std::uint32_t slow_subset(const matrix<double, cpu>& outputs, const matrix<double, cpu>& target,
                          index experts, index k, index n) {
  std::uint32_t best = 0;
  double least = std::numeric_limits<double>::infinity();
  for (std::uint32_t mask = 0; mask < (1u << experts); ++mask) {
    if (std::popcount(mask) != k) continue;
    double squares = 0.0;
    for (index d = 0; d < target.cols(); ++d) {
      double sum = -target(n, d);
      for (index e = 0; e < experts; ++e) {
        if ((mask >> e & 1u) != 0) sum += outputs(e * target.rows() + n, d);
      }
      squares += sum * sum;
    }
    if (squares < least) {
      least = squares;
      best = mask;
    }
  }
  return best;
}

}  // namespace

TEST_SUITE("analysis/best_subset") {
  TEST_CASE("pairs that add up to the target, by hand") {
    // One feature: experts say 1, 5, -3, 2; token 0 wants 2 = 5 - 3, token 1 wants 3 = 1 + 2.
    matrix<double, cpu> outputs(8, 1), target(2, 1);
    const double said[] = {1.0, 5.0, -3.0, 2.0};
    for (index e = 0; e < 4; ++e) outputs(2 * e, 0) = outputs(2 * e + 1, 0) = said[e];
    target(0, 0) = 2.0;
    target(1, 0) = 3.0;
    const auto mask = best_subset{.k = 2}(outputs.view(), target, 4);
    CHECK(mask(0, 0) == 0b0110u);
    CHECK(mask(1, 0) == 0b1001u);
    // One by one expert 3 is the nearest to 2, and expert 0 or 3 to 3.
    CHECK(best_subset{.k = 1}(outputs.view(), target, 4)(0, 0) == 0b1000u);
    CHECK(best_subset{.k = 4}(outputs.view(), target, 4)(1, 0) == 0b1111u);
  }

  TEST_CASE("best_subset agrees with a search through all masks") {
    test_random random(51);
    for (const index experts : {1, 2, 5, 9}) {
      for (index k = 1; k <= experts; k += 2) {
        const auto outputs = random_matrix<double>(random, experts * 6, 4);
        const auto target = random_matrix<double>(random, 6, 4);
        const auto mask = best_subset{.k = k}(outputs.view(), target, experts);
        bool same = true;
        for (index n = 0; n < 6; ++n) {
          same = same && mask(n, 0) == slow_subset(outputs, target, experts, k, n);
        }
        CHECK(same);
      }
    }
  }

  TEST_CASE("equal sets: the first; NaN: the first; beyond one word of the mask") {
    matrix<float, cpu> outputs(40, 2), target(1, 2);
    CHECK(best_subset{.k = 3}(outputs.view(), target, 40)(0, 0) == 0b111u);
    outputs(37, 0) = 1.0F;
    target(0, 0) = 1.0F;
    const auto mask = best_subset{.k = 1}(outputs.view(), target, 40);
    CHECK(mask(0, 0) == 0u);
    CHECK(mask(0, 1) == 1u << 5);
    outputs(0, 0) = std::nanf("");
    target(0, 1) = std::nanf("");
    CHECK(best_subset{.k = 2}(outputs.view(), target, 40)(0, 0) == 0b11u);
  }

  TEST_CASE("what does not fit is refused") {
    const matrix<float, cpu> outputs(8, 3), target(2, 3);
    CHECK_THROWS_WITH_AS(best_subset{.k = 5}(outputs.view(), target, 4),
                         "talpa::best_subset: 'k' is 5, expected 1..4 = experts", value_error);
    CHECK_THROWS_WITH_AS(best_subset{}(outputs.view(), target, 0),
                         "talpa::best_subset: 'experts' is 0, expected >= 1 = at least one expert",
                         value_error);
    CHECK_THROWS_WITH_AS(
        best_subset{.k = 2}(outputs.view(), target, 3),
        "talpa::best_subset: 'outputs' has shape [8, 3], expected [6, 3] = experts "
        "x tokens, width of target",
        shape_error);
  }
}

}  // namespace talpa::best_subset_test
