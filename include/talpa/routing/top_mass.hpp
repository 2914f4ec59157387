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

/// Finds where the selection by cumulative probability ends in a row with logits u: ranks in the
/// order (logit descending, index ascending) of the experts that are not masked, c_j = min(1, p_1 +
/// ... + p_j) added in that order, the crossing rank the first with c_j > p (>= where inclusive).
/// Nothing for a row that is not valid, up to the first min_k.
template <class T, class Crossing, class G, class Logits>
TALPA_HD pick_boundary<T, G> top_mass(const G& g, const Logits& u,
                                      const row_exponentials<T, G>& exponential,
                                      const mass_limit& limit) {
  const auto masked = g.uniform(-std::numeric_limits<T>::infinity());
  const auto none = g.uniform(std::int32_t{-1});
  const auto one = g.uniform(T{1});
  const auto p = g.uniform(static_cast<T>(limit.p));
  const auto logit = [&](auto e) { return u[e]; };
  const auto top = g.template max<T>(logit);

  auto last_score = g.uniform(std::numeric_limits<T>::infinity());
  auto last_expert = none;
  auto read_score = last_score;
  auto read_expert = none;
  auto mass = g.uniform(T{0});
  auto open = exponential.valid;  // nothing has crossed yet
  for (index rank = 0; rank < g.experts() && (rank < limit.min_k || g.any(open)); ++rank) {
    const auto next = g.template arg_max<T>(logit, [&](auto e) {
      const auto offered = u[e] > masked, lower = u[e] < read_score, equal = u[e] == read_score;
      const auto later = e.expert() > read_expert;
      return offered & (lower | (equal & later));
    });
    const auto found = next.expert > none;
    const auto sum = mass + math::exp(next.value - top) / exponential.sum;
    mass = talpa::select(sum > one, one, sum);
    const auto above = mass > p, equal = mass == p;
    const auto crossed = limit.inclusive ? above | equal : above;
    const auto before = open;
    open = open & (found & !crossed);
    const auto due = Crossing::keeps ? before & found : open;
    const auto on = rank < limit.min_k ? found : due;
    read_score = talpa::select(found, next.value, read_score);
    read_expert = talpa::select(found, next.expert, read_expert);
    last_score = talpa::select(on, next.value, last_score);
    last_expert = talpa::select(on, next.expert, last_expert);
  }
  return {last_score, last_expert};
}

}  // namespace talpa
