// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/workspace.hpp>
#include <talpa/ops/fill.hpp>
#include <talpa/routing/routing.hpp>

#include <cstdint>

namespace talpa {

/// The routing of experts that nobody chooses: every one is on for every token, padding included,
/// with gate 1. In `memory`; gates [N, E].
template <class T, backend B>
routing_view<T, B> always_on(context<B>& ctx, workspace<B>& memory, index tokens, index experts) {
  const routing_view<T, B> r(memory.template take<T>(tokens, experts),
                             memory.template take<std::uint32_t>(tokens, mask_words(experts)));
  ops::fill(ctx, T{1}, r.gates);
  for (index w = 0; w < mask_words(experts); ++w) {
    const index here = experts - w * mask_word_bits;  // experts of this word and behind
    const std::uint32_t bits = here >= mask_word_bits ? ~0u : (1u << here) - 1u;
    ops::fill(ctx, bits, r.mask.col_range(w, 1));
  }
  return r;
}

}  // namespace talpa
