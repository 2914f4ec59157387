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
      if (n % 9 == 4) logits(n, n % experts) = -infinity;
      if (n % 13 == 6) logits(n, n % experts) = std::numeric_limits<T>::quiet_NaN();
      if (n % 23 == 8) std::fill_n(logits.data() + n * experts, experts, -infinity);
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

/// Empty when mask, gates and gradients of both backends have the same bits.
template <class T, class Selector>
std::string selection_difference(const Selector& selector, index tokens, index experts,
                                 index sequence_length = 0, double spread = 2.0) {
  const selection_batch<T> of(tokens, experts, spread);
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
  return bit_difference(device_mask.now(), mask) + bit_difference(device_gates.now(), gates) +
         bit_difference(device_dlogits.now(), dlogits) +
         (intact ? "" : "something else was written");
}

}  // namespace talpa::support
