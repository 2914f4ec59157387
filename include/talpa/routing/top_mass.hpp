// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/check.hpp>
#include <talpa/routing/first_k.hpp>
#include <talpa/routing/row_softmax.hpp>

#include <cstdint>
#include <limits>

namespace talpa {

/// What becomes of the expert whose probability makes the cumulative sum cross p.
namespace crossing {

/// It is on, and ends the selection (Huang et al.).
struct kept {
  static constexpr bool keeps = true;
};
/// It is off (DynMoLE).
struct dropped {
  static constexpr bool keeps = false;
};

}  // namespace crossing

/// How far down the ranks of a row a cumulative probability reaches.
struct mass_limit {
  double p;        ///< 0..1
  index min_k;     ///< ranks that are on in any case
  bool inclusive;  ///< whether a sum equal to p crosses it
};

/// Throws value_error unless p is in 0..1 and at least one rank is on in any case.
inline void check_mass_limit(const char* function, double p, index min_k) {
  check_value(p >= 0.0 && p <= 1.0, function, "p", p, "0..1 = cumulative probability");
  check_at_least(function, "min_k", min_k, 1, "experts a token gets in any case");
}

namespace detail {

/// e^(x - top) for x <= top.
template <class Value>
struct exp_below {
  Value top;
  [[gnu::always_inline]] TALPA_HD Value operator()(const Value& x) const {
    return math::exp_nonpositive(x - top);
  }
  template <int N>
  [[gnu::always_inline]] void all(Value (&x)[N]) const {
    for (int i = 0; i < N; ++i) x[i] = x[i] - top;
    math::exp_nonpositive(x);
  }
};

}  // namespace detail

/// Finds how many experts the selection by cumulative probability takes in a row with logits u, and
/// the logit of the last of them, +inf for none: ranks in the order (logit descending, index
/// ascending) of the experts that are not masked, c_j = min(1, p_1 + ... + p_j) added in that
/// order, the crossing rank the first with c_j > p (>= where inclusive). `asked` is about rows that
/// are valid; where it does not hold the selection ends with min_k.
template <class T, class Crossing, class G, class Logits, class Condition>
TALPA_HD leading<typename G::template value<T>, typename G::template value<std::int32_t>> top_mass(
    const G& g, const Logits& u, const row_exponentials<T, G>& exponential, const mass_limit& limit,
    const Condition& asked) {
  const T p = static_cast<T>(limit.p);
  // min(1, c) > p is c > p for p < 1, and never true for p = 1; min(1, c) >= p is c >= p.
  const auto bound =
      g.uniform(limit.inclusive || p < T{1} ? p : std::numeric_limits<T>::infinity());
  const auto within = [&](const auto& mass) {
    const auto below = mass < bound, not_above = mass <= bound;
    return limit.inclusive ? below : not_above;
  };
  return g.template leading_ranks<T>(
      rank_limit{limit.min_k, Crossing::keeps},
      detail::exp_below<typename G::template value<T>>{exponential.top}, exponential.sum, within,
      asked, [&](auto e) { return u[e]; });
}

}  // namespace talpa
