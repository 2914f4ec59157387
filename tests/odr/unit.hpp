// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <vector>

namespace odr {

/// What a unit computed, without a type of talpa: the units may not agree on more than that.
struct result {
  std::vector<float> gates;      // top 2 of 8 experts
  std::vector<float> y;          // of top 1, all integers
  std::vector<float> gradients;  // of x and the experts under it, all integers
};

result first_unit();
result second_unit();

}  // namespace odr
