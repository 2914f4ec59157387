// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/lanes.hpp>

#include <cstdint>
#include <limits>

namespace talpa {

/// Where the first experts of a row in the order (score descending, index ascending) end, per lane
/// group.
template <class T, class G>
struct pick_boundary {
  typename G::template value<T> score;
  typename G::template value<std::int32_t> expert;  ///< -1 where nothing was picked

  /// Whether an expert that was offered, with score s, is among them.
  template <class Value, class Element>
  TALPA_HD typename G::template value<bool> holds(const Value& s, Element e) const {
    const auto higher = s > score, equal = s == score;
    const auto not_later = e.expert() <= expert;
    return higher | (equal & not_later);
  }
};

/// Finds the first `wanted` experts of a row in the order (score descending, index ascending) among
/// those where offered(e) holds, fewer where fewer are; `most` bounds wanted. Finite scores only.
template <class T, class G, class Score, class Offered>
TALPA_HD pick_boundary<T, G> first_k(const G& g, index most,
                                     typename G::template value<std::int32_t> wanted, Score score,
                                     Offered offered) {
  auto last_score = g.uniform(std::numeric_limits<T>::infinity());
  auto last_expert = g.uniform(std::int32_t{-1});
  for (index pick = 0; pick < most; ++pick) {
    const auto next = g.template arg_max<T>(score, [&](auto e) {
      const auto open = offered(e);
      const auto lower = score(e) < last_score, equal = score(e) == last_score;
      const auto later = e.expert() > last_expert;
      return open & (lower | (equal & later));
    });
    const auto some = next.expert > g.uniform(std::int32_t{-1});
    const auto due = g.uniform(static_cast<std::int32_t>(pick)) < wanted;
    const auto found = some & due;
    last_score = talpa::select(found, next.value, last_score);
    last_expert = talpa::select(found, next.expert, last_expert);
  }
  return {last_score, last_expert};
}

}  // namespace talpa
