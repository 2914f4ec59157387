// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "support/parity.hpp"

#include <talpa/cpu/select.hpp>
#include <talpa/cuda/select.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>

// Selectors of a device beside those of the host.

namespace talpa::support {

/// A batch with what takes no part in between: padding, NaN, rows of -inf; and masked experts.
/// Logits are normal numbers times `spread`.
template <class T>
struct selection_batch {
  matrix<T, cpu> logits, dgates;
  vector<std::uint8_t, cpu> real;

  selection_batch(index tokens, index experts, double spread) : real(tokens) {
    test_random random(81);
    logits = random_matrix<T>(random, tokens, experts, spread);
    dgates = random_matrix<T>(random, tokens, experts);
    constexpr T infinity = std::numeric_limits<T>::infinity();
    for (index n = 0; n < tokens; ++n) {
      real[n] = random.below(6) != 0 ? 1 : 0;
      // Rows that need care, but in every second stretch of 16 rows, the most that a warp routes at
      // a time: without such a row it takes shorter ways.
      if (n / 16 % 2 == 0) {
        if (n % 9 == 4) logits(n, n % experts) = -infinity;
        if (n % 13 == 6) logits(n, n % experts) = std::numeric_limits<T>::quiet_NaN();
        if (n % 23 == 8) std::fill_n(logits.data() + n * experts, experts, -infinity);
      }
      // Equal logits, in other rows and in the same one: ties decide.
      if (n % 5 == 3) {
        std::copy_n(logits.data() + (n - 1) * experts, experts, logits.data() + n * experts);
      }
      if (n % 4 == 1) {
        for (index e = 0; e < experts; ++e) logits(n, e) = std::round(logits(n, e));
      }
    }
  }
};

/// What a selector reads beside logits, where it does: a number a token, one of them NaN, and one
/// an expert.
template <class T, class Selector>
struct selection_numbers {
  matrix<T, cpu> control, bias;

  selection_numbers(index tokens, index experts) {
    test_random random(83);
    if constexpr (controlled_selector<Selector>) {
      control = random_matrix<T>(random, tokens, 1, 2.0);
      if (tokens > 5) control(5, 0) = std::numeric_limits<T>::quiet_NaN();
    }
    if constexpr (biased_selector<Selector>) bias = random_matrix<T>(random, 1, experts, 0.25);
  }
};

/// Empty when mask, gates and gradients of both backends have the same bits.
template <class T, class Selector>
std::string selection_difference(const Selector& selector, index tokens, index experts,
                                 index sequence_length = 0, double spread = 2.0) {
  const selection_batch<T> of(tokens, experts, spread);
  const selection_numbers<T, Selector> beside(tokens, experts);
  matrix<std::uint32_t, cpu> mask(tokens, mask_words(experts));
  matrix<T, cpu> gates(tokens, experts), dlogits(tokens, experts);
  matrix<T, cpu> dcontrol(beside.control.rows(), beside.control.cols());
  on_device<T> logits(of.logits), dgates(of.dgates), device_gates(gates), device_dlogits(dlogits);
  on_device<T> control(beside.control), bias(beside.bias), device_dcontrol(dcontrol);
  constexpr bool controlled = controlled_selector<Selector>;
  on_device<std::uint32_t> device_mask(mask);
  const auto real = to_device<device>(as_column(of.real.view()));

  context<cpu> host(1);
  const select_inputs<T, cpu> more{beside.control, beside.bias, sequence_length};
  ops::select(host, selector, of.logits, of.real.view(), gates.view(), mask.view(), more);
  ops::select_backward(host, selector, of.logits, gates, mask, of.dgates, dlogits.view(), more,
                       controlled ? dcontrol.view() : matrix_view<T, cpu>());

  context<device> ctx;
  const select_inputs<T, device> device_more{control.view(), bias.view(), sequence_length};
  ops::select(ctx, selector, logits.view(), {real.data(), tokens}, device_gates.view(),
              device_mask.view(), device_more);
  ops::select_backward(ctx, selector, logits.view(), device_gates.view(), device_mask.view(),
                       dgates.view(), device_dlogits.view(), device_more,
                       controlled ? device_dcontrol.view() : matrix_view<T, device>());
  ctx.synchronise();
  const bool intact = device_mask.intact() && device_gates.intact() && device_dlogits.intact() &&
                      device_dcontrol.intact();
  return bit_difference(device_mask.now(), mask) + bit_difference(device_gates.now(), gates) +
         bit_difference(device_dlogits.now(), dlogits) +
         bit_difference(device_dcontrol.now(), dcontrol) +
         (intact ? "" : "something else was written");
}

/// Empty when gates for a mask that is given have the same bits on both backends: that of another
/// selector, so that some experts are on which this one would leave out.
template <class T, class Selector>
std::string replay_difference(const Selector& selector, index tokens, index experts) {
  const selection_batch<T> of(tokens, experts, 2.0);
  const selection_numbers<T, Selector> beside(tokens, experts);
  matrix<std::uint32_t, cpu> mask(tokens, mask_words(experts));
  for (index n = 0; n < tokens; ++n) {
    for (index e = n % 3; e < experts; e += 3) mask(n, e / 32) |= 1u << (e % 32);
  }
  matrix<T, cpu> gates(tokens, experts);
  on_device<T> logits(of.logits), control(beside.control), bias(beside.bias), device_gates(gates);
  on_device<std::uint32_t> device_mask(mask);
  const auto real = to_device<device>(as_column(of.real.view()));

  context<cpu> host(1);
  ops::replay(host, selector, of.logits, of.real.view(), mask.view(), gates.view(),
              select_inputs<T, cpu>{beside.control, beside.bias});
  context<device> ctx;
  ops::replay(ctx, selector, logits.view(), {real.data(), tokens}, device_mask.view(),
              device_gates.view(), select_inputs<T, device>{control.view(), bias.view()});
  ctx.synchronise();
  const bool intact = device_mask.intact() && device_gates.intact();
  return bit_difference(device_mask.now(), mask) + bit_difference(device_gates.now(), gates) +
         (intact ? "" : "something else was written");
}

/// Both of few experts, of one, of more than a word of a mask holds, and of no tokens.
template <class Selector>
std::string all_differences(const Selector& selector, index least_experts = 1) {
  const index tokens = device_size(29, 1000);
  std::string text = selection_difference<float>(selector, tokens, 8) +
                     selection_difference<float>(selector, tokens, 40) +
                     selection_difference<float>(selector, 0, 8) +
                     replay_difference<float>(selector, tokens, 8);
  if (least_experts == 1) text += selection_difference<float>(selector, tokens, 1);
  return text;
}

}  // namespace talpa::support
