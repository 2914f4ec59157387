// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/lanes.hpp>

namespace talpa {

/// Squared coefficient of variation of a row of E numbers: var / (mean^2 + epsilon), var with
/// divisor E - 1, where `amount(e)` is the number of expert e. Calls derive(e, d value /
/// d amount_e) for each expert. 0 with zero derivatives for one expert.
///
/// With m the mean, v the variance and s = m^2 + epsilon the derivative is
/// 2 (amount_e - m) / ((E - 1) s) - v 2 m / (E s^2).
template <class T, class G, class Amount, class Derive>
TALPA_HD typename G::template value<T> squared_variation(const G& g, double epsilon, Amount amount,
                                                         Derive derive) {
  const auto zero = g.uniform(T{0});
  if (g.experts() == 1) {
    g.for_each([&](auto e) { derive(e, zero); });
    return zero;
  }
  const auto experts = g.uniform(static_cast<T>(g.experts()));
  const auto free = g.uniform(static_cast<T>(g.experts() - 1));
  const auto mean = g.template sum<T>(amount) / experts;
  const auto deviation = [&](auto e) { return amount(e) - mean; };
  const auto variance =
      g.template sum<T>([&](auto e) { return math::mul(deviation(e), deviation(e)); }) / free;
  const auto norm = math::fma(mean, mean, g.uniform(static_cast<T>(epsilon)));
  const auto value = variance / norm;
  // d mean / d amount_e = 1 / E; the deviations sum to zero, so the mean in them adds nothing.
  const auto by_mean = math::mul(value, (mean + mean) / (math::mul(norm, experts)));
  g.for_each([&](auto e) {
    const auto d = deviation(e);
    derive(e, (d + d) / math::mul(norm, free) - by_mean);
  });
  return value;
}

}  // namespace talpa
