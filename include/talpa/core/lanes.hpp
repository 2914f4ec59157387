// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/config.hpp>
#include <talpa/core/index.hpp>
#include <talpa/core/math.hpp>
#include <talpa/core/registers.hpp>

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <utility>

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
//   g.max<T>(f)                largest f(e); NaN is skipped; -inf for an empty row
//   g.arg_max<T>(f, active)    largest f(e) among active(e), ties to the lower index; -1 if none
//   g.ranks<T>(most, f)        r(j), j < most <= E: the j-th largest f(e) counted from 0, -inf
//                              where fewer are above it; unspecified if some are NaN
//   g.last_equal<T>(n, x, f)   where the first n of a row end in the order (f(e) descending, index
//                              ascending) if x = f of the last one: the last expert with f(e) = x
//                              among them, E - 1 where all that have it are; -1 for x = -inf
//   g.count(f)                 number of elements where f(e) holds
//   g.any(c)                   a plain bool: whether c holds for any of the rows at hand
//   g.load_mask(mask)          the row of a routing mask, read once; its bits are on(e)
//   g.load_bit(mask, e)        one bit of it
//   g.store_mask(mask, f)      writes that row
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

namespace detail {

/// Whether W values of type T are held in one vector register. Wider packs, which no kernel uses,
/// are arrays: g++ takes vectors beyond the registers apart, value by value.
template <class T, int W>
inline constexpr bool in_register =
    std::is_arithmetic_v<T>&& W > 1 &&
    (W & (W - 1)) == 0 && W* static_cast<int>(sizeof(T)) <= register_bytes;

template <class T, int W, bool = in_register<T, W>>
struct pack_storage {
  typedef T type[W];
};
template <class T, int W>
struct pack_storage<T, W, true> {
  typedef T type __attribute__((vector_size(W * sizeof(T))));
};

}  // namespace detail

/// W values side by side: of W tokens (token_pack) or of W lanes (sim).
template <class T, int W>
struct pack {
  typename detail::pack_storage<T, W>::type v;
};

/// W conditions in the width of a float, all bits set where one holds and none where not, so that
/// comparing, combining and choosing stay in vector registers.
template <int W>
struct pack<bool, W> {
  typename detail::pack_storage<std::int32_t, W>::type v;
};

namespace detail {

/// The values of a pack as an array, which loops over them index.
template <class T, int W>
struct pack_values {
  alignas(sizeof(T) * W <= 64 ? sizeof(T) * W : sizeof(T)) T v[W];
};
template <class T, int W>
[[gnu::always_inline]] inline pack_values<T, W> values_of(const pack<T, W>& p) {
  pack_values<T, W> a;
  __builtin_memcpy(a.v, &p.v, sizeof(a.v));
  return a;
}

template <class T, int W, class F>
[[gnu::always_inline]] inline pack<T, W> make_pack(F f) {
  using stored = std::conditional_t<std::same_as<T, bool>, std::int32_t, T>;
  pack_values<stored, W> r;
  // Kept a loop, which compilers turn into vector code; unrolled early, gcc leaves it scalar.
#pragma GCC unroll 1
  for (int i = 0; i < W; ++i) {
    if constexpr (std::same_as<T, bool>) {
      r.v[i] = -static_cast<std::int32_t>(f(i));
    } else {
      r.v[i] = f(i);
    }
  }
  pack<T, W> p;
  __builtin_memcpy(&p.v, r.v, sizeof(r.v));
  return p;
}

/// A condition from what comparing two vectors of any width gives.
template <int W, class Comparison>
[[gnu::always_inline]] inline pack<bool, W> condition(Comparison c) {
  if constexpr (sizeof(c) == W * sizeof(std::int32_t)) {
    return {(typename pack_storage<std::int32_t, W>::type)c};
  } else {
    return {__builtin_convertvector(c, typename pack_storage<std::int32_t, W>::type)};
  }
}

}  // namespace detail

// Element-wise arithmetic. There is no operator*: see math::mul.
template <class T, int W>
[[gnu::always_inline]] inline pack<T, W> operator+(const pack<T, W>& a, const pack<T, W>& b) {
  if constexpr (detail::in_register<T, W>) {
    return {a.v + b.v};
  } else {
    return detail::make_pack<T, W>([&](int i) { return a.v[i] + b.v[i]; });
  }
}
template <class T, int W>
[[gnu::always_inline]] inline pack<T, W> operator-(const pack<T, W>& a, const pack<T, W>& b) {
  if constexpr (detail::in_register<T, W>) {
    return {a.v - b.v};
  } else {
    return detail::make_pack<T, W>([&](int i) { return a.v[i] - b.v[i]; });
  }
}
template <class T, int W>
[[gnu::always_inline]] inline pack<T, W> operator-(const pack<T, W>& a) {
  if constexpr (detail::in_register<T, W>) {
    return {-a.v};
  } else {
    return detail::make_pack<T, W>([&](int i) { return -a.v[i]; });
  }
}
template <class T, int W>
[[gnu::always_inline]] inline pack<T, W> operator/(const pack<T, W>& a, const pack<T, W>& b) {
  if constexpr (detail::in_register<T, W>) {
    return {a.v / b.v};
  } else {
    return detail::make_pack<T, W>([&](int i) { return a.v[i] / b.v[i]; });
  }
}
template <class T, int W>
[[gnu::always_inline]] inline pack<bool, W> operator<(const pack<T, W>& a, const pack<T, W>& b) {
  if constexpr (detail::in_register<T, W>) {
    return detail::condition<W>(a.v < b.v);
  } else {
    return detail::make_pack<bool, W>([&](int i) { return a.v[i] < b.v[i]; });
  }
}
template <class T, int W>
[[gnu::always_inline]] inline pack<bool, W> operator>(const pack<T, W>& a, const pack<T, W>& b) {
  return b < a;
}
template <class T, int W>
[[gnu::always_inline]] inline pack<bool, W> operator<=(const pack<T, W>& a, const pack<T, W>& b) {
  if constexpr (detail::in_register<T, W>) {
    return detail::condition<W>(a.v <= b.v);
  } else {
    return detail::make_pack<bool, W>([&](int i) { return a.v[i] <= b.v[i]; });
  }
}
template <class T, int W>
[[gnu::always_inline]] inline pack<bool, W> operator>=(const pack<T, W>& a, const pack<T, W>& b) {
  return b <= a;
}
template <class T, int W>
[[gnu::always_inline]] inline pack<bool, W> operator==(const pack<T, W>& a, const pack<T, W>& b) {
  if constexpr (detail::in_register<T, W>) {
    return detail::condition<W>(a.v == b.v);
  } else {
    return detail::make_pack<bool, W>([&](int i) { return a.v[i] == b.v[i]; });
  }
}
template <int W>
[[gnu::always_inline]] inline pack<bool, W> operator&(const pack<bool, W>& a,
                                                      const pack<bool, W>& b) {
  if constexpr (detail::in_register<std::int32_t, W>) {
    return {a.v & b.v};
  } else {
    return detail::make_pack<bool, W>([&](int i) { return (a.v[i] & b.v[i]) != 0; });
  }
}
template <int W>
[[gnu::always_inline]] inline pack<bool, W> operator|(const pack<bool, W>& a,
                                                      const pack<bool, W>& b) {
  if constexpr (detail::in_register<std::int32_t, W>) {
    return {a.v | b.v};
  } else {
    return detail::make_pack<bool, W>([&](int i) { return (a.v[i] | b.v[i]) != 0; });
  }
}
template <int W>
[[gnu::always_inline]] inline pack<bool, W> operator!(const pack<bool, W>& a) {
  if constexpr (detail::in_register<std::int32_t, W>) {
    return {~a.v};
  } else {
    return detail::make_pack<bool, W>([&](int i) { return a.v[i] == 0; });
  }
}

/// condition ? a : b, without a branch.
template <class T>
TALPA_HD inline T select(bool condition, T a, T b) {
  return condition ? a : b;
}
template <class T, int W>
[[gnu::always_inline]] inline pack<T, W> select(const pack<bool, W>& condition, const pack<T, W>& a,
                                                const pack<T, W>& b) {
  if constexpr (!detail::in_register<T, W> || !detail::in_register<std::int32_t, W>) {
    return detail::make_pack<T, W>([&](int i) { return condition.v[i] != 0 ? a.v[i] : b.v[i]; });
  } else if constexpr (sizeof(T) == sizeof(std::int32_t)) {
    return {condition.v ? a.v : b.v};
  } else {
    using wide = std::conditional_t<sizeof(T) == 8, std::int64_t, std::int16_t>;
    return {__builtin_convertvector(condition.v, typename detail::pack_storage<wide, W>::type)
                ? a.v
                : b.v};
  }
}
template <int W>
[[gnu::always_inline]] inline pack<bool, W> select(const pack<bool, W>& condition,
                                                   const pack<bool, W>& a, const pack<bool, W>& b) {
  const auto otherwise = !condition;
  return (condition & a) | (otherwise & b);
}

namespace math {
template <class T, int W>
[[gnu::always_inline]] inline pack<T, W> fma(const pack<T, W>& a, const pack<T, W>& b,
                                             const pack<T, W>& c) {
  const auto x = talpa::detail::values_of(a), y = talpa::detail::values_of(b),
             z = talpa::detail::values_of(c);
  return talpa::detail::make_pack<T, W>([&](int i) __attribute__((always_inline)) {
    return math::fma(x.v[i], y.v[i], z.v[i]);
  });
}
template <class T, int W>
[[gnu::always_inline]] inline pack<T, W> mul(const pack<T, W>& a, const pack<T, W>& b) {
  const auto x = talpa::detail::values_of(a), y = talpa::detail::values_of(b);
  return talpa::detail::make_pack<T, W>([&](int i) __attribute__((always_inline)) {
    return math::mul(x.v[i], y.v[i]);
  });
}
template <class T, int W>
[[gnu::always_inline]] inline pack<T, W> exp(const pack<T, W>& a) {
  const auto x = talpa::detail::values_of(a);
  return talpa::detail::make_pack<T, W>([&](int i) __attribute__((always_inline)) {
    return math::exp(x.v[i]);
  });
}
template <class T, int W>
[[gnu::always_inline]] inline pack<T, W> log(const pack<T, W>& a) {
  const auto x = talpa::detail::values_of(a);
  return talpa::detail::make_pack<T, W>([&](int i) __attribute__((always_inline)) {
    return math::log(x.v[i]);
  });
}
template <class T, int W>
[[gnu::always_inline]] inline pack<T, W> expm1(const pack<T, W>& a) {
  const auto x = talpa::detail::values_of(a);
  return talpa::detail::make_pack<T, W>([&](int i) __attribute__((always_inline)) {
    return math::expm1(x.v[i]);
  });
}
template <class T, int W>
[[gnu::always_inline]] inline pack<T, W> log1p(const pack<T, W>& a) {
  const auto x = talpa::detail::values_of(a);
  return talpa::detail::make_pack<T, W>([&](int i) __attribute__((always_inline)) {
    return math::log1p(x.v[i]);
  });
}
template <class T, int W>
[[gnu::always_inline]] inline pack<T, W> sigmoid(const pack<T, W>& a) {
  const auto x = talpa::detail::values_of(a);
  return talpa::detail::make_pack<T, W>([&](int i) __attribute__((always_inline)) {
    return math::sigmoid(x.v[i]);
  });
}
template <class T, int W>
[[gnu::always_inline]] inline pack<T, W> sigmoid_derivative(const pack<T, W>& a) {
  const auto x = talpa::detail::values_of(a);
  return talpa::detail::make_pack<T, W>([&](int i) __attribute__((always_inline)) {
    return math::sigmoid_derivative(x.v[i]);
  });
}
template <class T, int W>
[[gnu::always_inline]] inline pack<T, W> softplus(const pack<T, W>& a) {
  const auto x = talpa::detail::values_of(a);
  return talpa::detail::make_pack<T, W>([&](int i) __attribute__((always_inline)) {
    return math::softplus(x.v[i]);
  });
}
template <class T, int W>
[[gnu::always_inline]] inline pack<T, W> normal_cdf(const pack<T, W>& a) {
  return talpa::detail::make_pack<T, W>([&](int i) { return math::normal_cdf(a.v[i]); });
}
template <class T, int W>
[[gnu::always_inline]] inline pack<T, W> normal_density(const pack<T, W>& a) {
  return talpa::detail::make_pack<T, W>([&](int i) { return math::normal_density(a.v[i]); });
}
}  // namespace math

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

/// Storage for `elements` of the groups that run on the CPU; one per thread, reset at each row.
class lane_scratch {
 public:
  lane_scratch(std::byte* data, std::size_t bytes) {
    const std::size_t past = reinterpret_cast<std::uintptr_t>(data) % 64;
    const std::size_t skipped = past == 0 ? 0 : 64 - past;
    data_ = data + skipped;
    bytes_ = bytes - skipped;
  }
  void reset() { used_ = 0; }
  void* take(std::size_t bytes) {
    void* const start = data_ + used_;
    used_ += (bytes + 63) / 64 * 64;
    return used_ <= bytes_ ? start : nullptr;
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
};

namespace detail {

/// The last levels of the canonical tree, over the first min(E, 32) virtual lanes. A virtual lane
/// without elements holds +0 and every partial sum differs from -0, so leaving such lanes out
/// changes no bit.
template <class Value>
[[gnu::always_inline]] TALPA_HD inline Value canonical_tree(Value* lanes, index experts) {
  for (index half = mask_word_bits / 2; half > 0; half /= 2) {
    for (index i = 0; i < half && i + half < experts; ++i) lanes[i] = lanes[i] + lanes[i + half];
  }
  return lanes[0];
}

/// The larger and the smaller of two values; one instruction each where a target has it.
template <class Value>
[[gnu::always_inline]] TALPA_HD inline Value larger(const Value& a, const Value& b) {
  return talpa::select(a > b, a, b);
}
template <class Value>
[[gnu::always_inline]] TALPA_HD inline Value smaller(const Value& a, const Value& b) {
  return talpa::select(a < b, a, b);
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

/// Sorts x[0 .. n), largest first, by compare-exchanges that depend on n alone: Batcher's odd-even
/// merge sort, whose exchanges with places beyond n are left out, as if they held -inf.
template <class Value>
TALPA_HD inline void sort_descending(Value* x, index n) {
  const index whole = n / 8 * 8;
  for (index i = 0; i < whole; i += 8) sort_eight(x + i);
  // Runs of p become runs of 2 p; those of the first `whole` begin with 8.
  const auto merge_runs = [&](index from, index p) {
    for (index d = p; d > 0; d /= 2) {
      for (index first = from + d % p; first + d < n; first += 2 * d) {
        const index last = first + d < n - d ? first + d : n - d;
        // A pair from two different runs of 2 p is none.
        if ((first - from) / (2 * p) != (first - from + d) / (2 * p)) continue;
        for (index i = first; i < last; ++i) exchange(x[i], x[i + d]);
      }
    }
  };
  for (index p = 1; p < 8 && whole + p < n; p *= 2) merge_runs(whole, p);
  for (index p = 8; p < n; p *= 2) merge_runs(0, p);
}

/// r[0 .. K) = the K largest of f(0), ..., f(n - 1), largest first, -inf where there are fewer.
template <int K, class T, class Value, class F>
[[gnu::always_inline]] inline void insert_largest(Value* r, index n, Value lowest, F f) {
  Value kept[K];
  for (int j = 0; j < K; ++j) kept[j] = lowest;
  for (index e = 0; e < n; ++e) {
    Value x = f(e);
#pragma GCC unroll 8
    for (int j = 0; j < K; ++j) {
      const Value held = kept[j];
      kept[j] = larger(x, held);
      x = smaller(x, held);
    }
  }
  for (int j = 0; j < K; ++j) r[j] = kept[j];
}

/// What `ranks` gives.
template <class Value>
struct rank_array {
  const Value* data;
  [[gnu::always_inline]] TALPA_HD Value operator()(index j) const { return data[j]; }
};

/// Arrays over the elements of a row when each lane holds all of them.
template <class Value>
struct element_array {
  Value* data;
  template <class Element>
  [[gnu::always_inline]] Value& operator[](Element e) const {
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
    std::int32_t expert() const { return static_cast<std::int32_t>(slot); }
  };

  serial(index experts, lane_scratch* scratch) : experts_(experts), scratch_(scratch) {}

  index experts() const { return experts_; }
  template <class T>
  static T uniform(T c) {
    return c;
  }
  template <class F>
  [[gnu::always_inline]] void for_each(F f) const {
    for (index e = 0; e < experts_; ++e) f(element{e});
  }
  template <class T>
  detail::element_array<T> elements() const {
    return {static_cast<T*>(scratch_->take(static_cast<std::size_t>(experts_) * sizeof(T)))};
  }
  template <class T>
  static T load(row_pointer<const T> row, element e, T) {
    return row.data[e.slot];
  }
  template <class T>
  static void store(row_pointer<T> row, element e, T v) {
    row.data[e.slot] = v;
  }
  template <class T>
  detail::element_array<T> load_row(row_pointer<const T> row, T) const {
    const auto x = elements<T>();
    for (index e = 0; e < experts_; ++e) x.data[e] = row.data[e];
    return x;
  }
  template <class T, class F>
  [[gnu::always_inline]] void store_row(row_pointer<T> row, F f) const {
    for (index e = 0; e < experts_; ++e) row.data[e] = f(element{e});
  }
  template <class T>
  static T load(row_scalar<const T> scalar) {
    return *scalar.data;
  }
  template <class T>
  static void store(row_scalar<T> scalar, T v) {
    *scalar.data = v;
  }
  static bool any(bool condition) { return condition; }
  template <class T, class F>
  [[gnu::always_inline]] T sum(F f) const {
    T lanes[mask_word_bits] = {};
    for (index e = 0; e < experts_; ++e) {
      T& lane = lanes[e % mask_word_bits];
      lane = lane + f(element{e});
    }
    return detail::canonical_tree(lanes, experts_);
  }
  template <class T, class F>
  [[gnu::always_inline]] T max(F f) const {
    T best = -std::numeric_limits<T>::infinity();
    for (index e = 0; e < experts_; ++e) {
      const T x = f(element{e});
      best = x > best ? x : best;
    }
    return best;
  }
  template <class T, class F, class A>
  [[gnu::always_inline]] expert_value<T, std::int32_t> arg_max(F f, A active) const {
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
  detail::rank_array<T> ranks(index most, F f) const {
    T* const r = elements<T>().data;
    if (most > few_ranks) {
      for (index e = 0; e < experts_; ++e) r[e] = f(element{e});
      detail::sort_descending(r, experts_);
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
  std::int32_t last_equal(std::int32_t n, T x, F f) const {
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
  template <class F>
  [[gnu::always_inline]] std::int32_t count(F f) const {
    std::int32_t n = 0;
    for (index e = 0; e < experts_; ++e) n += f(element{e}) ? 1 : 0;
    return n;
  }
  struct mask_row {
    const std::uint32_t* words;
    bool operator()(element e) const {
      return ((words[e.slot / mask_word_bits] >> (e.slot % mask_word_bits)) & 1u) != 0;
    }
  };
  static mask_row load_mask(row_pointer<const std::uint32_t> mask) { return {mask.data}; }
  static bool load_bit(row_pointer<const std::uint32_t> mask, element e) {
    return ((mask.data[e.slot / mask_word_bits] >> (e.slot % mask_word_bits)) & 1u) != 0;
  }
  template <class F>
  [[gnu::always_inline]] void store_mask(row_pointer<std::uint32_t> mask, F f) const {
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

 private:
  static constexpr index few_ranks = 32;  // up to here they are kept sorted while the row is read
  index experts_;
  lane_scratch* scratch_;
};

namespace detail {

/// One step of transposing C rows of C values: x takes from y what lies D to the left of its place,
/// y from x what lies D to the right.
template <int D, class V, std::size_t... J>
[[gnu::always_inline]] inline void swap_off_diagonal(V& x, V& y, std::index_sequence<J...>) {
  constexpr std::size_t c = sizeof...(J), d = D;
  const V a = x, b = y;
  x = __builtin_shufflevector(a, b, static_cast<int>((J & d) != 0 ? c + J - d : J)...);
  y = __builtin_shufflevector(a, b, static_cast<int>((J & d) != 0 ? c + J : J + d)...);
}
template <int D, int C, class V>
[[gnu::always_inline]] inline void transpose_from(V (&r)[C]) {
#pragma GCC unroll 16
  for (int i = 0; i < C; ++i) {
    if ((i & D) == 0) swap_off_diagonal<D>(r[i], r[i + D], std::make_index_sequence<C>{});
  }
  if constexpr (D > 1) transpose_from<D / 2, C>(r);
}
/// r[i][j] becomes r[j][i].
template <int C, class V>
[[gnu::always_inline]] inline void transpose_rows(V (&r)[C]) {
  transpose_from<C / 2, C>(r);
}

}  // namespace detail

/// W tokens side by side, one in each element of a pack: the CPU's path for few experts. Rows at
/// and beyond `valid` repeat the last valid row when read and are not written.
template <int W>
class token_pack {
 public:
  static constexpr int tokens = W;
  template <class T>
  using value = pack<T, W>;

  struct element {
    index slot;
    [[gnu::always_inline]] pack<std::int32_t, W> expert() const {
      return detail::make_pack<std::int32_t, W>(
          [&](int) { return static_cast<std::int32_t>(slot); });
    }
  };

  token_pack(index experts, int valid, lane_scratch* scratch)
      : experts_(experts), valid_(valid), scratch_(scratch) {}

  index experts() const { return experts_; }
  template <class T>
  [[gnu::always_inline]] static pack<T, W> uniform(T c) {
    return detail::make_pack<T, W>([&](int) { return c; });
  }
  template <class F>
  [[gnu::always_inline]] void for_each(F f) const {
    for (index e = 0; e < experts_; ++e) f(element{e});
  }
  template <class T>
  detail::element_array<pack<T, W>> elements() const {
    return {static_cast<pack<T, W>*>(
        scratch_->take(static_cast<std::size_t>(experts_) * sizeof(pack<T, W>)))};
  }
  template <class T>
  [[gnu::always_inline]] pack<T, W> load(row_pointer<const T> row, element e, T) const {
    return detail::make_pack<T, W>(
        [&](int i) { return row.data[(i < valid_ ? i : valid_ - 1) * row.stride + e.slot]; });
  }
  template <class T>
  [[gnu::always_inline]] void store(row_pointer<T> row, element e, const pack<T, W>& v) const {
    for (int i = 0; i < valid_; ++i) row.data[i * row.stride + e.slot] = v.v[i];
  }
  template <class T>
  detail::element_array<pack<T, W>> load_row(row_pointer<const T> row, T) const {
    const auto x = elements<T>();
    const index done = load_blocks<W>(row, reinterpret_cast<T*>(x.data), 0);
    for (index e = done; e < experts_; ++e) x.data[e] = load(row, element{e}, T{});
    return x;
  }
  template <class T, class F>
  [[gnu::always_inline]] void store_row(row_pointer<T> row, F f) const {
    pack<T, W> x[most_columns];
    for (index first = 0; first < experts_; first += most_columns) {
      const index columns = experts_ - first < most_columns ? experts_ - first : most_columns;
      for (index j = 0; j < columns; ++j) x[j] = f(element{first + j});
      store_columns({row.data + first, row.stride}, x, columns);
    }
  }
  template <class T>
  [[gnu::always_inline]] pack<T, W> load(row_scalar<const T> scalar) const {
    return detail::make_pack<T, W>(
        [&](int i) { return scalar.data[(i < valid_ ? i : valid_ - 1) * scalar.stride]; });
  }
  template <class T>
  [[gnu::always_inline]] void store(row_scalar<T> scalar, const pack<T, W>& v) const {
    for (int i = 0; i < valid_; ++i) scalar.data[i * scalar.stride] = v.v[i];
  }
  [[gnu::always_inline]] static bool any(const pack<bool, W>& condition) {
    std::int32_t found = 0;
    for (int i = 0; i < W; ++i) found |= condition.v[i];
    return found != 0;
  }
  template <class T, class F>
  [[gnu::always_inline]] pack<T, W> sum(F f) const {
    pack<T, W> lanes[mask_word_bits];
    const index held = experts_ < mask_word_bits ? experts_ : mask_word_bits;
    for (index e = 0; e < held; ++e) lanes[e] = uniform(T{}) + f(element{e});
    for (index first = held; first < experts_; first += mask_word_bits) {
      const index more = experts_ - first < mask_word_bits ? experts_ - first : mask_word_bits;
      for (index i = 0; i < more; ++i) lanes[i] = lanes[i] + f(element{first + i});
    }
    return detail::canonical_tree(lanes, experts_);
  }
  template <class T, class F>
  [[gnu::always_inline]] pack<T, W> max(F f) const {
    pack<T, W> best = uniform(-std::numeric_limits<T>::infinity());
    for (index e = 0; e < experts_; ++e) {
      const pack<T, W> x = f(element{e});
      best = talpa::select(x > best, x, best);
    }
    return best;
  }
  template <class T, class F, class A>
  [[gnu::always_inline]] expert_value<pack<T, W>, pack<std::int32_t, W>> arg_max(F f,
                                                                                 A active) const {
    expert_value<pack<T, W>, pack<std::int32_t, W>> best{
        uniform(-std::numeric_limits<T>::infinity()), uniform(std::int32_t{-1})};
    for (index e = 0; e < experts_; ++e) {
      const pack<T, W> x = f(element{e});
      const pack<bool, W> wins =
          active(element{e}) & ((x > best.value) | (best.expert < uniform(std::int32_t{0})));
      best.value = talpa::select(wins, x, best.value);
      best.expert = talpa::select(wins, element{e}.expert(), best.expert);
    }
    return best;
  }
  template <class T, class F>
  [[gnu::always_inline]] detail::rank_array<pack<T, W>> ranks(index most, F f) const {
    pack<T, W>* const r = static_cast<pack<T, W>*>(
        scratch_->take(static_cast<std::size_t>(experts_ < 8 ? 8 : experts_) * sizeof(pack<T, W>)));
    const auto at = [&](index e) { return f(element{e}); };
    const auto lowest = uniform(-std::numeric_limits<T>::infinity());
    if (most <= 1) {
      detail::insert_largest<1, T>(r, experts_, lowest, at);
    } else if (most == 2) {
      detail::insert_largest<2, T>(r, experts_, lowest, at);
    } else if (most <= 4) {
      detail::insert_largest<4, T>(r, experts_, lowest, at);
    } else if (most <= 8) {
      detail::insert_largest<8, T>(r, experts_, lowest, at);
    } else {
      for (index e = 0; e < experts_; ++e) r[e] = at(e);
      detail::sort_descending(r, experts_);
    }
    return {r};
  }
  template <class T, class F>
  [[gnu::always_inline]] pack<std::int32_t, W> last_equal(const pack<std::int32_t, W>& n,
                                                          const pack<T, W>& x, F f) const {
    const auto none = uniform(std::int32_t{-1});
    const auto some = x > uniform(-std::numeric_limits<T>::infinity());
    auto last = uniform(static_cast<std::int32_t>(experts_ - 1));
    const auto reached = count([&](element e) { return f(e) >= x; });
    const auto cut = some & (reached > n);
    if (any(cut)) {
      auto left = n - count([&](element e) { return f(e) > x; });
      auto taken = none;
      for (index e = 0; e < experts_; ++e) {
        const auto takes = (f(element{e}) == x) & (left > uniform(std::int32_t{0}));
        taken = talpa::select(takes, element{e}.expert(), taken);
        left = minus_one(left, takes);
      }
      last = talpa::select(cut, taken, last);
    }
    return talpa::select(some, last, none);
  }
  template <class F>
  [[gnu::always_inline]] pack<std::int32_t, W> count(F f) const {
    pack<std::int32_t, W> n = uniform(std::int32_t{0});
    for (index e = 0; e < experts_; ++e) n = minus_one(n, f(element{e}));
    return -n;
  }
  struct mask_row {
    const pack<std::int32_t, W>* words;
    [[gnu::always_inline]] pack<bool, W> operator()(element e) const {
      const int place = static_cast<int>(e.slot % mask_word_bits);
      const pack<std::int32_t, W>& word = words[e.slot / mask_word_bits];
      if constexpr (detail::in_register<std::int32_t, W>) {
        return {(word.v & static_cast<std::int32_t>(1u << place)) != 0};
      } else {
        return detail::make_pack<bool, W>([&](int i) { return ((word.v[i] >> place) & 1) != 0; });
      }
    }
  };
  mask_row load_mask(row_pointer<const std::uint32_t> mask) const {
    const index count = mask_words(experts_);
    auto* const words = static_cast<pack<std::int32_t, W>*>(
        scratch_->take(static_cast<std::size_t>(count) * sizeof(pack<std::int32_t, W>)));
    for (index w = 0; w < count; ++w) {
      words[w] = detail::make_pack<std::int32_t, W>([&](int i) {
        return static_cast<std::int32_t>(
            mask.data[(i < valid_ ? i : valid_ - 1) * mask.stride + w]);
      });
    }
    return {words};
  }
  [[gnu::always_inline]] pack<bool, W> load_bit(row_pointer<const std::uint32_t> mask,
                                                element e) const {
    return detail::make_pack<bool, W>([&](int i) {
      const std::uint32_t word =
          mask.data[(i < valid_ ? i : valid_ - 1) * mask.stride + e.slot / mask_word_bits];
      return ((word >> (e.slot % mask_word_bits)) & 1u) != 0;
    });
  }
  template <class F>
  [[gnu::always_inline]] void store_mask(row_pointer<std::uint32_t> mask, F f) const {
    for (index w = 0; w < mask_words(experts_); ++w) {
      pack<std::int32_t, W> word = uniform(std::int32_t{0});
      const index first = w * mask_word_bits;
      const index last = first + mask_word_bits < experts_ ? first + mask_word_bits : experts_;
      for (index e = first; e < last; ++e) {
        const auto bit = uniform(static_cast<std::int32_t>(1u << (e - first)));
        word = word + talpa::select(f(element{e}), bit, uniform(std::int32_t{0}));
      }
      const auto words = detail::values_of(word);
      for (int i = 0; i < valid_; ++i) {
        mask.data[i * mask.stride + w] = static_cast<std::uint32_t>(words.v[i]);
      }
    }
  }

 private:
  static constexpr index most_columns = 16;

  /// n - 1 where the condition holds.
  [[gnu::always_inline]] static pack<std::int32_t, W> minus_one(const pack<std::int32_t, W>& n,
                                                                const pack<bool, W>& condition) {
    if constexpr (detail::in_register<std::int32_t, W>) {
      return {n.v + condition.v};
    } else {
      return detail::make_pack<std::int32_t, W>([&](int i) { return n.v[i] + condition.v[i]; });
    }
  }
  /// The experts of `first` and later that come in blocks of C, C / 2, ..., 4, transposed C tokens
  /// at a time, where C values fill a register or a part of it.
  template <int C, class T>
  [[gnu::always_inline]] index load_blocks(row_pointer<const T> row, T* x, index first) const {
    if constexpr (C < 4) {
      return first;
    } else if constexpr (!detail::in_register<T, C>) {
      return load_blocks<C / 2>(row, x, first);
    } else {
      for (; first + C <= experts_; first += C) {
        for (int part = 0; part < W; part += C) {
          typename detail::pack_storage<T, C>::type r[C];
#pragma GCC unroll 16
          for (int i = 0; i < C; ++i) {
            const int token = part + i < valid_ ? part + i : valid_ - 1;
            __builtin_memcpy(&r[i], row.data + token * row.stride + first, sizeof(r[i]));
          }
          detail::transpose_rows<C>(r);
#pragma GCC unroll 16
          for (int i = 0; i < C; ++i) {
            __builtin_memcpy(x + (first + i) * W + part, &r[i], sizeof(r[i]));
          }
        }
      }
      return load_blocks<C / 2>(row, x, first);
    }
  }
  template <class T>
  [[gnu::always_inline]] void store_columns(row_pointer<T> row, const pack<T, W>* x,
                                            index columns) const {
    const index done = store_blocks<W>(row, reinterpret_cast<const T*>(x), 0, columns);
    for (index j = done; j < columns; ++j) store(row, element{j}, x[j]);
  }
  template <int C, class T>
  [[gnu::always_inline]] index store_blocks(row_pointer<T> row, const T* x, index first,
                                            index columns) const {
    if constexpr (C < 4) {
      return first;
    } else if constexpr (!detail::in_register<T, C>) {
      return store_blocks<C / 2>(row, x, first, columns);
    } else {
      for (; first + C <= columns; first += C) {
        for (int part = 0; part < valid_; part += C) {
          typename detail::pack_storage<T, C>::type r[C];
#pragma GCC unroll 16
          for (int i = 0; i < C; ++i) {
            __builtin_memcpy(&r[i], x + (first + i) * W + part, sizeof(r[i]));
          }
          detail::transpose_rows<C>(r);
#pragma GCC unroll 16
          for (int i = 0; i < C; ++i) {
            if (part + i < valid_) {
              __builtin_memcpy(row.data + (part + i) * row.stride + first, &r[i], sizeof(r[i]));
            }
          }
        }
      }
      return store_blocks<C / 2>(row, x, first, columns);
    }
  }

  index experts_;
  int valid_;
  lane_scratch* scratch_;
};

/// W lock-step lanes that share one row, in plain C++: what a warp tile of width W computes, for
/// tests. Lane l holds the elements l, l + W, l + 2W, ...; the last ones may lie beyond the row.
template <int W>
class sim {
  static_assert(W > 0 && mask_word_bits % W == 0,
                "talpa: a lane group divides the 32 virtual lanes");

 public:
  static constexpr int tokens = 1;
  template <class T>
  using value = pack<T, W>;

  struct element {
    index slot;  ///< position among the lane's elements; lane l stands for expert slot * W + l
    pack<std::int32_t, W> expert() const {
      return detail::make_pack<std::int32_t, W>(
          [&](int l) { return static_cast<std::int32_t>(slot * W + l); });
    }
  };

  sim(index experts, lane_scratch* scratch) : experts_(experts), scratch_(scratch) {}

  index experts() const { return experts_; }
  template <class T>
  static pack<T, W> uniform(T c) {
    return detail::make_pack<T, W>([&](int) { return c; });
  }
  template <class F>
  void for_each(F f) const {
    for (index slot = 0; slot < slots(); ++slot) f(element{slot});
  }
  template <class T>
  detail::element_array<pack<T, W>> elements() const {
    return {static_cast<pack<T, W>*>(
        scratch_->take(static_cast<std::size_t>(slots()) * sizeof(pack<T, W>)))};
  }
  template <class T>
  pack<T, W> load(row_pointer<const T> row, element e, T fill) const {
    return detail::make_pack<T, W>([&](int l) {
      const index expert = e.slot * W + l;
      return expert < experts_ ? row.data[expert] : fill;
    });
  }
  template <class T>
  void store(row_pointer<T> row, element e, const pack<T, W>& v) const {
    for (int l = 0; l < W; ++l) {
      if (e.slot * W + l < experts_) row.data[e.slot * W + l] = v.v[l];
    }
  }
  template <class T>
  detail::element_array<pack<T, W>> load_row(row_pointer<const T> row, T fill) const {
    const auto x = elements<T>();
    for (index slot = 0; slot < slots(); ++slot) x.data[slot] = load(row, element{slot}, fill);
    return x;
  }
  template <class T, class F>
  void store_row(row_pointer<T> row, F f) const {
    for (index slot = 0; slot < slots(); ++slot) store(row, element{slot}, f(element{slot}));
  }
  template <class T>
  static pack<T, W> load(row_scalar<const T> scalar) {
    return uniform(*scalar.data);
  }
  template <class T>
  static void store(row_scalar<T> scalar, const pack<T, W>& v) {
    *scalar.data = v.v[0];
  }
  static bool any(const pack<bool, W>& condition) {
    std::int32_t found = 0;
    for (int l = 0; l < W; ++l) found |= condition.v[l];
    return found != 0;
  }
  template <class T, class F>
  pack<T, W> sum(F f) const {
    constexpr index held = mask_word_bits / W;  // virtual lanes in each lane
    pack<T, W> lanes[held];
    for (index i = 0; i < held; ++i) lanes[i] = uniform(T{});
    for (index slot = 0; slot < slots(); ++slot) {
      pack<T, W>& lane = lanes[slot % held];
      lane = lane + talpa::select(inside(slot), f(element{slot}), uniform(T{}));
    }
    for (index half = held / 2; half > 0; half /= 2) {
      for (index i = 0; i < half; ++i) lanes[i] = lanes[i] + lanes[i + half];
    }
    return butterfly(lanes[0], [](const T& a, const T& b) { return a + b; });
  }
  template <class T, class F>
  pack<T, W> max(F f) const {
    pack<T, W> best = uniform(-std::numeric_limits<T>::infinity());
    for (index slot = 0; slot < slots(); ++slot) {
      const pack<T, W> x = f(element{slot});
      best = talpa::select(inside(slot) & (x > best), x, best);
    }
    return butterfly(best, [](const T& a, const T& b) { return b > a ? b : a; });
  }
  template <class T, class F, class A>
  expert_value<pack<T, W>, pack<std::int32_t, W>> arg_max(F f, A active) const {
    struct key {
      T value;
      std::int32_t index;
    };
    pack<key, W> best = uniform(key{-std::numeric_limits<T>::infinity(), std::int32_t{-1}});
    for (index slot = 0; slot < slots(); ++slot) {
      const element e{slot};
      const pack<T, W> x = f(e);
      const pack<bool, W> on = inside(slot) & active(e);
      for (int l = 0; l < W; ++l) {
        if (on.v[l] && (x.v[l] > best.v[l].value || best.v[l].index < 0)) {
          best.v[l] = {x.v[l], e.expert().v[l]};
        }
      }
    }
    best = butterfly(best, [](const key& a, const key& b) {
      const bool b_wins = b.index >= 0 && (a.index < 0 || b.value > a.value ||
                                           (b.value == a.value && b.index < a.index));
      return b_wins ? b : a;
    });
    return {detail::make_pack<T, W>([&](int l) { return best.v[l].value; }),
            detail::make_pack<std::int32_t, W>([&](int l) { return best.v[l].index; })};
  }
  template <class T>
  struct rank_values {
    const T* data;
    pack<T, W> operator()(index j) const { return uniform(data[j]); }
  };
  template <class T, class F>
  rank_values<T> ranks(index, F f) const {
    const auto r = values_of_row<T>(f);
    detail::sort_descending(r, experts_);
    return {r};
  }
  template <class T, class F>
  pack<std::int32_t, W> last_equal(const pack<std::int32_t, W>& n, const pack<T, W>& x, F f) const {
    return uniform(serial(experts_, scratch_)
                       .last_equal(n.v[0], T{x.v[0]}, [y = values_of_row<T>(f)](serial::element e) {
                         return y[e.slot];
                       }));
  }
  template <class F>
  pack<std::int32_t, W> count(F f) const {
    pack<std::int32_t, W> n = uniform(std::int32_t{0});
    for (index slot = 0; slot < slots(); ++slot) {
      n = n + talpa::select(inside(slot) & f(element{slot}), uniform(std::int32_t{1}),
                            uniform(std::int32_t{0}));
    }
    return butterfly(n, [](std::int32_t a, std::int32_t b) { return a + b; });
  }
  struct mask_row {
    const sim* group;
    row_pointer<const std::uint32_t> mask;
    pack<bool, W> operator()(element e) const { return group->load_bit(mask, e); }
  };
  mask_row load_mask(row_pointer<const std::uint32_t> mask) const { return {this, mask}; }
  pack<bool, W> load_bit(row_pointer<const std::uint32_t> mask, element e) const {
    return detail::make_pack<bool, W>([&](int l) {
      const index expert = e.slot * W + l;
      return expert < experts_ &&
             ((mask.data[expert / mask_word_bits] >> (expert % mask_word_bits)) & 1u) != 0;
    });
  }
  template <class F>
  void store_mask(row_pointer<std::uint32_t> mask, F f) const {
    for (index w = 0; w < mask_words(experts_); ++w) mask.data[w] = 0;
    for (index slot = 0; slot < slots(); ++slot) {
      const pack<bool, W> on = inside(slot) & f(element{slot});
      for (int l = 0; l < W; ++l) {
        const index expert = slot * W + l;
        if (on.v[l]) mask.data[expert / mask_word_bits] |= 1u << (expert % mask_word_bits);
      }
    }
  }

 private:
  index slots() const { return ceil_div(experts_, W); }
  /// f of the experts in order.
  template <class T, class F>
  T* values_of_row(F f) const {
    T* const y = static_cast<T*>(scratch_->take(static_cast<std::size_t>(slots() * W) * sizeof(T)));
    for (index slot = 0; slot < slots(); ++slot) {
      const pack<T, W> x = f(element{slot});
      for (int l = 0; l < W; ++l) y[slot * W + l] = x.v[l];
    }
    return y;
  }
  pack<bool, W> inside(index slot) const {
    return detail::make_pack<bool, W>([&](int l) { return slot * W + l < experts_; });
  }
  /// All lanes end with the combination over all lanes, as exchanges with lane ^ W/2, ..., 1 give.
  template <class Value, class Combine>
  static pack<Value, W> butterfly(pack<Value, W> x, Combine combine) {
    for (int distance = W / 2; distance > 0; distance /= 2) {
      const pack<Value, W> before = x;
      for (int l = 0; l < W; ++l) x.v[l] = combine(before.v[l], before.v[l ^ distance]);
    }
    return x;
  }

  index experts_;
  lane_scratch* scratch_;
};

}  // namespace talpa
