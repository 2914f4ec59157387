// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/lanes.hpp>

#include <cstdint>

namespace talpa {

/// Where the first experts of a row in the order (score descending, index ascending) end, per lane
/// group.
template <class T, class G>
struct pick_boundary {
  typename G::template value<T> score;  ///< -inf where every expert with a score above is in
  typename G::template value<std::int32_t> expert;  ///< last one with that score, -1 for none

  /// Whether an expert with score s is among them; s = -inf is not.
  template <class Value, class Element>
  TALPA_HD typename G::template value<bool> holds(const Value& s, Element e) const {
    const auto higher = s > score, equal = s == score;
    const auto not_later = e.expert() <= expert;
    return higher | (equal & not_later);
  }
};

/// Where the first n experts of a row with scores above -inf end, from its ranks; n >= 0 may differ
/// from row to row, and reach beyond them. `last` is the score of rank n, +inf for n = 0.
template <class T, class G, class Score>
TALPA_HD pick_boundary<T, G> boundary_at(const G& g,
                                         const typename G::template value<std::int32_t>& n,
                                         const typename G::template value<T>& last, Score score) {
  return {last, g.template last_equal<T>(n, last, score)};
}

/// Finds the first k <= E experts of a row in the order (score descending, index ascending) among
/// those with a score above -inf, fewer where fewer are. Finite scores and -inf only.
template <class T, class G, class Score>
TALPA_HD pick_boundary<T, G> first_k(const G& g, index k, Score score) {
  return boundary_at<T>(g, g.uniform(static_cast<std::int32_t>(k)),
                        g.template top<T>(k, score).last, score);
}

/// Writes the mask of the first n experts of a row, `last` being the score of the n-th, +inf for
/// n = 0; of an invalid row that of experts 0 .. early - 1.
template <class T, class G, class Score>
TALPA_HD void store_first_n(const G& g, row_pointer<std::uint32_t> mask,
                            const typename G::template value<std::int32_t>& n,
                            const typename G::template value<T>& last,
                            const typename G::template value<bool>& invalid, index early,
                            Score score) {
  const auto wanted = g.uniform(static_cast<std::int32_t>(early)),
             none = g.uniform(std::int32_t{0});
  g.template store_first<T>(mask, n, last, talpa::select(invalid, wanted, none), score);
}
/// The same for the first k, k in the place of n and `early`.
template <class T, class G, class Score>
TALPA_HD void store_first_k(const G& g, row_pointer<std::uint32_t> mask, index k,
                            const typename G::template value<T>& last,
                            const typename G::template value<bool>& invalid, Score score) {
  store_first_n<T>(g, mask, g.uniform(static_cast<std::int32_t>(k)), last, invalid, k, score);
}

}  // namespace talpa
