// SPDX-License-Identifier: Apache-2.0
#include "support/parity.hpp"

#include <talpa/cpu/assign_balanced.hpp>
#include <talpa/cpu/limit_experts.hpp>
#include <talpa/cpu/select.hpp>
#include <talpa/cpu/sinkhorn.hpp>
#include <talpa/cuda/assign_balanced.hpp>
#include <talpa/cuda/limit_experts.hpp>
#include <talpa/cuda/select.hpp>
#include <talpa/cuda/sinkhorn.hpp>
#include <talpa/selectors/base_assignment.hpp>
#include <talpa/selectors/capacity.hpp>
#include <talpa/selectors/expert_choice.hpp>
#include <talpa/selectors/sinkhorn.hpp>

#include <doctest/doctest.h>

#include <limits>

namespace talpa::cuda_coupled_selectors_test {
using support::device;
using support::on_device;

namespace {

/// A batch with what takes no part in between: padding, NaN, rows of -inf; and masked experts.
template <class T>
struct batch {
  matrix<T, cpu> logits, dgates;
  vector<std::uint8_t, cpu> real;

  batch(index tokens, index experts) : real(tokens) {
    support::test_random random(81);
    logits = support::random_matrix<T>(random, tokens, experts, 2.0);
    dgates = support::random_matrix<T>(random, tokens, experts);
    constexpr T infinity = std::numeric_limits<T>::infinity();
    for (index n = 0; n < tokens; ++n) {
      real[n] = random.below(6) != 0 ? 1 : 0;
      if (n % 9 == 4) logits(n, n % experts) = -infinity;
      if (n % 13 == 6) logits(n, n % experts) = std::numeric_limits<T>::quiet_NaN();
      if (n % 23 == 8) std::fill_n(logits.data() + n * experts, experts, -infinity);
      // Equal logits: ties decide.
      if (n % 5 == 3)
        std::copy_n(logits.data() + (n - 1) * experts, experts, logits.data() + n * experts);
    }
  }
};

/// Empty when mask, gates and gradients of both backends have the same bits.
template <class T, class Selector>
std::string difference(const Selector& selector, index tokens, index experts,
                       index sequence_length = 0) {
  const batch<T> of(tokens, experts);
  matrix<std::uint32_t, cpu> mask(tokens, mask_words(experts));
  matrix<T, cpu> gates(tokens, experts), dlogits(tokens, experts);
  on_device<T> logits(of.logits), dgates(of.dgates), device_gates(gates), device_dlogits(dlogits);
  on_device<std::uint32_t> device_mask(mask);
  const auto real = to_device<device>(as_column(of.real.view()));

  context<cpu> host(1);
  select_inputs<T, cpu> more;
  more.sequence_length = sequence_length;
  ops::select(host, selector, of.logits, of.real.view(), gates.view(), mask.view(), more);
  ops::select_backward(host, selector, of.logits, gates, mask, of.dgates, dlogits.view(), more);

  context<device> ctx;
  select_inputs<T, device> device_more;
  device_more.sequence_length = sequence_length;
  ops::select(ctx, selector, logits.view(), {real.data(), tokens}, device_gates.view(),
              device_mask.view(), device_more);
  ops::select_backward(ctx, selector, logits.view(), device_gates.view(), device_mask.view(),
                       dgates.view(), device_dlogits.view(), device_more);
  ctx.synchronise();
  const bool intact = device_mask.intact() && device_gates.intact() && device_dlogits.intact();
  return support::bit_difference(device_mask.now(), mask) +
         support::bit_difference(device_gates.now(), gates) +
         support::bit_difference(device_dlogits.now(), dlogits) +
         (intact ? "" : "something else was written");
}

using dropped_by_probability = capacity_top_k<gate::renormalised, overflow::by_probability>;
using switch_capacity =
    capacity_top_k<gate::raw, overflow::by_position, capacity::fixed, capacity::per_sequence>;

}  // namespace

TEST_SUITE("cuda/coupled_selectors") {
  TEST_CASE("capacity_top_k has the bits of the host") {
    for (const index tokens : {index{0}, index{1}, support::device_size(60, 3000)}) {
      CAPTURE(tokens);
      CHECK(difference<float>(dropped_by_probability{2, {0.7}}, tokens, 5) == "");
    }
    CHECK(difference<float>(dropped_by_probability{3, {0.9}}, support::device_size(20, 900), 40) ==
          "");
  }

  TEST_CASE("capacity of each sequence has the bits of the host") {
    const index length = support::device_size(15, 600);
    CHECK(difference<float>(switch_capacity{1, {2}}, 3 * length, 4, length) == "");
    CHECK(difference<float>(switch_capacity{1, {length}}, 3 * length, 4) == "");
  }

  TEST_CASE("expert_choice has the bits of the host") {
    for (const index tokens : {index{0}, index{1}, support::device_size(60, 3000)}) {
      CAPTURE(tokens);
      CHECK(difference<float>(expert_choice{1.3}, tokens, 5) == "");
    }
    CHECK(difference<float>(expert_choice{100.0}, 20, 5) == "");
    CHECK(difference<float>(expert_choice{2.0}, support::device_size(20, 900), 40) == "");
  }

  // Up to 256 tokens the plan has the bits of the host, too.
  TEST_CASE("sinkhorn has the bits of the host") {
    const index tokens = support::device_size(30, 250);
    CHECK(difference<float>(sinkhorn{1, 1e-2, 2}, 0, 5) == "");
    CHECK(difference<float>(sinkhorn{1, 1e-2, 2}, 1, 5) == "");
    CHECK(difference<float>(sinkhorn{1, 1e-2, 3}, tokens, 5) == "");
    CHECK(difference<float>(sinkhorn{2, 1e-4, 2}, tokens, 5) == "");
    CHECK(difference<float>(sinkhorn{2}.at(mode::inference), tokens, 5) == "");
    CHECK(difference<float>(sinkhorn{3, 1e-2, 2}, 10, 40) == "");
  }

  TEST_CASE("base_assignment has the bits of the host") {
    for (const index tokens : {index{0}, index{1}, support::device_size(17, 700)}) {
      CAPTURE(tokens);
      CHECK(difference<float>(base_assignment{}, tokens, 5) == "");
      CHECK(difference<float>(base_assignment{}.at(mode::inference), tokens, 5) == "");
    }
    CHECK(difference<float>(base_assignment{}, support::device_size(9, 300), 40) == "");
  }
}

}  // namespace talpa::cuda_coupled_selectors_test
