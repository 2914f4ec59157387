// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/lanes.hpp>
#include <talpa/cuda/kernel.hpp>

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

namespace talpa {

namespace detail {

/// Values of one lane for the elements it holds, in registers: only loops that are unrolled index
/// it.
template <class T, int Slots>
struct slot_array {
  T values[Slots];
  template <class Element>
  TALPA_HD T& operator[](Element e) {
    return values[e.slot];
  }
  template <class Element>
  TALPA_HD const T& operator[](Element e) const {
    return values[e.slot];
  }
};

/// The larger and the smaller of two numbers, one instruction each on a device.
template <class T>
TALPA_HD inline T larger_number(T a, T b) {
  return std::fmax(a, b);
}
template <class T>
TALPA_HD inline T smaller_number(T a, T b) {
  return std::fmin(a, b);
}

}  // namespace detail

/// Lane group of W neighbouring lanes of a warp that share one row: the device's form of `sim<W>`.
/// It serves rows of up to W * Slots experts. Of each W * chunk of them lane l holds `chunk`
/// neighbours, from l * chunk on, so that a lane reads and writes several at once and the lanes of
/// a group whole lines of memory. These are the virtual lanes l * chunk + i of the canonical
/// reduction.
///
/// The 32 / W rows of a warp go together: a collective is one instruction of the whole warp, and
/// `any` asks all of its rows, as a token_pack asks all of its tokens. So no row may leave alone:
/// where there is nothing to do for a row, `only(false)` is a group that does the same without
/// reading or writing.
template <int W, int Slots, class Block>
class warp_tile {
  static_assert(W > 0 && W <= 32 && 32 % W == 0,
                "talpa: a lane group divides the 32 virtual lanes");

 public:
  static constexpr int tokens = 1;
  template <class T>
  using value = T;

  /// Neighbours in a lane: as many as there are virtual lanes to a lane, if it holds so many.
  static constexpr int chunk = Slots < mask_word_bits / W ? Slots : mask_word_bits / W;
  static_assert(Slots % chunk == 0, "talpa: a lane holds whole chunks");

  struct element {
    int slot;
    int lane;
    TALPA_HD std::int32_t expert() const {
      return static_cast<std::int32_t>(slot / chunk * (W * chunk) + lane * chunk + slot % chunk);
    }
  };

  TALPA_HD warp_tile(Block& block, index experts)
      : block_(block),
        experts_(static_cast<int>(experts)),
        limit_(static_cast<int>(experts)),
        lane_(block.thread() % W),
        first_(block.thread() % 32 / W * W) {}

  /// This group where the condition holds, else one that reads and writes nothing.
  TALPA_HD warp_tile only(bool condition) const {
    warp_tile group(block_, experts_);
    group.limit_ = condition ? limit_ : 0;
    return group;
  }
  /// Whether it reads and writes.
  TALPA_HD bool works() const { return limit_ > 0; }

  TALPA_HD index experts() const { return experts_; }
  template <class T>
  TALPA_HD static T uniform(T c) {
    return c;
  }
  template <class F>
  TALPA_HD void for_each(F f) const {
    TALPA_UNROLL
    for (int s = 0; s < Slots; ++s) f(at(s));
  }
  template <class T>
  TALPA_HD static detail::slot_array<T, Slots> elements() {
    return {};
  }
  template <class T>
  TALPA_HD T load(row_pointer<const T> row, element e, T fill) const {
    return inside(e) ? row.data[e.expert()] : fill;
  }
  template <class T>
  TALPA_HD void store(row_pointer<T> row, element e, T v) const {
    if (inside(e)) row.data[e.expert()] = v;
  }
  template <class T>
  TALPA_HD detail::slot_array<T, Slots> load_row(row_pointer<const T> row, T fill) const {
    detail::slot_array<T, Slots> x;
    if (takes_vectors(row.data)) {
      TALPA_UNROLL
      for (int s = 0; s < Slots; s += vector_size<T>) {
        vector<T> v;
        TALPA_UNROLL
        for (int i = 0; i < vector_size<T>; ++i) v.values[i] = fill;
        if (inside(at(s))) v = *reinterpret_cast<const vector<T>*>(row.data + at(s).expert());
        TALPA_UNROLL
        for (int i = 0; i < vector_size<T>; ++i) x.values[s + i] = v.values[i];
      }
    } else {
      TALPA_UNROLL
      for (int s = 0; s < Slots; ++s) x.values[s] = load(row, at(s), fill);
    }
    return x;
  }
  template <class T, class F>
  TALPA_HD void store_row(row_pointer<T> row, F f) const {
    if (takes_vectors(row.data)) {
      TALPA_UNROLL
      for (int s = 0; s < Slots; s += vector_size<T>) {
        vector<T> v;
        TALPA_UNROLL
        for (int i = 0; i < vector_size<T>; ++i) v.values[i] = f(at(s + i));
        if (inside(at(s))) *reinterpret_cast<vector<T>*>(row.data + at(s).expert()) = v;
      }
    } else {
      TALPA_UNROLL
      for (int s = 0; s < Slots; ++s) store(row, at(s), f(at(s)));
    }
  }
  template <class T>
  TALPA_HD T load(row_scalar<const T> scalar) const {
    return works() ? *scalar.data : T{};
  }
  template <class T>
  TALPA_HD void store(row_scalar<T> scalar, T v) const {
    if (lane_ == 0 && works()) *scalar.data = v;
  }
  TALPA_HD bool any(bool condition) const { return block_.ballot(condition, whole_warp) != 0; }
  template <class T, class F>
  TALPA_HD T sum(F f) const {
    T lanes[chunk];  // virtual lanes
    TALPA_UNROLL
    for (int i = 0; i < chunk; ++i) lanes[i] = T{0};
    TALPA_UNROLL
    for (int s = 0; s < Slots; ++s) {
      lanes[s % chunk] = lanes[s % chunk] + (inside(at(s)) ? f(at(s)) : T{0});
    }
    // The upper half of the virtual lanes onto the lower, first those of other lanes.
    TALPA_UNROLL
    for (int distance = W / 2; distance > 0; distance /= 2) {
      TALPA_UNROLL
      for (int i = 0; i < chunk; ++i) {
        lanes[i] = lanes[i] + block_.shuffle_xor(lanes[i], distance, whole_warp);
      }
    }
    TALPA_UNROLL
    for (int half = chunk / 2; half > 0; half /= 2) {
      TALPA_UNROLL
      for (int i = 0; i < half; ++i) lanes[i] = lanes[i] + lanes[i + half];
    }
    return lanes[0];
  }
  template <class T, class F>
  TALPA_HD T max(F f) const {
    T best = -std::numeric_limits<T>::infinity();
    TALPA_UNROLL
    for (int s = 0; s < Slots; ++s) {
      const T x = f(at(s));
      best = inside(at(s)) && x > best ? x : best;
    }
    return butterfly(best, [](T a, T b) { return b > a ? b : a; });
  }
  template <class T, class F, class A>
  TALPA_HD expert_value<T, std::int32_t> arg_max(F f, A active) const {
    T best = -std::numeric_limits<T>::infinity();
    std::int32_t expert = -1;
    TALPA_UNROLL
    for (int s = 0; s < Slots; ++s) {
      const T x = f(at(s));
      const bool wins = inside(at(s)) && active(at(s)) && (x > best || expert < 0);
      best = wins ? x : best;
      expert = wins ? at(s).expert() : expert;
    }
    TALPA_UNROLL
    for (int distance = W / 2; distance > 0; distance /= 2) {
      const T other = block_.shuffle_xor(best, distance, whole_warp);
      const std::int32_t other_expert = block_.shuffle_xor(expert, distance, whole_warp);
      const bool wins = other_expert >= 0 &&
                        (expert < 0 || other > best || (other == best && other_expert < expert));
      best = wins ? other : best;
      expert = wins ? other_expert : expert;
    }
    return {best, expert};
  }
  /// The ranks of a row, each found when it is first asked for: r(j), r(j + 1), ... cost one
  /// reduction each, going back starts again.
  template <class T>
  class rank_values {
   public:
    TALPA_HD rank_values(const warp_tile& group, const detail::slot_array<T, Slots>& sorted)
        : group_(group), sorted_(sorted), left_(sorted) {
      advance();
      first_ = current_;
    }
    TALPA_HD T operator()(index j) const {
      if (j == 0) return first_;
      if (j < position_) {
        left_ = sorted_;
        position_ = -1;
      }
      while (position_ < j) advance();
      return current_;
    }

   private:
    /// Takes the largest of what is left: one lane that has it at its head gives it away.
    TALPA_HD void advance() const {
      current_ =
          group_.butterfly(left_.values[0], [](T a, T b) { return detail::larger_number(a, b); });
      const std::uint32_t holders = group_.ballot(left_.values[0] == current_);
      const bool gives = (holders & (~holders + 1u)) == 1u << group_.lane_;
      TALPA_UNROLL
      for (int s = 0; s < Slots; ++s) {
        const T next = s + 1 < Slots ? left_.values[s + 1 < Slots ? s + 1 : s]
                                     : -std::numeric_limits<T>::infinity();
        left_.values[s] = gives ? next : left_.values[s];
      }
      ++position_;
    }

    const warp_tile& group_;
    detail::slot_array<T, Slots> sorted_;
    mutable detail::slot_array<T, Slots> left_;
    mutable T current_{};
    T first_{};
    mutable index position_ = -1;
  };
  template <class T, class F>
  TALPA_HD rank_values<T> ranks(index, F f) const {
    detail::slot_array<T, Slots> x;
    TALPA_UNROLL
    for (int s = 0; s < Slots; ++s) {
      x.values[s] = inside(at(s)) ? f(at(s)) : -std::numeric_limits<T>::infinity();
    }
    sort(x);
    return rank_values<T>(*this, x);
  }
  template <class T, class F>
  TALPA_HD std::int32_t last_equal(std::int32_t n, T x, F f) const {
    const bool some = x > -std::numeric_limits<T>::infinity();
    // Both numbers at once: how many are above x, 65536 times how many equal it.
    std::int32_t counts = 0;
    TALPA_UNROLL
    for (int s = 0; s < Slots; ++s) {
      const T y = f(at(s));
      const bool in = inside(at(s));
      counts += (in && y > x ? 1 : 0) + (in && y == x ? 65536 : 0);
    }
    counts = butterfly(counts, [](std::int32_t a, std::int32_t b) { return a + b; });
    const std::int32_t left = n - counts % 65536;
    const bool cut = some && counts / 65536 > left;
    std::int32_t last = some ? static_cast<std::int32_t>(experts_ - 1) : -1;
    if (!any(cut)) return last;
    std::int32_t before = 0, taken = -1;
    TALPA_UNROLL
    for (int first = 0; first < Slots; first += chunk) {
      // Experts in front of this lane's in the chunks of the group, then its own in order.
      std::int32_t mine = before;
      std::uint32_t equal[chunk];
      TALPA_UNROLL
      for (int i = 0; i < chunk; ++i) {
        const element e = at(first + i);
        equal[i] = ballot(inside(e) && f(e) == x);
        mine += std::popcount(equal[i] & ((1u << lane_) - 1u));
        before += std::popcount(equal[i]);
      }
      TALPA_UNROLL
      for (int i = 0; i < chunk; ++i) {
        const bool own = (equal[i] >> lane_ & 1u) != 0;
        mine += own ? 1 : 0;
        const std::uint32_t ends = ballot(own && mine == left);
        if (ends != 0) {
          taken = static_cast<std::int32_t>(element{first + i, detail::lowest_bit(ends)}.expert());
        }
      }
    }
    return cut ? taken : last;
  }
  template <class F>
  TALPA_HD std::int32_t count(F f) const {
    std::int32_t n = 0;
    TALPA_UNROLL
    for (int s = 0; s < Slots; ++s) n += inside(at(s)) && f(at(s)) ? 1 : 0;
    return butterfly(n, [](std::int32_t a, std::int32_t b) { return a + b; });
  }
  struct mask_row {
    std::uint32_t bits;  // bit s: this lane's element s
    TALPA_HD bool operator()(element e) const { return (bits >> e.slot & 1u) != 0; }
  };
  TALPA_HD mask_row load_mask(row_pointer<const std::uint32_t> mask) const {
    static_assert(Slots <= 32);
    if (stores_ && mask.data == stored_mask_) return {stored_bits_};
    mask_row row{0};
    TALPA_UNROLL
    for (int first = 0; first < Slots; first += chunk) {
      const int w = first / chunk;
      const std::uint32_t word = w < mask_words(limit_) ? mask.data[w] >> (lane_ * chunk) : 0u;
      TALPA_UNROLL
      for (int i = 0; i < chunk; ++i) {
        row.bits |= inside(at(first + i)) ? (word >> i & 1u) << (first + i) : 0u;
      }
    }
    return row;
  }
  TALPA_HD bool load_bit(row_pointer<const std::uint32_t> mask, element e) const {
    const std::int32_t expert = e.expert();
    return inside(e) && ((mask.data[expert / 32] >> (expert % 32)) & 1u) != 0;
  }
  template <class F>
  TALPA_HD void store_mask(row_pointer<std::uint32_t> mask, F f) const {
    std::uint32_t bits = 0;
    TALPA_UNROLL
    for (int first = 0; first < Slots; first += chunk) {
      std::uint32_t own = 0;
      TALPA_UNROLL
      for (int i = 0; i < chunk; ++i) {
        own |= inside(at(first + i)) && f(at(first + i)) ? 1u << i : 0u;
      }
      bits |= own << first;
      const std::uint32_t word =
          butterfly(own << (lane_ * chunk), [](std::uint32_t a, std::uint32_t b) { return a | b; });
      const int w = first / chunk;
      if (lane_ == w % W && w < mask_words(limit_)) mask.data[w] = word;
    }
    stores_ = true;
    stored_mask_ = mask.data;
    stored_bits_ = bits;
    block_.sync_lanes(whole_warp);  // what reads single bits again
  }

 private:
  TALPA_HD element at(int slot) const { return {slot, lane_}; }
  TALPA_HD bool inside(element e) const { return e.expert() < limit_; }
  /// Bit l: the condition of lane l of this group.
  TALPA_HD std::uint32_t ballot(bool condition) const {
    const std::uint32_t bits = block_.ballot(condition, whole_warp);
    return W == 32 ? bits : (bits >> first_) & ((1u << (W % 32)) - 1u);
  }
  template <class T, class Combine>
  TALPA_HD T butterfly(T x, Combine combine) const {
    TALPA_UNROLL
    for (int distance = W / 2; distance > 0; distance /= 2) {
      x = combine(x, block_.shuffle_xor(x, distance, whole_warp));
    }
    return x;
  }
  /// Largest first, by Batcher's odd-even merge sort, whose exchanges are known here.
  template <class T>
  TALPA_HD static void sort(detail::slot_array<T, Slots>& x) {
    TALPA_UNROLL
    for (int p = 1; p < Slots; p *= 2) {
      TALPA_UNROLL
      for (int d = p; d > 0; d /= 2) {
        TALPA_UNROLL
        for (int i = 0; i < Slots; ++i) {
          if (i >= d % p && (i - d % p) % (2 * d) < d && i + d < Slots &&
              i / (2 * p) == (i + d) / (2 * p)) {
            T& first = x.values[i];
            T& second = x.values[i + d < Slots ? i + d : i];
            const T a = first, b = second;
            first = detail::larger_number(a, b);
            second = detail::smaller_number(a, b);
          }
        }
      }
    }
  }

  static constexpr std::uint32_t whole_warp = 0xffffffffu;

  /// Neighbours that one access of up to 16 bytes moves.
  template <class T>
  static constexpr int vector_size = chunk* static_cast<int>(sizeof(T)) <= 16
                                         ? chunk
                                         : 16 / static_cast<int>(sizeof(T));
  template <class T>
  struct alignas(vector_size<T> * sizeof(T)) vector {
    T values[vector_size<T>];
  };
  /// Whether a row begins where vectors may, and holds whole ones.
  template <class T>
  TALPA_HD bool takes_vectors(const T* row) const {
    return experts_ % vector_size<T> == 0 &&
           reinterpret_cast<std::uintptr_t>(row) % sizeof(vector<T>) == 0;
  }

  Block& block_;
  int experts_;
  int limit_;  // experts that it reads and writes: all or none
  int lane_;
  int first_;  // lane of the warp that is this group's first
  // The mask that was stored last, for those who read it at once.
  mutable bool stores_ = false;
  mutable const std::uint32_t* stored_mask_ = nullptr;
  mutable std::uint32_t stored_bits_ = 0;
};

}  // namespace talpa
