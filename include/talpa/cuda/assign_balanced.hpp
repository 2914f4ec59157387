// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/math.hpp>
#include <talpa/cuda/loops.hpp>
#include <talpa/cuda/routable_rows.hpp>
#include <talpa/ops/assign_balanced.hpp>

#include <limits>

namespace talpa::kernels {

/// What a change of an assignment costs: tokens left without expert first, then score lost.
struct assignment_cost {
  index unplaced;
  double lost;
};
TALPA_HD inline assignment_cost operator+(assignment_cost a, assignment_cost b) {
  return {a.unplaced + b.unplaced, a.lost + b.lost};
}
TALPA_HD inline assignment_cost operator-(assignment_cost a, assignment_cost b) {
  return {a.unplaced - b.unplaced, a.lost - b.lost};
}
TALPA_HD inline bool operator<(assignment_cost a, assignment_cost b) {
  return a.unplaced != b.unplaced ? a.unplaced < b.unplaced : a.lost < b.lost;
}

/// The largest finite size of a score of each row that takes part, whose row of the mask is
/// cleared.
template <class T, class B>
struct assignment_row {
  matrix_view<const T, B> scores;
  const std::uint8_t* part;
  matrix_view<std::uint32_t, B> mask;
  double* size;

  template <class Warp>
  TALPA_HD void operator()(const Warp& warp, index n) const {
    const bool takes_part = part[n] != 0;
    double largest = 0.0;
    if (takes_part) {
      largest = warp.template max<double>(scores.cols, [&](index e) {
        const T x = math::detail::absolute(scores(n, e));
        return x <= std::numeric_limits<T>::max() ? static_cast<double>(x) : 0.0;
      });
      warp.for_each(mask.cols, [&](index w) { mask(n, w) = 0; });
    }
    if (warp.lane() == 0) size[n] = largest;
  }
};

/// One warp places one token after the other by the steps of the host (cpu/assign_balanced.hpp):
/// the experts are shared out over the lanes, and what looks for the best of them has a total
/// order, so that every choice is the same.
template <class T, class B>
struct balanced_assignment {
  matrix_view<const T, B> scores;
  const std::uint8_t* part;
  const double* size;  // [N]
  matrix_view<std::uint32_t, B> mask;
  matrix_view<index, B> held;            // [E, most places] tokens of each expert
  index* count;                          // [E] how many
  assignment_cost* price;                // [E + 1] duals, see the host
  matrix_view<assignment_cost, B> move;  // [E, E + 1] cost of the cheapest move
  matrix_view<index, B> mover;           // [E, E + 1] its token, -1 for none
  std::uint8_t* stale;                   // [E] its moves have to be found again
  assignment_cost* distance;             // [E + 1] of the present search
  index* from;            // [E + 1] expert before, E: the token itself, -1: not reached
  std::uint8_t* settled;  // [E + 1]

  template <class Warp>
  TALPA_HD void operator()(const Warp& warp, index) const {
    const index tokens = scores.rows, experts = scores.cols;
    const index real = warp.template sum<index>(tokens, [&](index n) { return index{part[n]}; });
    const double largest = warp.template max<double>(tokens, [&](index n) { return size[n]; });
    // Sums of differences must not overflow; a power of two changes no order.
    const double unit = largest > 1e250 ? 0x1p-200 : 1.0;
    const index places = (real + experts - 1) / experts;
    warp.for_each(experts + 1, [&](index e) {
      price[e] = {0, 0.0};
      if (e == experts) return;
      count[e] = 0;
      stale[e] = 1;
    });
    warp.sync();
    for (index n = 0; n < tokens; ++n) {
      if (part[n] != 0) place(warp, n, places, unit);
    }
    // A token stands in one word of the mask alone, which its expert's lane writes.
    warp.for_each(experts, [&](index e) {
      for (index i = 0; i < count[e]; ++i) {
        mask(held(e, i), e / mask_word_bits) = 1u << (e % mask_word_bits);
      }
    });
  }

 private:
  template <class Warp>
  TALPA_HD void place(const Warp& warp, index token, index places, double unit) const {
    const index experts = scores.cols;
    warp.for_each(experts + 1, [&](index e) {
      settled[e] = 0;
      from[e] = allowed(token, e) ? experts : -1;  // straight from the token
      if (from[e] >= 0) distance[e] = cost(token, e, unit) - price[e];
    });
    warp.sync();
    index last = next(warp);
    while (last != experts && count[last] >= places) {
      if (warp.lane() == 0) settled[last] = 1;
      if (stale[last] != 0) find_moves(warp, last, unit);
      warp.sync();
      if (warp.lane() == 0) stale[last] = 0;
      relax(warp, last);
      warp.sync();
      last = next(warp);
    }
    const assignment_cost reached = distance[last];
    warp.for_each(experts, [&](index e) {
      if (settled[e] != 0) price[e] = price[e] + (distance[e] - reached);
    });
    warp.sync();  // every lane has seen the free place before one takes it
    index to = last;
    while (from[to] != experts) {
      const index e = from[to], moved = mover(e, to);
      replace(warp, e, moved);
      add(warp, to, moved);
      to = e;
    }
    add(warp, to, token);
    warp.sync();
  }

  TALPA_HD bool allowed(index n, index e) const {
    return e == scores.cols ||
           math::detail::absolute(scores(n, e)) <= std::numeric_limits<T>::max();
  }
  TALPA_HD assignment_cost cost(index n, index e, double unit) const {
    if (e == scores.cols) return {1, 0.0};
    return {0, math::mul(-unit, static_cast<double>(scores(n, e)))};
  }

  /// The nearest expert that is not settled, the lower one of equals.
  template <class Warp>
  TALPA_HD index next(const Warp& warp) const {
    index best = -1;
    assignment_cost least{0, 0.0};
    warp.for_each(scores.cols + 1, [&](index e) {
      if (settled[e] != 0 || from[e] < 0) return;
      if (best >= 0 && !(distance[e] < least)) return;
      best = e;
      least = distance[e];
    });
    for (int d = 16; d > 0; d /= 2) {
      const index other = warp.block.shuffle_xor(best, d, whole_warp);
      const assignment_cost theirs{warp.block.shuffle_xor(least.unplaced, d, whole_warp),
                                   warp.block.shuffle_xor(least.lost, d, whole_warp)};
      const bool nearer = best < 0 || theirs < least || (!(least < theirs) && other < best);
      if (other < 0 || !nearer) continue;
      best = other;
      least = theirs;
    }
    return best;
  }

  /// Tries the moves out of expert e.
  template <class Warp>
  TALPA_HD void relax(const Warp& warp, index e) const {
    const assignment_cost here = distance[e], own = price[e];
    warp.for_each(scores.cols + 1, [&](index f) {
      if (settled[f] != 0 || mover(e, f) < 0) return;
      const assignment_cost through = here + (move(e, f) - price[f] + own);
      if (from[f] >= 0 && !(through < distance[f])) return;
      distance[f] = through;
      from[f] = e;
    });
  }

  /// The cheapest token of e to move to each other expert, the earliest of equals.
  template <class Warp>
  TALPA_HD void find_moves(const Warp& warp, index e, double unit) const {
    const index held_here = count[e];
    warp.for_each(scores.cols + 1, [&](index f) {
      index best = -1;
      assignment_cost least{0, 0.0};
      for (index i = 0; i < held_here; ++i) {
        const index n = held(e, i);
        if (f == e || !allowed(n, f)) continue;
        const assignment_cost change = cost(n, f, unit) - cost(n, e, unit);
        if (best >= 0 && !(change < least || (!(least < change) && n < best))) continue;
        least = change;
        best = n;
      }
      move(e, f) = least;
      mover(e, f) = best;
    });
  }

  template <class Warp>
  TALPA_HD void add(const Warp& warp, index e, index n) const {
    if (e == scores.cols || warp.lane() != 0) return;
    held(e, count[e]) = n;
    ++count[e];
    stale[e] = 1;
  }
  /// Takes token n away from expert e; the last one takes its place.
  template <class Warp>
  TALPA_HD void replace(const Warp& warp, index e, index n) const {
    if (warp.lane() != 0) return;
    index i = 0;
    while (held(e, i) != n) ++i;
    held(e, i) = held(e, --count[e]);
    stale[e] = 1;
  }
};

}  // namespace talpa::kernels

namespace talpa::ops {

template <kernel_backend B>
struct assign_balanced_impl<B> {
  template <class T>
  static void run(context<B>& ctx, matrix_view<const T, B> scores,
                  vector_view<const std::uint8_t, B> padding_mask,
                  matrix_view<std::uint32_t, B> mask) {
    const index tokens = scores.rows, experts = scores.cols;
    auto& memory = ctx.scratch;
    const typename workspace<B>::scope scope(memory);
    const auto part = kernels::routable_rows(ctx, scores, padding_mask);
    const auto size = memory.template take<double>(tokens);
    kernels::for_each_row(ctx, tokens,
                          kernels::assignment_row<T, B>{scores, part.data, mask, size.data});
    const kernels::balanced_assignment<T, B> best{
        scores,
        part.data,
        size.data,
        mask,
        memory.template take<index>(experts, ceil_div(tokens, experts)),
        memory.template take<index>(experts).data,
        memory.template take<kernels::assignment_cost>(experts + 1).data,
        memory.template take<kernels::assignment_cost>(experts, experts + 1),
        memory.template take<index>(experts, experts + 1),
        memory.template take<std::uint8_t>(experts).data,
        memory.template take<kernels::assignment_cost>(experts + 1).data,
        memory.template take<index>(experts + 1).data,
        memory.template take<std::uint8_t>(experts + 1).data};
    talpa::detail::launch<32>(ctx, 1, 0,
                              kernels::row_loop<kernels::balanced_assignment<T, B>>{best, 1});
  }
};

}  // namespace talpa::ops
