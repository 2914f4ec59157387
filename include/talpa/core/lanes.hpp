// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/config.hpp>
#include <talpa/core/index.hpp>
#include <talpa/core/math.hpp>
#include <talpa/core/pack.hpp>

#include <cstddef>
#include <cstdint>
#include <limits>

// Lane groups: the logic of one row of logits is written once, in data-parallel form, and runs on
// whatever group it is given. A group G offers
//
//   G::value<T>       a quantity of type T: one per row, or one per element
//   G::element        one of this lane's elements (experts) of the row: `e.slot`, `e.expert()`
//   g.experts()       E
//   g.uniform<T>(c)   the same constant everywhere
//   g.for_each(f)     f(e) for each element of this lane
//   g.elements<T>()   array indexed by element, storage of this row only
//   g.load(row, e, fill)       element e of a row in memory, `fill` beyond the row
//   g.store(row, e, v)         writes it
//   g.load_row(row, fill)      all of them, as an array like `elements`
//   g.store_row(row, f)        writes f(e) for each element of the row
//   g.load(scalar), g.store(scalar, v)   a number that the row has once
//   g.sum<T>(f)                canonical sum of f(e), the same bits for every group
//   g.sum_of<T>(map, f, use)   canonical sum of use(e, map(f(e))), each computed once, so that use
//                              may keep what it is given in an array. Rows side by side map several
//                              elements in lock-step by map.all(x), where there is such a member
//   g.max<T>(f)                largest f(e); NaN is skipped; -inf for an empty row
//   g.arg_max<T>(f, active)    largest f(e) among active(e), ties to the lower index; -1 if none
//   g.ranks<T>(most, f)        r(j), j < most <= E: the j-th largest f(e) counted from 0, -inf
//                              where fewer are above it; unspecified if some are NaN
//   g.top<T>(k, f)             the first and the k-th of these ranks, k <= E
//   g.leading_ranks<T>(limit, part, b, within, asked, f)   how many of the ranks r(0), r(1), ...
//                              that are not -inf a row begins with whose sums c(j) = part(r(0)) / b
//                              + ... + part(r(j)) are all within(c(j)), none where not asked; one
//                              more if limit.one_more, limit.least at least, all at most; and the
//                              last one, +inf for none. Parts are >= 0, and within(c) holds up to
//                              some c
//   g.last_equal<T>(n, x, f)   where the first n of a row end in the order (f(e) descending, index
//                              ascending) if x = f of the last one: the last expert with f(e) = x
//                              among them, E - 1 where all that have it are; -1 for x = -inf
//   g.quotients(x, b)          q[e] = x[e] / b for an array of x[e] in 0 .. 2^60, as IEEE division
//                              rounds them
//   g.count(f)                 number of elements where f(e) holds
//   g.some(f)                  whether f(e) holds for an element of the row
//   g.any(c)                   a plain bool: whether c holds for any of the rows at hand
//   g.load_mask(mask)          the row of a routing mask, read once; its bits are on(e)
//   g.load_bit(mask, e)        one bit of it
//   g.store_mask(mask, f)      writes that row
//   g.store_first<T>(mask, n, x, early, f)   writes the first n as last_equal has them, x = f of
//                              the last; where early > 0 experts 0 .. early - 1 in their place
//
// A condition is a value<bool>: combine with `&`, `|`, `!` and choose with `select(condition, a,
// b)` instead of branching, since lanes and packed rows disagree. No collective stands under a
// condition. A loop whose length depends on the row runs while any row at hand needs it, and rows
// that are done keep what they have.
//
// Canonical reduction: element e belongs to virtual lane e mod 32, each virtual lane sums its
// elements in order of e starting from +0, then the tree 16, 8, 4, 2, 1. A group of W lanes holds
// 32 / W virtual lanes in each. Multiply-adds are written as math::fma, products that enter a sum
// as math::mul, so that no compiler contracts them differently.

namespace talpa {

/// A row (or, for token_pack, consecutive rows) of a matrix as lane groups read and write it.
template <class T>
struct row_pointer {
  T* data = nullptr;
  index stride = 0;  ///< elements from one token's row to the next; only token_pack moves along it
};

/// A number that each row has once, such as a learned threshold, as lane groups read and write it.
template <class T>
struct row_scalar {
  T* data = nullptr;
  index stride = 0;  ///< elements from one token's number to the next
};

/// Result of arg_max: the winning value and its expert, -1 where nothing was active.
template <class Value, class Index>
struct expert_value {
  Value value;
  Index expert;
};

/// Result of top: the largest value and the k-th largest.
template <class Value>
struct top_values {
  Value first;
  Value last;
};

/// Storage for `elements` of the groups that run on the CPU; one per thread, reset at each row.
class lane_scratch {
 public:
  lane_scratch(std::byte* data, std::size_t bytes) {
    const std::size_t past = reinterpret_cast<std::uintptr_t>(data) % 64;
    const std::size_t skipped = past == 0 ? 0 : 64 - past;
    data_ = data + skipped;
    bytes_ = bytes - skipped;
  }
  TALPA_HD void reset() { used_ = 0; }
  TALPA_HD void* take(std::size_t bytes) {
    void* const start = data_ + used_;
    used_ += (bytes + 63) / 64 * 64;
    return used_ <= bytes_ ? start : nullptr;
  }
  /// f(), a number that depends on what names it: called only where the last one had other names.
  template <class T, class F>
  [[gnu::always_inline]] T shared(int kind, index experts, double argument, F f) {
    kind = kind * 16 + static_cast<int>(sizeof(T));
    if (kind != kind_ || experts != experts_ || argument != argument_) {
      shared_ = static_cast<double>(f());
      kind_ = kind, experts_ = experts, argument_ = argument;
    }
    return static_cast<T>(shared_);
  }
  /// Arrays that one row functor may ask for.
  static constexpr index max_arrays = 16;
  /// Bytes for `max_arrays` arrays of `lanes` values of up to 8 bytes for every expert.
  static constexpr std::size_t bytes_for(index experts, index lanes) {
    return 64 + static_cast<std::size_t>(max_arrays) *
                    (static_cast<std::size_t>(experts + mask_word_bits) *
                         static_cast<std::size_t>(lanes) * 8 +
                     64);
  }

 private:
  std::byte* data_;
  std::size_t bytes_;
  std::size_t used_ = 0;
  int kind_ = -1;
  index experts_ = 0;
  double argument_ = 0.0;
  double shared_ = 0.0;
};

/// How far leading_ranks goes.
struct rank_limit {
  index least;    ///< ranks in any case
  bool one_more;  ///< the one whose sum is beyond
};
/// Result of leading_ranks: how many, and the last of them.
template <class Value, class Count>
struct leading {
  Value last;
  Count count;
};

namespace detail {

/// The last levels of the canonical tree, over the first min(E, 32) virtual lanes, of which lanes
/// E .. 7 must hold +0. A virtual lane without elements holds +0 and every partial sum differs from
/// -0, so leaving such lanes out, or adding them, changes no bit.
template <class Value>
[[gnu::always_inline]] TALPA_HD inline Value canonical_tree(Value* lanes, index experts) {
  for (index half = mask_word_bits / 2; half >= 8; half /= 2) {
    for (index i = 0; i < half && i + half < experts; ++i) lanes[i] = lanes[i] + lanes[i + half];
  }
  const Value even = (lanes[0] + lanes[4]) + (lanes[2] + lanes[6]);
  const Value odd = (lanes[1] + lanes[5]) + (lanes[3] + lanes[7]);
  return even + odd;
}

/// Puts the larger of two values first.
template <class Value>
[[gnu::always_inline]] TALPA_HD inline void exchange(Value& first, Value& second) {
  const Value a = first, b = second;
  first = larger(a, b);
  second = smaller(a, b);
}

/// Sorts x[0 .. 8), largest first, by 19 compare-exchanges, the fewest there are (Knuth, The Art of
/// Computer Programming 3, section 5.3.4).
template <class Value>
[[gnu::always_inline]] TALPA_HD inline void sort_eight(Value* x) {
  Value a = x[0], b = x[1], c = x[2], d = x[3], e = x[4], f = x[5], g = x[6], h = x[7];
  exchange(a, b), exchange(c, d), exchange(e, f), exchange(g, h);
  exchange(a, c), exchange(b, d), exchange(e, g), exchange(f, h);
  exchange(b, c), exchange(f, g), exchange(a, e), exchange(d, h);
  exchange(b, f), exchange(c, g);
  exchange(b, e), exchange(d, g);
  exchange(c, e), exchange(d, f);
  exchange(d, e);
  x[0] = a, x[1] = b, x[2] = c, x[3] = d, x[4] = e, x[5] = f, x[6] = g, x[7] = h;
}

/// The last three rounds of a bitonic merge, over x[0 .. 8); places from n on hold -inf.
template <class Value>
[[gnu::always_inline]] TALPA_HD inline void merge_eight(Value* x, index n) {
  if (n >= 8) {
    Value a = x[0], b = x[1], c = x[2], d = x[3], e = x[4], f = x[5], g = x[6], h = x[7];
    exchange(a, e), exchange(b, f), exchange(c, g), exchange(d, h);
    exchange(a, c), exchange(b, d), exchange(e, g), exchange(f, h);
    exchange(a, b), exchange(c, d), exchange(e, f), exchange(g, h);
    x[0] = a, x[1] = b, x[2] = c, x[3] = d, x[4] = e, x[5] = f, x[6] = g, x[7] = h;
    return;
  }
  for (index d = 4; d > 0; d /= 2) {
    for (index i = 0; i + d < n; ++i) {
      if ((i & d) == 0) exchange(x[i], x[i + d]);
    }
  }
}
/// The larger of x[i] and x[j], i < j, comes to i; places from n on hold -inf.
template <class Value>
[[gnu::always_inline]] TALPA_HD inline void exchange_inside(Value* x, index n, index i, index j) {
  if (j < n) exchange(x[i], x[j]);
}
/// Exchanges a with d and b with c, then a with b and c with d, of four places in ascending order;
/// or a with c and b with d first. Between the two rounds values stay in registers.
template <class Value>
[[gnu::always_inline]] TALPA_HD inline void exchange_twice(Value* x, index n, index a, index b,
                                                           index c, index d, bool mirrored) {
  if (d < n) {
    Value p = x[a], q = x[b], r = x[c], s = x[d];
    if (mirrored) {
      exchange(p, s), exchange(q, r);
    } else {
      exchange(p, r), exchange(q, s);
    }
    exchange(p, q), exchange(r, s);
    x[a] = p, x[b] = q, x[c] = r, x[d] = s;
  } else {
    exchange_inside(x, n, a, mirrored ? d : c), exchange_inside(x, n, b, mirrored ? c : d);
    exchange_inside(x, n, a, b), exchange_inside(x, n, c, d);
  }
}

/// Sorts x[0 .. n), largest first, by compare-exchanges that depend on n alone: Batcher's bitonic
/// merge sort, whose exchanges with places beyond n are left out, as if they held `lowest` = -inf.
/// Two rounds run at a time where they stay among four places, three among eight: stores limit it,
/// and the odd-even merge sort, with a sixth fewer exchanges, has more of them.
template <class Value>
TALPA_HD inline void sort_descending(Value* x, index n, Value lowest) {
  for (index first = 0; first < n; first += 8) {
    Value rest[8];
    Value* const run = n - first < 8 ? rest : x + first;
    if (run == rest) {
      for (index i = 0; i < 8; ++i) rest[i] = first + i < n ? x[first + i] : lowest;
    }
    sort_eight(run);
    if (run == rest) {
      for (index i = first; i < n; ++i) x[i] = rest[i - first];
    }
  }
  // Runs of p become runs of 2 p.
  for (index p = 8; p < n; p *= 2) {
    for (index from = 0; from + p < n; from += 2 * p) {
      const index last = from + 2 * p;
      index d = p / 2;  // distance of the next round
      if (d < 8) {
        for (index i = 0; i < p; ++i) exchange_inside(x, n, from + i, last - 1 - i);
      } else {
        for (index i = 0; i < d; ++i) {
          exchange_twice(x, n, from + i, from + d + i, last - 1 - d - i, last - 1 - i, true);
        }
        d /= 2;
      }
      for (; d >= 16; d /= 4) {
        for (index first = from; first < last; first += 2 * d) {
          for (index i = first; i < first + d / 2; ++i) {
            exchange_twice(x, n, i, i + d / 2, i + d, i + d + d / 2, false);
          }
        }
      }
      if (d == 8) {
        for (index first = from; first < last; first += 16) {
          for (index i = first; i < first + 8; ++i) exchange_inside(x, n, i, i + 8);
        }
      }
      for (index first = from; first < last; first += 8) merge_eight(x + first, n - first);
    }
  }
}

/// Inserts f(from), ..., f(n - 1) among the K largest values so far, largest first.
template <int K, class Value, class F>
[[gnu::always_inline]] inline void insert_each(Value (&kept)[K], index from, index n, F f) {
  for (index e = from; e < n; ++e) {
    Value x = f(e);
#pragma GCC unroll 8
    for (int j = 0; j < K; ++j) {
      const Value held = kept[j];
      kept[j] = larger(x, held);
      x = smaller(x, held);
    }
  }
}

/// r[0 .. K) = the K largest of f(0), ..., f(n - 1), largest first, -inf where there are fewer.
template <int K, class T, class Value, class F>
[[gnu::always_inline]] inline void keep_largest(Value* r, index n, Value lowest, F f) {
  Value kept[K];
  for (int j = 0; j < K; ++j) kept[j] = lowest;
  index e = 0;
  if constexpr (K <= 2) {
    // In pairs, so that what waits for the pair before is one comparison deep.
    for (; e + 2 <= n; e += 2) {
      const Value x = f(e), y = f(e + 1);
      const Value high = larger(x, y);
      if constexpr (K == 2) {
        kept[1] = larger(kept[1], larger(smaller(kept[0], high), smaller(x, y)));
      }
      kept[0] = larger(kept[0], high);
    }
  } else if constexpr (K == 8) {
    // Eight at a time: the larger of each of two sorted runs and its mirror image are the eight
    // largest, in bitonic order. 70 comparisons, where inserting them takes 120.
    for (; e + 8 <= n; e += 8) {
      Value run[8];
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) run[j] = f(e + j);
      sort_eight(run);
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) kept[j] = larger(kept[j], run[7 - j]);
      merge_eight(kept, 8);
    }
  }
  insert_each(kept, e, n, f);
  for (int j = 0; j < K; ++j) r[j] = kept[j];
}

/// What `ranks` gives.
template <class Value>
struct rank_array {
  const Value* data;
  [[gnu::always_inline]] TALPA_HD Value operator()(index j) const { return data[j]; }
};

/// store_first by the place of the last one.
template <class T, class G, class Count, class Value, class F>
[[gnu::always_inline]] TALPA_HD inline void store_up_to_last(const G& g,
                                                             row_pointer<std::uint32_t> mask,
                                                             const Count& n, const Value& x,
                                                             const Count& early, F f) {
  // No value is beyond the one that stands for a row of early experts.
  const auto other = early > g.uniform(std::int32_t{0});
  const auto value = talpa::select(other, g.uniform(std::numeric_limits<T>::infinity()), x);
  const auto last =
      talpa::select(other, g.uniform(std::int32_t{-1}), g.template last_equal<T>(n, x, f));
  g.store_mask(mask, [&](auto e) {
    const auto y = f(e);
    const auto higher = y > value, equal = y == value;
    const auto not_later = e.expert() <= last, first = e.expert() < early;
    return (higher | (equal & not_later)) | first;
  });
}

/// math::exp_nonpositive and math::expm1_nonpositive as what sum_of takes.
struct exp_nonpositive_of {
  template <class Value>
  [[gnu::always_inline]] TALPA_HD Value operator()(const Value& x) const {
    return math::exp_nonpositive(x);
  }
  template <class Value, int N>
  [[gnu::always_inline]] void all(Value (&x)[N]) const {
    math::exp_nonpositive(x);
  }
};
struct expm1_nonpositive_of {
  template <class Value>
  [[gnu::always_inline]] TALPA_HD Value operator()(const Value& x) const {
    return math::expm1_nonpositive(x);
  }
  template <class Value, int N>
  [[gnu::always_inline]] void all(Value (&x)[N]) const {
    math::expm1_nonpositive(x);
  }
};
/// x[i] becomes map(x[i]), for all i in lock-step where map can.
template <class Map, class Value, int N>
[[gnu::always_inline]] TALPA_HD inline void map_all(const Map& map, Value (&x)[N]) {
  if constexpr (N > 1 && requires { map.all(x); }) {
    map.all(x);
  } else {
    for (int i = 0; i < N; ++i) x[i] = map(x[i]);
  }
}

/// Ranks whose parts lead_by_rank computes before it looks whether a row needs more.
template <class G>
inline constexpr index ranks_at_once = 1;
template <class G>
requires(G::tokens > 1) inline constexpr index ranks_at_once<G> = 8;

/// leading_ranks, one rank after the other. Rows side by side seldom end at the same rank: their
/// parts are computed several ranks at a time, without waiting for the sums. Ranks after the end of
/// a row change nothing.
template <class T, class G, class Part, class Value, class Within, class Condition, class F>
[[gnu::always_inline]] TALPA_HD inline leading<Value, typename G::template value<std::int32_t>>
lead_by_rank(const G& g, const rank_limit& limit, Part part, const Value& b, Within within,
             const Condition& asked, F f) {
  const auto infinity = g.uniform(std::numeric_limits<T>::infinity());
  const auto ranks = g.template ranks<T>(g.experts(), f);
  auto last = infinity;
  auto count = g.uniform(std::int32_t{0});
  auto sum = g.uniform(T{0});
  auto open = asked;  // nothing was beyond yet
  constexpr index step = ranks_at_once<G>;
  for (index first = 0; first < g.experts() && (first < limit.least || g.any(open));
       first += step) {
    const index end = first + step < g.experts() ? first + step : g.experts();
    Value share[step];
    for (index j = 0; j < step; ++j) share[j] = ranks(first + j < end ? first + j : end - 1);
    map_all(part, share);
    for (index j = 0; j < step; ++j) share[j] = share[j] / b;
    for (index j = first; j < end; ++j) {
      const auto value = ranks(j);
      const auto found = value > -infinity;
      sum = sum + share[j - first];
      const auto before = open & found;
      open = before & within(sum);
      const auto due = limit.one_more ? before : open;
      const auto on = j < limit.least ? found : due;
      last = talpa::select(on, value, last);
      count = talpa::select(on, g.uniform(static_cast<std::int32_t>(j + 1)), count);
    }
  }
  return {last, count};
}

/// What `quotients` gives where division is one instruction.
template <class Array, class Value>
struct quotient_array {
  Array x;
  Value b;
  template <class Element>
  [[gnu::always_inline]] TALPA_HD auto operator[](Element e) const {
    return x[e] / b;
  }
};

/// Arrays over the elements of a row when each lane holds all of them.
template <class Value>
struct element_array {
  Value* data;
  template <class Element>
  [[gnu::always_inline]] TALPA_HD Value& operator[](Element e) const {
    return data[e.slot];
  }
};

}  // namespace detail

/// One lane that holds the whole row: the reference, and the CPU's path for many experts.
class serial {
 public:
  static constexpr int tokens = 1;
  template <class T>
  using value = T;

  struct element {
    index slot;
    TALPA_HD std::int32_t expert() const { return static_cast<std::int32_t>(slot); }
  };

  TALPA_HD serial(index experts, lane_scratch* scratch) : experts_(experts), scratch_(scratch) {}

  TALPA_HD index experts() const { return experts_; }
  template <class T>
  TALPA_HD static T uniform(T c) {
    return c;
  }
  template <class F>
  [[gnu::always_inline]] TALPA_HD void for_each(F f) const {
    for (index e = 0; e < experts_; ++e) f(element{e});
  }
  template <class T>
  TALPA_HD detail::element_array<T> elements() const {
    return {static_cast<T*>(scratch_->take(static_cast<std::size_t>(experts_) * sizeof(T)))};
  }
  template <class T>
  TALPA_HD static T load(row_pointer<const T> row, element e, T) {
    return row.data[e.slot];
  }
  template <class T>
  TALPA_HD static void store(row_pointer<T> row, element e, T v) {
    row.data[e.slot] = v;
  }
  template <class T>
  TALPA_HD detail::element_array<T> load_row(row_pointer<const T> row, T) const {
    const auto x = elements<T>();
    for (index e = 0; e < experts_; ++e) x.data[e] = row.data[e];
    return x;
  }
  template <class T, class F>
  [[gnu::always_inline]] TALPA_HD void store_row(row_pointer<T> row, F f) const {
    for (index e = 0; e < experts_; ++e) row.data[e] = f(element{e});
  }
  template <class T>
  TALPA_HD static T load(row_scalar<const T> scalar) {
    return *scalar.data;
  }
  template <class T>
  TALPA_HD static void store(row_scalar<T> scalar, T v) {
    *scalar.data = v;
  }
  TALPA_HD static bool any(bool condition) { return condition; }
  template <class T, class F>
  [[gnu::always_inline]] TALPA_HD T sum(F f) const {
    T lanes[mask_word_bits] = {};
    for (index e = 0; e < experts_; ++e) {
      T& lane = lanes[e % mask_word_bits];
      lane = lane + f(element{e});
    }
    return detail::canonical_tree(lanes, experts_);
  }
  template <class T, class Map, class F, class Use>
  [[gnu::always_inline]] TALPA_HD T sum_of(Map map, F f, Use use) const {
    return sum<T>([&](element e) { return use(e, map(f(e))); });
  }
  template <class T, class F>
  [[gnu::always_inline]] TALPA_HD T max(F f) const {
    T best = -std::numeric_limits<T>::infinity();
    for (index e = 0; e < experts_; ++e) {
      const T x = f(element{e});
      best = x > best ? x : best;
    }
    return best;
  }
  template <class T, class F, class A>
  [[gnu::always_inline]] TALPA_HD expert_value<T, std::int32_t> arg_max(F f, A active) const {
    expert_value<T, std::int32_t> best{-std::numeric_limits<T>::infinity(), -1};
    for (index e = 0; e < experts_; ++e) {
      const T x = f(element{e});
      if (active(element{e}) && (x > best.value || best.expert < 0)) {
        best = {x, static_cast<std::int32_t>(e)};
      }
    }
    return best;
  }
  template <class T, class F>
  TALPA_HD detail::rank_array<T> ranks(index most, F f) const {
    T* const r = elements<T>().data;
    if (most > few_ranks) {
      for (index e = 0; e < experts_; ++e) r[e] = f(element{e});
      detail::sort_descending(r, experts_, -std::numeric_limits<T>::infinity());
      return {r};
    }
    for (index j = 0; j < most; ++j) r[j] = -std::numeric_limits<T>::infinity();
    for (index e = 0; e < experts_; ++e) {
      const T x = f(element{e});
      if (!(x > r[most - 1])) continue;
      index j = most - 1;
      for (; j > 0 && x > r[j - 1]; --j) r[j] = r[j - 1];
      r[j] = x;
    }
    return {r};
  }
  template <class T, class F>
  TALPA_HD top_values<T> top(index k, F f) const {
    const auto r = ranks<T>(k, f);
    return {r(0), r(k - 1)};
  }
  template <class T, class Part, class Within, class F>
  TALPA_HD leading<T, std::int32_t> leading_ranks(const rank_limit& limit, Part part, const T& b,
                                                  Within within, const bool& asked, F f) const {
    return detail::lead_by_rank<T>(*this, limit, part, b, within, asked, f);
  }
  template <class T, class F>
  TALPA_HD std::int32_t last_equal(std::int32_t n, T x, F f) const {
    if (!(x > -std::numeric_limits<T>::infinity())) return -1;
    std::int32_t left = n, equal = 0;
    for (index e = 0; e < experts_; ++e) {
      const T y = f(element{e});
      left -= y > x ? 1 : 0;
      equal += y == x ? 1 : 0;
    }
    std::int32_t last = static_cast<std::int32_t>(experts_ - 1);
    if (equal <= left) return last;
    last = -1;
    for (index e = 0; e < experts_ && left > 0; ++e) {
      if (!(f(element{e}) == x)) continue;
      last = static_cast<std::int32_t>(e);
      --left;
    }
    return last;
  }
  template <class Array, class Value>
  TALPA_HD static detail::quotient_array<Array, Value> quotients(const Array& x, const Value& b) {
    return {x, b};
  }
  template <class F>
  [[gnu::always_inline]] TALPA_HD std::int32_t count(F f) const {
    std::int32_t n = 0;
    for (index e = 0; e < experts_; ++e) n += f(element{e}) ? 1 : 0;
    return n;
  }
  template <class F>
  [[gnu::always_inline]] TALPA_HD bool some(F f) const {
    bool found = false;
    for (index e = 0; e < experts_; ++e) found |= f(element{e});
    return found;
  }
  struct mask_row {
    const std::uint32_t* words;
    TALPA_HD bool operator()(element e) const {
      return ((words[e.slot / mask_word_bits] >> (e.slot % mask_word_bits)) & 1u) != 0;
    }
  };
  TALPA_HD static mask_row load_mask(row_pointer<const std::uint32_t> mask) { return {mask.data}; }
  TALPA_HD static bool load_bit(row_pointer<const std::uint32_t> mask, element e) {
    return ((mask.data[e.slot / mask_word_bits] >> (e.slot % mask_word_bits)) & 1u) != 0;
  }
  template <class F>
  [[gnu::always_inline]] TALPA_HD void store_mask(row_pointer<std::uint32_t> mask, F f) const {
    for (index w = 0; w < mask_words(experts_); ++w) {
      std::uint32_t word = 0;
      const index first = w * mask_word_bits;
      const index last = first + mask_word_bits < experts_ ? first + mask_word_bits : experts_;
      for (index e = first; e < last; ++e) {
        word |= static_cast<std::uint32_t>(f(element{e})) << (e - first);
      }
      mask.data[w] = word;
    }
  }
  template <class T, class F>
  [[gnu::always_inline]] TALPA_HD void store_first(row_pointer<std::uint32_t> mask, std::int32_t n,
                                                   T x, std::int32_t early, F f) const {
    detail::store_up_to_last<T>(*this, mask, n, x, early, f);
  }

 private:
  static constexpr index few_ranks = 32;  // up to here they are kept sorted while the row is read
  index experts_;
  lane_scratch* scratch_;
};

}  // namespace talpa
