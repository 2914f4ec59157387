// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/matrix.hpp>
#include <talpa/core/random.hpp>
#include <talpa/core/scalar.hpp>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

// Inputs of the laws: functions of a seed, the same on every machine.

namespace talpa::testing {

/// [rows, cols] of numbers in [-scale, scale), about one in 16 of them four times as large: flat
/// inputs hide mistakes that outliers show.
template <floating T>
matrix<T, cpu> uneven(index rows, index cols, generator& random, double scale = 1.0) {
  const random_stream size = random.next(), outlier = random.next();
  matrix<T, cpu> m(rows, cols);
  for (index i = 0; i < m.size(); ++i) {
    const auto at = static_cast<std::uint64_t>(i);
    const double factor = uniform_index(outlier, at, 16) == 0 ? 4.0 : 1.0;
    m.data()[i] = static_cast<T>(factor * scale * (2.0 * uniform<double>(size, at) - 1.0));
  }
  return m;
}

/// Overwrites `m` by NaN, so that what a function forgets to write shows.
template <floating T>
void poison(matrix_view<T, cpu> m) {
  for (index r = 0; r < m.rows; ++r) {
    for (index c = 0; c < m.cols; ++c) m(r, c) = std::numeric_limits<T>::quiet_NaN();
  }
}

/// A permutation of 0..count-1.
inline std::vector<index> permutation(index count, generator& random) {
  const random_stream stream = random.next();
  std::vector<index> order(static_cast<std::size_t>(count));
  for (index i = 0; i < count; ++i) order[static_cast<std::size_t>(i)] = i;
  for (index i = count - 1; i > 0; --i) {
    const auto j =
        uniform_index(stream, static_cast<std::uint64_t>(i), static_cast<std::uint64_t>(i) + 1);
    std::swap(order[static_cast<std::size_t>(i)], order[static_cast<std::size_t>(j)]);
  }
  return order;
}

/// Distance of the grid that `separated_logits` lie on.
inline constexpr double logit_grid = 1.0 / 256.0;

/// [N, E] of logits that differ by at least `logit_grid` within a row and are multiples of it, so
/// that adding a small whole number to a row is exact in float. Rows take turns between nearly
/// equal, moderate, wide, and one expert far ahead.
template <floating T>
matrix<T, cpu> separated_logits(index tokens, index experts, generator& random) {
  matrix<T, cpu> logits(tokens, experts);
  for (index n = 0; n < tokens; ++n) {
    const std::vector<index> rank = permutation(experts, random);
    const random_stream jitter = random.next();
    constexpr double spreads[] = {0.5, 2.0, 8.0, 2.0};
    const double spread = spreads[n % 4];
    const auto gap = std::max<index>(
        1, static_cast<index>(2.0 * spread / logit_grid) / std::max<index>(1, experts));
    for (index e = 0; e < experts; ++e) {
      const index r = rank[static_cast<std::size_t>(e)];
      const auto within = static_cast<index>(uniform_index(
          jitter, static_cast<std::uint64_t>(e), static_cast<std::uint64_t>((gap + 1) / 2)));
      const index steps = (r - experts / 2) * gap + within;
      const double ahead = n % 4 == 3 && r == experts - 1 ? 8.0 : 0.0;
      logits(n, e) = static_cast<T>(static_cast<double>(steps) * logit_grid + ahead);
    }
  }
  return logits;
}

/// A random mask [N, ceil(E / 32)] with each expert on with probability `share`. Some tokens get no
/// expert, and expert 1, where there are at least three, no token.
inline matrix<std::uint32_t, cpu> random_mask(index tokens, index experts, double share,
                                              generator& random) {
  const random_stream stream = random.next();
  matrix<std::uint32_t, cpu> mask(tokens, mask_words(experts));
  for (index n = 0; n < tokens; ++n) {
    if (n % 7 == 3) continue;
    for (index e = 0; e < experts; ++e) {
      const bool on = uniform<double>(stream, static_cast<std::uint64_t>(n * experts + e)) < share;
      if (on && !(e == 1 && experts >= 3)) {
        mask(n, e / mask_word_bits) |= 1u << (e % mask_word_bits);
      }
    }
  }
  return mask;
}

/// Whether the bit of expert e is set in row n.
inline bool bit(const matrix_view<const std::uint32_t, cpu>& mask, index n, index e) {
  return ((mask(n, e / mask_word_bits) >> (e % mask_word_bits)) & 1u) != 0;
}

}  // namespace talpa::testing
