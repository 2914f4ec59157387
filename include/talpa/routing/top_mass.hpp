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

/// Ranks whose probabilities top_mass computes before it looks whether a row needs more.
template <class G>
inline constexpr index ranks_at_once = 1;
template <class G>
requires(G::tokens > 1) inline constexpr index ranks_at_once<G> = 8;

/// Finds where the selection by cumulative probability ends in a row with logits u: ranks in the
/// order (logit descending, index ascending) of the experts that are not masked, c_j = min(1, p_1 +
/// ... + p_j) added in that order, the crossing rank the first with c_j > p (>= where inclusive).
/// `asked` is about rows that are valid; where it does not hold the selection ends with min_k.
template <class T, class Crossing, class G, class Logits, class Condition>
TALPA_HD pick_boundary<T, G> top_mass(const G& g, const Logits& u,
                                      const row_exponentials<T, G>& exponential,
                                      const mass_limit& limit, const Condition& asked) {
  const auto infinity = g.uniform(std::numeric_limits<T>::infinity());
  const auto one = g.uniform(T{1});
  const auto p = g.uniform(static_cast<T>(limit.p));
  const auto logit = [&](auto e) { return u[e]; };
  const auto ranks = g.template ranks<T>(g.experts(), logit);
  const auto top = ranks(0);

  auto last_score = infinity;  // of the ranks that are on
  auto on_ranks = g.uniform(std::int32_t{0});
  auto mass = g.uniform(T{0});
  auto open = asked;  // nothing has crossed yet
  // Rows side by side seldom end at the same rank: their probabilities are computed several ranks
  // at a time, without waiting for the sums. Ranks after the end of a row change nothing.
  constexpr index step = ranks_at_once<G>;
  for (index first = 0; first < g.experts() && (first < limit.min_k || g.any(open));
       first += step) {
    const index last = first + step < g.experts() ? first + step : g.experts();
    typename G::template value<T> share[step];
    for (index rank = first; rank < last; ++rank) {
      share[rank - first] = math::exp(ranks(rank) - top) / exponential.sum;
    }
    for (index rank = first; rank < last; ++rank) {
      const auto score = ranks(rank);
      const auto found = score > -infinity;
      const auto sum = mass + share[rank - first];
      mass = talpa::select(sum > one, one, sum);
      const auto above = mass > p, equal = mass == p;
      const auto crossed = limit.inclusive ? above | equal : above;
      const auto before = open;
      open = open & (found & !crossed);
      const auto due = Crossing::keeps ? before & found : open;
      const auto on = rank < limit.min_k ? found : due;
      last_score = talpa::select(on, score, last_score);
      on_ranks = talpa::select(on, g.uniform(static_cast<std::int32_t>(rank + 1)), on_ranks);
    }
  }
  return boundary_at<T>(g, on_ranks, last_score, logit);
}

}  // namespace talpa
