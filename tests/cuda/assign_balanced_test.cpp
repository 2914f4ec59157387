// SPDX-License-Identifier: Apache-2.0
#include "support/parity.hpp"
#include "support/scalars.hpp"

#include <talpa/cpu/assign_balanced.hpp>
#include <talpa/cuda/assign_balanced.hpp>

#include <doctest/doctest.h>

#include <limits>

namespace talpa::cuda_assign_balanced_test {
using support::device;
using support::on_device;

namespace {

/// The masks of both backends; bits of rows that take no part must stay.
template <class T>
std::string difference(const matrix<T, cpu>& scores, index padding_every = 0) {
  const index tokens = scores.rows();
  matrix<std::uint32_t, cpu> mask(tokens, mask_words(scores.cols()));
  std::fill_n(mask.data(), mask.size(), 0x5au);
  vector<std::uint8_t, cpu> real(padding_every > 0 ? tokens : 0);
  for (index n = 0; n < real.size(); ++n) real[n] = n % padding_every != 1 ? 1 : 0;
  on_device<T> device_scores(scores);
  on_device<std::uint32_t> device_mask(mask);
  auto device_real = to_device<device>(as_column(real.view()));
  context<cpu> host(1);
  ops::assign_balanced(host, scores.view(), real.view(), mask.view());
  context<device> ctx;
  ops::assign_balanced(ctx, matrix_view<const T, device>(device_scores.view()),
                       {device_real.data(), device_real.rows()}, device_mask.view());
  ctx.synchronise();
  return support::bit_difference(device_mask.now(), mask) +
         (device_mask.intact() ? "" : "something else was written");
}

}  // namespace

TEST_SUITE("cuda/assign_balanced") {
  TEST_CASE_TEMPLATE("assign_balanced finds the assignment of the host", T, TALPA_SCALARS) {
    support::test_random random(71);
    // Without ties, with many, and with masked experts; more experts than a warp has lanes.
    CHECK(difference(support::random_matrix<T>(random, support::device_size(33, 1003), 5), 7) ==
          "");
    matrix<T, cpu> coarse(support::device_size(21, 403), 4);
    for (index i = 0; i < coarse.size(); ++i) coarse.data()[i] = static_cast<T>(random.below(3));
    CHECK(difference(coarse) == "");
    matrix<T, cpu> masked = support::random_matrix<T>(random, support::device_size(19, 400), 3);
    for (index n = 0; n < masked.rows(); ++n) {
      for (index e = 1; e < 3; ++e) {
        if (random.below(2) == 0) masked(n, e) = -std::numeric_limits<T>::infinity();
      }
    }
    CHECK(difference(masked) == "");
    CHECK(difference(support::random_matrix<T>(random, support::device_size(36, 700), 35), 5) ==
          "");
  }

  TEST_CASE("tokens that cannot be routed keep their bits") {
    support::test_random random(72);
    matrix<double, cpu> scores = support::random_matrix<double>(random, 9, 2);
    scores(0, 1) = std::numeric_limits<double>::quiet_NaN();
    scores(3, 0) = std::numeric_limits<double>::infinity();
    scores(4, 0) = scores(4, 1) = -std::numeric_limits<double>::infinity();
    scores(5, 0) = 1e308;  // differences would overflow
    scores(6, 0) = -1e308;
    CHECK(difference(scores) == "");
    CHECK(difference(matrix<double, cpu>(0, 3)) == "");
    CHECK(difference(matrix<double, cpu>(1, 1)) == "");
    matrix<float, cpu> none(3, 2);
    std::fill_n(none.data(), none.size(), std::numeric_limits<float>::quiet_NaN());
    CHECK(difference(none) == "");
  }
}

}  // namespace talpa::cuda_assign_balanced_test
