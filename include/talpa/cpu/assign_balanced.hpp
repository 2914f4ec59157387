// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/cpu/routable_rows.hpp>
#include <talpa/ops/assign_balanced.hpp>

#include <algorithm>
#include <cmath>
#include <limits>

namespace talpa::detail {

/// What a change of an assignment costs: tokens left without expert first, then score lost.
struct assignment_cost {
  index unplaced;
  double lost;

  friend assignment_cost operator+(assignment_cost a, assignment_cost b) {
    return {a.unplaced + b.unplaced, a.lost + b.lost};
  }
  friend assignment_cost operator-(assignment_cost a, assignment_cost b) {
    return {a.unplaced - b.unplaced, a.lost - b.lost};
  }
  friend bool operator<(assignment_cost a, assignment_cost b) {
    return a.unplaced != b.unplaced ? a.unplaced < b.unplaced : a.lost < b.lost;
  }
};

/// The assignment of the tokens placed so far, which is always the best for them. Tokens come one
/// by one; each takes the cheapest chain of moves: it goes to an expert, a token of that expert to
/// another, and so on to one with a free place. A further column, number E, stands for no expert:
/// there is always a place.
///
/// price[e] is the dual of expert e: cost(n, e) - price[e] is least where n is placed. It stays
/// zero while e has a free place, so the search looks no further than the first such expert.
template <class T>
class balanced_assignment {
 public:
  balanced_assignment(workspace<cpu>& memory, matrix_view<const T, cpu> scores, index places,
                      double unit)
      : scores_(scores),
        experts_(scores.cols),
        places_(places),
        unit_(unit),
        held_(memory.take<index>(experts_, places)),
        count_(memory.take<index>(experts_)),
        price_(memory.take<assignment_cost>(experts_ + 1)),
        move_(memory.take<assignment_cost>(experts_, experts_ + 1)),
        mover_(memory.take<index>(experts_, experts_ + 1)),
        stale_(memory.take<std::uint8_t>(experts_)),
        distance_(memory.take<assignment_cost>(experts_ + 1)),
        from_(memory.take<index>(experts_ + 1)),
        settled_(memory.take<std::uint8_t>(experts_ + 1)) {
    std::fill_n(count_.data, experts_, index{0});
    std::fill_n(price_.data, experts_ + 1, assignment_cost{0, 0.0});
    std::fill_n(stale_.data, experts_, std::uint8_t{1});
  }

  void place(index token) {
    std::fill_n(settled_.data, experts_ + 1, std::uint8_t{0});
    for (index e = 0; e <= experts_; ++e) {
      from_[e] = allowed(token, e) ? experts_ : -1;  // straight from the token
      if (from_[e] >= 0) distance_[e] = cost(token, e) - price_[e];
    }
    index last = next();
    while (!free(last)) {
      settled_[last] = 1;
      relax(last);
      last = next();
    }
    for (index e = 0; e < experts_; ++e) {
      if (settled_[e] != 0) price_[e] = price_[e] + (distance_[e] - distance_[last]);
    }
    index to = last;
    while (from_[to] != experts_) {
      const index e = from_[to];
      const index moved = mover_(e, to);
      replace(e, moved);
      add(to, moved);
      to = e;
    }
    add(to, token);
  }

  /// f(token, expert) for every token that has one.
  template <class F>
  void for_each(F f) const {
    for (index e = 0; e < experts_; ++e) {
      for (index i = 0; i < count_[e]; ++i) f(held_(e, i), e);
    }
  }

 private:
  bool allowed(index n, index e) const { return e == experts_ || !std::isinf(scores_(n, e)); }
  assignment_cost cost(index n, index e) const {
    if (e == experts_) return {1, 0.0};
    return {0, -unit_ * static_cast<double>(scores_(n, e))};
  }
  bool free(index e) const { return e == experts_ || count_[e] < places_; }

  /// The nearest expert that is not settled, the lower one of equals.
  index next() const {
    index best = experts_;
    for (index e = experts_ - 1; e >= 0; --e) {
      if (settled_[e] == 0 && from_[e] >= 0 && !(distance_[best] < distance_[e])) best = e;
    }
    return best;
  }

  /// Tries the moves out of expert e.
  void relax(index e) {
    if (stale_[e] != 0) find_moves(e);
    for (index f = 0; f <= experts_; ++f) {
      if (settled_[f] != 0 || mover_(e, f) < 0) continue;
      const assignment_cost through = distance_[e] + (move_(e, f) - price_[f] + price_[e]);
      if (from_[f] >= 0 && !(through < distance_[f])) continue;
      distance_[f] = through;
      from_[f] = e;
    }
  }

  /// The cheapest token of e to move to each other expert, the earliest of equals.
  void find_moves(index e) {
    std::fill_n(mover_.row(e), experts_ + 1, index{-1});
    for (index i = 0; i < count_[e]; ++i) {
      const index n = held_(e, i);
      const assignment_cost here = cost(n, e);
      for (index f = 0; f <= experts_; ++f) {
        if (f == e || !allowed(n, f)) continue;
        const assignment_cost change = cost(n, f) - here;
        const index rival = mover_(e, f);
        const bool better =
            rival < 0 || change < move_(e, f) || (!(move_(e, f) < change) && n < rival);
        if (!better) continue;
        move_(e, f) = change;
        mover_(e, f) = n;
      }
    }
    stale_[e] = 0;
  }

  void add(index e, index n) {
    if (e == experts_) return;
    held_(e, count_[e]++) = n;
    stale_[e] = 1;
  }
  /// Takes token n away from expert e; the last one takes its place.
  void replace(index e, index n) {
    index i = 0;
    while (held_(e, i) != n) ++i;
    held_(e, i) = held_(e, --count_[e]);
    stale_[e] = 1;
  }

  matrix_view<const T, cpu> scores_;
  index experts_;
  index places_;
  double unit_;
  matrix_view<index, cpu> held_;                // [E, places] tokens of each expert
  vector_view<index, cpu> count_;               // [E] how many
  vector_view<assignment_cost, cpu> price_;     // [E + 1]
  matrix_view<assignment_cost, cpu> move_;      // [E, E + 1] cost of the cheapest move
  matrix_view<index, cpu> mover_;               // [E, E + 1] its token, -1 for none
  vector_view<std::uint8_t, cpu> stale_;        // [E] its moves have to be found again
  vector_view<assignment_cost, cpu> distance_;  // [E + 1] of the present search
  vector_view<index, cpu> from_;  // [E + 1] expert before, E: the token itself, -1: not reached
  vector_view<std::uint8_t, cpu> settled_;  // [E + 1]
};

}  // namespace talpa::detail

namespace talpa::ops {

template <>
struct assign_balanced_impl<cpu> {
  template <class T>
  static void run(context<cpu>& ctx, matrix_view<const T, cpu> scores,
                  vector_view<const std::uint8_t, cpu> padding_mask,
                  matrix_view<std::uint32_t, cpu> mask) {
    const workspace<cpu>::scope scope(ctx.scratch);
    const auto part = detail::routable_rows(ctx, scores, padding_mask);
    index count = 0;
    double largest = 0.0;
    for (index n = 0; n < scores.rows; ++n) {
      if (part[n] == 0) continue;
      ++count;
      std::fill_n(mask.row(n), mask.cols, 0u);
      for (index e = 0; e < scores.cols; ++e) {
        const double size = std::abs(static_cast<double>(scores(n, e)));
        if (std::isfinite(size)) largest = std::max(largest, size);
      }
    }
    // Sums of differences must not overflow; a power of two changes no order.
    const double unit = largest > 1e250 ? 0x1p-200 : 1.0;
    detail::balanced_assignment<T> best(ctx.scratch, scores, ceil_div(count, scores.cols), unit);
    for (index n = 0; n < scores.rows; ++n) {
      if (part[n] != 0) best.place(n);
    }
    best.for_each(
        [&](index n, index e) { mask(n, e / mask_word_bits) |= 1u << (e % mask_word_bits); });
  }
};

}  // namespace talpa::ops
