// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "golden/case.hpp"

#include <talpa/routing/routing.hpp>

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

// The experts that a file says were chosen, [T][K] by descending logit.

namespace talpa::golden {

/// Mask of the file's experts [T][K].
inline matrix<std::uint32_t, cpu> mask_of(const tensor& chosen, index experts) {
  matrix<std::uint32_t, cpu> mask(chosen.dim(0), mask_words(experts));
  for (index i = 0; i < chosen.size(); ++i) {
    const auto e = static_cast<index>(chosen.data[static_cast<std::size_t>(i)]);
    if (e < 0 || e >= experts)
      throw malformed("the file chooses an expert that does not exist: " + std::to_string(e));
    mask(i / chosen.dim(1), e / mask_word_bits) |= 1u << (e % mask_word_bits);
  }
  return mask;
}

/// Empty when the experts of each token, by descending logit, are those of the file; where logits
/// tie, when they are some top k of them.
inline std::string compare_experts(const routed_view<double, cpu>& routed, const tensor& chosen,
                                   bool ties) {
  const index k = chosen.dim(1);
  for (index n = 0; n < routed.logits.rows; ++n) {
    std::vector<index> ours;
    for (index e = 0; e < routed.logits.cols; ++e) {
      if (routed.routing.on(n, e)) ours.push_back(e);
    }
    const auto before = [&](index a, index b) { return routed.logits(n, a) > routed.logits(n, b); };
    std::stable_sort(ours.begin(), ours.end(), before);
    bool same = static_cast<index>(ours.size()) == k;
    for (index i = 0; same && i < k; ++i) {
      const auto theirs = static_cast<index>(chosen.data[static_cast<std::size_t>(n * k + i)]);
      const index mine = ours[static_cast<std::size_t>(i)];
      same = ties ? routed.logits(n, mine) == routed.logits(n, theirs) : mine == theirs;
    }
    if (!same) return "token " + std::to_string(n) + " has other experts";
  }
  return {};
}

}  // namespace talpa::golden
