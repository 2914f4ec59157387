// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/matrix.hpp>

#include <cmath>
#include <cstdint>

namespace talpa::support {

/// SplitMix64 (Steele, Lea, Flood 2014) for the inputs of tests. It shares nothing with the
/// library's generator, so a mistake there cannot hide behind inputs made by it.
class test_random {
 public:
  explicit test_random(std::uint64_t seed) : state_(seed) {}

  std::uint64_t bits() {
    state_ += 0x9e3779b97f4a7c15u;
    std::uint64_t z = state_;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  /// Uniform in [low, high).
  double uniform(double low, double high) {
    return low + (high - low) * (static_cast<double>(bits() >> 11) * 0x1p-53);
  }
  /// Uniform in 0..count-1 up to a bias of count / 2^64.
  index below(index count) {
    return static_cast<index>(bits() % static_cast<std::uint64_t>(count));
  }

 private:
  std::uint64_t state_;
};

/// [rows, cols] of values in [-scale, scale), about one in 16 of them four times as large: flat
/// inputs hide mistakes that outliers show.
template <class T>
matrix<T, cpu> random_matrix(test_random& random, index rows, index cols, double scale = 1.0) {
  matrix<T, cpu> m(rows, cols);
  for (index i = 0; i < m.size(); ++i) {
    const double outlier = random.below(16) == 0 ? 4.0 : 1.0;
    m.data()[i] = static_cast<T>(outlier * random.uniform(-scale, scale));
  }
  return m;
}

}  // namespace talpa::support
