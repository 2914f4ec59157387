// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/config.hpp>

#include <cstddef>
#include <cstdint>

namespace talpa {

/// Signed size and position type of the whole library.
using index = std::ptrdiff_t;

/// Experts per word of a routing mask; also the number of virtual lanes of the canonical reduction.
inline constexpr index mask_word_bits = 32;

/// Smallest q with q * b >= a, for a >= 0 and b > 0.
TALPA_HD constexpr index ceil_div(index a, index b) { return (a + b - 1) / b; }

/// Number of mask words of a row of E experts.
TALPA_HD constexpr index mask_words(index experts) { return ceil_div(experts, mask_word_bits); }

}  // namespace talpa
