// SPDX-License-Identifier: Apache-2.0
#include "support/parity.hpp"
#include "support/sanitized.hpp"
#include "support/scalars.hpp"

#include <talpa/cpu/limit_experts.hpp>
#include <talpa/cuda/limit_experts.hpp>

#include <doctest/doctest.h>

#include <limits>

namespace talpa::cuda_limit_experts_test {
using support::device;
using support::on_device;

namespace {

struct part_of {
  index numerator, denominator;
  TALPA_HD index operator()(index tokens) const { return tokens * numerator / denominator; }
};

/// Scores in steps of 1/4, so that many are equal, zeros of both signs and infinities among them.
template <class T>
matrix<T, cpu> coarse_scores(support::test_random& random, index tokens, index experts) {
  matrix<T, cpu> scores(tokens, experts);
  for (index i = 0; i < scores.size(); ++i) {
    const index x = random.below(24);
    scores.data()[i] = x == 0   ? std::numeric_limits<T>::infinity()
                       : x == 1 ? -std::numeric_limits<T>::infinity()
                       : x < 4  ? -T{0}
                                : static_cast<T>(x - 12) / T{4};
  }
  return scores;
}

/// The masks of both backends; about one expert in `every` is off before.
template <class T>
std::string difference(const matrix<T, cpu>& scores, bool padded, index length, part_of limit,
                       limit_order order, index every = 4) {
  support::test_random random(61);
  const index tokens = scores.rows(), experts = scores.cols();
  matrix<std::uint32_t, cpu> mask(tokens, mask_words(experts));
  vector<std::uint8_t, cpu> real(padded ? tokens : 0);
  for (index n = 0; n < tokens; ++n) {
    if (padded) real[n] = random.below(5) != 0 ? 1 : 0;
    for (index e = 0; e < experts; ++e) {
      if (random.below(every) != 0) mask(n, e / 32) |= 1u << (e % 32);
    }
  }
  on_device<T> device_scores(scores);
  on_device<std::uint32_t> device_mask(mask);
  auto device_real = to_device<device>(as_column(real.view()));
  context<cpu> host(1);
  ops::limit_experts(host, scores.view(), real.view(), length, limit, order, mask.view());
  context<device> ctx;
  ops::limit_experts(ctx, matrix_view<const T, device>(device_scores.view()),
                     {device_real.data(), device_real.rows()}, length, limit, order,
                     device_mask.view());
  ctx.synchronise();
  return support::bit_difference(device_mask.now(), mask) +
         (device_mask.intact() ? "" : "something else was written");
}

}  // namespace

TEST_SUITE("cuda/limit_experts") {
  TEST_CASE_TEMPLATE("limit_experts keeps the tokens that the host keeps", T, TALPA_SCALARS) {
    support::test_random random(62);
    const index tokens = support::device_size(129, 5003);
    matrix<T, cpu> scores = support::random_matrix<T>(random, tokens, 5);
    scores(7, 2) = std::numeric_limits<T>::quiet_NaN();
    CHECK(difference(scores, true, 0, {1, 3}, limit_order::position) == "");
    CHECK(difference(scores, true, 0, {1, 3}, limit_order::score) == "");
    const auto coarse = coarse_scores<T>(random, 2 * support::device_size(33, 699), 33);
    CHECK(difference(coarse, true, coarse.rows() / 2, {1, 3}, limit_order::score) == "");
    CHECK(difference(coarse, false, 3, {1, 3}, limit_order::position) == "");
  }

  TEST_CASE("a sequence of several blocks of tokens, whose last ones are in any of them") {
    support::test_random random(64);
    const auto coarse = coarse_scores<float>(random, 1400, 3);
    for (const index length : {index{0}, index{700}}) {
      if (support::sanitized && length == 0) continue;
      CAPTURE(length);
      for (const limit_order order : {limit_order::position, limit_order::score}) {
        CHECK(difference(coarse, true, length, {1, 2}, order) == "");
        if (support::sanitized) continue;
        CHECK(difference(coarse, false, length, {1, 40}, order) == "");
        CHECK(difference(coarse, false, length, {1, 1}, order, 50) == "");
      }
    }
  }

  TEST_CASE("no token, one token, and a limit of nothing") {
    support::test_random random(63);
    for (const limit_order order : {limit_order::position, limit_order::score}) {
      CHECK(difference(matrix<float, cpu>(0, 3), false, 0, {1, 1}, order) == "");
      CHECK(difference(coarse_scores<float>(random, 1, 3), false, 0, {2, 1}, order) == "");
      CHECK(difference(coarse_scores<float>(random, 5, 3), false, 0, {-1, 1}, order) == "");
    }
  }

  TEST_CASE("of equal scores the earlier are kept") {
    matrix<float, cpu> scores(40, 2);
    for (index n = 0; n < 40; ++n) scores(n, 0) = n % 2 == 0 ? 0.0f : -0.0f;
    CHECK(difference(scores, false, 0, {1, 2}, limit_order::score) == "");
  }
}

}  // namespace talpa::cuda_limit_experts_test
