// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/config.hpp>
#include <talpa/core/index.hpp>
#include <talpa/core/math.hpp>

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
//   g.load(scalar), g.store(scalar, v)   a number that the row has once
//   g.sum<T>(f)                canonical sum of f(e), the same bits for every group
//   g.max<T>(f)                largest f(e); NaN is skipped; -inf for an empty row
//   g.arg_max<T>(f, active)    largest f(e) among active(e), ties to the lower index; -1 if none
//   g.count(f)                 number of elements where f(e) holds
//   g.any(c)                   a plain bool: whether c holds for any of the rows at hand
//   g.load_bit(mask, e)        one bit of the row of a routing mask
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

/// W values side by side: of W tokens (token_pack) or of W lanes (sim). A plain array, so its size
/// and alignment depend on no compiler flag.
template <class T, int W>
struct pack {
  T v[W];
};

/// W conditions, 0 or 1 in the width of a float, so that comparing, combining and choosing stay in
/// vector registers.
template <int W>
struct pack<bool, W> {
  std::int32_t v[W];
};

namespace detail {
template <class T, int W, class F>
[[gnu::always_inline]] inline pack<T, W> make_pack(F f) {
  pack<T, W> r;
  // Kept a loop, which compilers turn into vector code; unrolled early, gcc leaves it scalar.
#pragma GCC unroll 1
  for (int i = 0; i < W; ++i) r.v[i] = f(i);
  return r;
}
}  // namespace detail

// Element-wise arithmetic. There is no operator*: see math::mul.
template <class T, int W>
[[gnu::always_inline]] inline pack<T, W> operator+(const pack<T, W>& a, const pack<T, W>& b) {
  return detail::make_pack<T, W>([&](int i) { return a.v[i] + b.v[i]; });
}
template <class T, int W>
[[gnu::always_inline]] inline pack<T, W> operator-(const pack<T, W>& a, const pack<T, W>& b) {
  return detail::make_pack<T, W>([&](int i) { return a.v[i] - b.v[i]; });
}
template <class T, int W>
[[gnu::always_inline]] inline pack<T, W> operator-(const pack<T, W>& a) {
  return detail::make_pack<T, W>([&](int i) { return -a.v[i]; });
}
template <class T, int W>
[[gnu::always_inline]] inline pack<T, W> operator/(const pack<T, W>& a, const pack<T, W>& b) {
  return detail::make_pack<T, W>([&](int i) { return a.v[i] / b.v[i]; });
}
template <class T, int W>
[[gnu::always_inline]] inline pack<bool, W> operator<(const pack<T, W>& a, const pack<T, W>& b) {
  return detail::make_pack<bool, W>([&](int i) { return a.v[i] < b.v[i]; });
}
template <class T, int W>
[[gnu::always_inline]] inline pack<bool, W> operator>(const pack<T, W>& a, const pack<T, W>& b) {
  return b < a;
}
template <class T, int W>
[[gnu::always_inline]] inline pack<bool, W> operator<=(const pack<T, W>& a, const pack<T, W>& b) {
  return detail::make_pack<bool, W>([&](int i) { return a.v[i] <= b.v[i]; });
}
template <class T, int W>
[[gnu::always_inline]] inline pack<bool, W> operator>=(const pack<T, W>& a, const pack<T, W>& b) {
  return b <= a;
}
template <class T, int W>
[[gnu::always_inline]] inline pack<bool, W> operator==(const pack<T, W>& a, const pack<T, W>& b) {
  return detail::make_pack<bool, W>([&](int i) { return a.v[i] == b.v[i]; });
}
template <int W>
[[gnu::always_inline]] inline pack<bool, W> operator&(const pack<bool, W>& a,
                                                      const pack<bool, W>& b) {
  return detail::make_pack<bool, W>([&](int i) { return a.v[i] & b.v[i]; });
}
template <int W>
[[gnu::always_inline]] inline pack<bool, W> operator|(const pack<bool, W>& a,
                                                      const pack<bool, W>& b) {
  return detail::make_pack<bool, W>([&](int i) { return a.v[i] | b.v[i]; });
}
template <int W>
[[gnu::always_inline]] inline pack<bool, W> operator!(const pack<bool, W>& a) {
  return detail::make_pack<bool, W>([&](int i) { return 1 - a.v[i]; });
}

/// condition ? a : b, without a branch.
template <class T>
TALPA_HD inline T select(bool condition, T a, T b) {
  return condition ? a : b;
}
template <class T, int W>
[[gnu::always_inline]] inline pack<T, W> select(const pack<bool, W>& condition, const pack<T, W>& a,
                                                const pack<T, W>& b) {
  return detail::make_pack<T, W>([&](int i) { return condition.v[i] != 0 ? a.v[i] : b.v[i]; });
}

namespace math {
template <class T, int W>
[[gnu::always_inline]] inline pack<T, W> fma(const pack<T, W>& a, const pack<T, W>& b,
                                             const pack<T, W>& c) {
  return talpa::detail::make_pack<T, W>([&](int i) { return math::fma(a.v[i], b.v[i], c.v[i]); });
}
template <class T, int W>
[[gnu::always_inline]] inline pack<T, W> mul(const pack<T, W>& a, const pack<T, W>& b) {
  return talpa::detail::make_pack<T, W>([&](int i) { return math::mul(a.v[i], b.v[i]); });
}
template <class T, int W>
[[gnu::always_inline]] inline pack<T, W> exp(const pack<T, W>& a) {
  return talpa::detail::make_pack<T, W>([&](int i) { return math::exp(a.v[i]); });
}
template <class T, int W>
[[gnu::always_inline]] inline pack<T, W> log(const pack<T, W>& a) {
  return talpa::detail::make_pack<T, W>([&](int i) { return math::log(a.v[i]); });
}
template <class T, int W>
[[gnu::always_inline]] inline pack<T, W> expm1(const pack<T, W>& a) {
  return talpa::detail::make_pack<T, W>([&](int i) { return math::expm1(a.v[i]); });
}
template <class T, int W>
[[gnu::always_inline]] inline pack<T, W> log1p(const pack<T, W>& a) {
  return talpa::detail::make_pack<T, W>([&](int i) { return math::log1p(a.v[i]); });
}
template <class T, int W>
[[gnu::always_inline]] inline pack<T, W> sigmoid(const pack<T, W>& a) {
  return talpa::detail::make_pack<T, W>([&](int i) { return math::sigmoid(a.v[i]); });
}
template <class T, int W>
[[gnu::always_inline]] inline pack<T, W> sigmoid_derivative(const pack<T, W>& a) {
  return talpa::detail::make_pack<T, W>([&](int i) { return math::sigmoid_derivative(a.v[i]); });
}
template <class T, int W>
[[gnu::always_inline]] inline pack<T, W> softplus(const pack<T, W>& a) {
  return talpa::detail::make_pack<T, W>([&](int i) { return math::softplus(a.v[i]); });
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
  lane_scratch(std::byte* data, std::size_t bytes) : data_(data), bytes_(bytes) {}
  void reset() { used_ = 0; }
  void* take(std::size_t bytes) {
    void* const start = data_ + used_;
    used_ += (bytes + 63) / 64 * 64;
    return used_ <= bytes_ ? start : nullptr;
  }
  /// Arrays that one row functor may ask for.
  static constexpr index max_arrays = 10;
  /// Bytes for `max_arrays` arrays of `lanes` values of up to 8 bytes for every expert.
  static constexpr std::size_t bytes_for(index experts, index lanes) {
    return static_cast<std::size_t>(max_arrays) *
           (static_cast<std::size_t>(experts + mask_word_bits) * static_cast<std::size_t>(lanes) *
                8 +
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
  template <class F>
  [[gnu::always_inline]] std::int32_t count(F f) const {
    std::int32_t n = 0;
    for (index e = 0; e < experts_; ++e) n += f(element{e}) ? 1 : 0;
    return n;
  }
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
  index experts_;
  lane_scratch* scratch_;
};

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
    for (index i = 0; i < mask_word_bits; ++i) lanes[i] = uniform(T{});
    for (index e = 0; e < experts_; ++e) {
      pack<T, W>& lane = lanes[e % mask_word_bits];
      lane = lane + f(element{e});
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
  template <class F>
  [[gnu::always_inline]] pack<std::int32_t, W> count(F f) const {
    pack<std::int32_t, W> n = uniform(std::int32_t{0});
    for (index e = 0; e < experts_; ++e) {
      n = n + talpa::select(f(element{e}), uniform(std::int32_t{1}), uniform(std::int32_t{0}));
    }
    return n;
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
      pack<std::uint32_t, W> word = uniform(std::uint32_t{0});
      const index first = w * mask_word_bits;
      const index last = first + mask_word_bits < experts_ ? first + mask_word_bits : experts_;
      for (index e = first; e < last; ++e) {
        const pack<bool, W> on = f(element{e});
        for (int i = 0; i < W; ++i) {
          word.v[i] |= static_cast<std::uint32_t>(on.v[i]) << (e - first);
        }
      }
      for (int i = 0; i < valid_; ++i) mask.data[i * mask.stride + w] = word.v[i];
    }
  }

 private:
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
  template <class F>
  pack<std::int32_t, W> count(F f) const {
    pack<std::int32_t, W> n = uniform(std::int32_t{0});
    for (index slot = 0; slot < slots(); ++slot) {
      n = n + talpa::select(inside(slot) & f(element{slot}), uniform(std::int32_t{1}),
                            uniform(std::int32_t{0}));
    }
    return butterfly(n, [](std::int32_t a, std::int32_t b) { return a + b; });
  }
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
