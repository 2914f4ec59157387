// SPDX-License-Identifier: Apache-2.0
#include "unit.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdio>

namespace {

std::size_t differences(const std::vector<float>& a, const std::vector<float>& b) {
  std::size_t count = a.size() == b.size() ? 0 : 1;
  for (std::size_t i = 0; i < std::min(a.size(), b.size()); ++i) count += a[i] != b[i] ? 1 : 0;
  return count;
}

}  // namespace

int main() {
  const odr::result first = odr::first_unit(), second = odr::second_unit();
  const std::size_t wrong_gates = differences(first.gates, second.gates);
  const std::size_t wrong_y = differences(first.y, second.y);
  const std::size_t wrong_gradients = differences(first.gradients, second.gradients);
  // The comparison is worth nothing if the gates are all zero or one, or y is not made of integers.
  const auto soft = std::count_if(first.gates.begin(), first.gates.end(),
                                  [](float g) { return 0.0f < g && g < 1.0f; });
  const auto whole = [](const std::vector<float>& all) {
    return std::all_of(all.begin(), all.end(), [](float v) { return v == std::round(v); }) &&
           *std::max_element(all.begin(), all.end()) > 0.0f;
  };
  std::printf(
      "%zu of %zu gates, %zu of %zu outputs and %zu of %zu gradients differ; "
      "%td gates in (0, 1)\n",
      wrong_gates, first.gates.size(), wrong_y, first.y.size(), wrong_gradients,
      first.gradients.size(), static_cast<std::ptrdiff_t>(soft));
  return wrong_gates + wrong_y + wrong_gradients == 0 && soft > 0 && whole(first.y) &&
                 whole(first.gradients)
             ? 0
             : 1;
}
