// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/index.hpp>

namespace talpa::detail {

/// Partial sums of one row.
inline constexpr index sum_lanes = 16;

/// f(0) + ... + f(n - 1): term i belongs to lane i mod 16, each lane sums in order, then a tree.
template <class T, class F>
T lane_sum(index n, F f) {
  T lane[sum_lanes] = {};
  index i = 0;
  for (; i + sum_lanes <= n; i += sum_lanes) {
    for (index l = 0; l < sum_lanes; ++l) lane[l] += f(i + l);
  }
  for (index l = 0; i < n; ++i, ++l) lane[l] += f(i);
  for (index half = sum_lanes / 2; half > 0; half /= 2) {
    for (index l = 0; l < half; ++l) lane[l] += lane[l + half];
  }
  return lane[0];
}

}  // namespace talpa::detail
