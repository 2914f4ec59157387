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

/// A number of which the larger and the smaller of two take one instruction each on a device.
template <class T>
struct ranked_number {
  T value;
};
template <class T>
[[gnu::always_inline]] TALPA_HD inline ranked_number<T> larger(const ranked_number<T>& a,
                                                               const ranked_number<T>& b) {
  return {std::fmax(a.value, b.value)};
}
template <class T>
[[gnu::always_inline]] TALPA_HD inline ranked_number<T> smaller(const ranked_number<T>& a,
                                                                const ranked_number<T>& b) {
  return {std::fmin(a.value, b.value)};
}

/// Several numbers over one b by multiply-adds, with the bits of the division: with y = 1 / b
/// rounded and q off by less than one unit in its last place, q + (a - q b) y rounds to the number
/// that a / b rounds to (Markstein 1990). Such a q is a (y + rest) rounded once, where rest is what
/// 1 / b has beyond y: 1 - b y, which is a number, times y.
template <class T>
struct exact_quotient {
  T b, y, rest;

  TALPA_HD explicit exact_quotient(T divisor)
      : b(divisor), y(T{1} / divisor), rest(math::fma(-b, y, T{1}) * y) {}
  /// With b in 2^-10 .. 2^10 and a in least .. 2^60, or a = 0, all that the steps compute is 0 or
  /// normal: the last place of a remainder is 2^-47 (2^-105) times a. NaN gives NaN.
  static constexpr T least = std::is_same_v<T, float> ? T(0x1p-66) : T(0x1p-906);
  TALPA_HD static constexpr std::uint32_t pattern(float x) {
    return __builtin_bit_cast(std::uint32_t, x);
  }
  TALPA_HD static constexpr std::uint64_t pattern(double x) {
    return __builtin_bit_cast(std::uint64_t, x);
  }
  TALPA_HD bool covers() const { return b >= T(0x1p-10) && b <= T(0x1p10); }
  TALPA_HD static bool covers(const T* a, int n) {
    // Patterns are ordered as numbers >= 0 are, and that of 0 less one is the largest.
    constexpr auto one = decltype(pattern(T{})){1};
    auto lowest = pattern(a[0]) - one;
    TALPA_UNROLL
    for (int i = 1; i < n; ++i) {
      const auto other = pattern(a[i]) - one;
      lowest = other < lowest ? other : lowest;
    }
    return lowest >= pattern(least) - one;
  }
  TALPA_HD static bool covers(T a) { return covers(&a, 1); }

  TALPA_HD T operator()(T a) const {
    const T near = math::fma(a, y, a * rest);
    return math::fma(math::fma(-near, b, a), y, near);
  }
};

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
///
/// Whole: rows have W * Slots experts, so that each element that a lane holds is one.
template <int W, int Slots, class Block, bool Whole = false>
class warp_tile {
  static_assert(W > 1 && W <= 32 && 32 % W == 0,
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
        lane_(static_cast<int>(static_cast<unsigned>(block.thread()) % W)),
        first_(static_cast<int>(static_cast<unsigned>(block.thread()) % 32 / W * W)),
        left_(limit_ - lane_ * chunk) {}

  /// This group where the condition holds, else one that reads and writes nothing.
  TALPA_HD warp_tile only(bool condition) const {
    warp_tile group(block_, experts_);
    group.limit_ = condition ? limit_ : 0;
    group.left_ = group.limit_ - lane_ * chunk;
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
    return inside(e) ? own(row)[place(e.slot)] : fill;
  }
  template <class T>
  TALPA_HD void store(row_pointer<T> row, element e, T v) const {
    if (inside(e)) own(row)[place(e.slot)] = v;
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
        if (inside(at(s))) v = *reinterpret_cast<const vector<T>*>(own(row) + place(s));
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
        if (inside(at(s))) *reinterpret_cast<vector<T>*>(own(row) + place(s)) = v;
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
  TALPA_HD bool any(bool condition) const {
    return block_.ballot(condition & works(), whole_warp) != 0;
  }
  template <class T, class F>
  TALPA_HD T sum(F f) const {
    T lanes[chunk];  // virtual lanes
    TALPA_UNROLL
    for (int i = 0; i < chunk; ++i) lanes[i] = T{0};
    TALPA_UNROLL
    for (int s = 0; s < Slots; ++s) {
      // Partial sums differ from -0, so that nothing and +0 are the same.
      const T x = f(at(s));
      if (holds(s)) lanes[s % chunk] = lanes[s % chunk] + x;
    }
    return total(lanes);
  }
  template <class T, class Map, class F, class Use>
  TALPA_HD T sum_of(Map map, F f, Use use) const {
    return sum<T>([&](element e) { return use(e, map(f(e))); });
  }
  template <class T, class F>
  TALPA_HD T max(F f) const {
    T best = -std::numeric_limits<T>::infinity();
    TALPA_UNROLL
    for (int s = 0; s < Slots; ++s) {
      const T x = f(at(s));
      best = holds(s) && x > best ? x : best;
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
      const bool wins = holds(s) && active(at(s)) && (x > best || expert < 0);
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
  /// What a lane ranks.
  template <class T>
  struct numbers {
    detail::ranked_number<T> values[Slots];
  };
  /// The ranks of a row, each found when it is first asked for: r(j), r(j + 1), ... cost one
  /// reduction each, going back starts again.
  template <class T>
  class rank_values {
   public:
    TALPA_HD rank_values(const warp_tile& group, const numbers<T>& sorted)
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
      const T head = left_.values[0].value;
      current_ = group_.butterfly(head, [](T a, T b) { return std::fmax(a, b); });
      const std::uint32_t holders = group_.ballot(head == current_);
      const bool gives = (holders & (~holders + 1u)) == 1u << group_.lane_;
      TALPA_UNROLL
      for (int s = 0; s < Slots; ++s) {
        const T next = s + 1 < Slots ? left_.values[s + 1 < Slots ? s + 1 : s].value
                                     : -std::numeric_limits<T>::infinity();
        left_.values[s].value = gives ? next : left_.values[s].value;
      }
      ++position_;
    }

    const warp_tile& group_;
    numbers<T> sorted_;
    mutable numbers<T> left_;
    mutable T current_{};
    T first_{};
    mutable index position_ = -1;
  };
  template <class T, class F>
  TALPA_HD rank_values<T> ranks(index, F f) const {
    numbers<T> x = numbers_of<T>(f);
    sort_run<Slots>(x.values);
    return rank_values<T>(*this, x);
  }
  template <class T, class F>
  TALPA_HD top_values<T> top(index k, F f) const {
    numbers<T> x = numbers_of<T>(f);
    constexpr int fewest = Slots < 2 ? Slots : 2;
    if (k <= fewest) return top_few<fewest>(static_cast<int>(k), x);
    if constexpr (Slots >= 4) {
      constexpr int few = 8 < Slots ? 8 : Slots;
      if (k <= few) return top_few<few>(static_cast<int>(k), x);
    }
    sort_run<Slots>(x.values);
    const rank_values<T> r(*this, x);
    return {r(0), r(k - 1)};
  }
  /// All ranks of the row are put in order, lane after lane; a lane adds up its own when the sum of
  /// those before is known, and none goes on when these are beyond in all rows.
  template <class T, class Part, class Within, class F>
  TALPA_HD leading<T, std::int32_t> leading_ranks(const rank_limit& limit, Part part, T b,
                                                  Within within, bool asked, F f) const {
    numbers<T> x = numbers_of<T>(f);
    sort_run<Slots>(x.values);
    sort_lanes(x.values);
    detail::slot_array<T, Slots> parts;
    TALPA_UNROLL
    for (int s = 0; s < Slots; ++s) parts.values[s] = part(x.values[s].value);
    const detail::slot_array<T, Slots> q = quotients(parts, b);

    T start = T{0}, own_start = std::numeric_limits<T>::infinity();
    bool open = asked;
    for (int lane = 0; lane < W && any(open); ++lane) {
      own_start = lane == lane_ && open ? start : own_start;
      T end = start;
      TALPA_UNROLL
      for (int s = 0; s < Slots; ++s) end = end + q.values[s];
      start = block_.shuffle(end, first_ + lane, whole_warp);
      open = open && within(start);
    }
    // Ranks that there are, and 2^16 for each whose sum is within.
    std::int32_t counts = 0;
    T sum = own_start;
    const bool reached = own_start < std::numeric_limits<T>::infinity();
    TALPA_UNROLL
    for (int s = 0; s < Slots; ++s) {
      sum = sum + q.values[s];
      const bool found = x.values[s].value > -std::numeric_limits<T>::infinity();
      counts += found ? ((reached & within(sum)) ? 0x10001 : 1) : 0;
    }
    counts = butterfly(counts, [](std::int32_t m, std::int32_t n) { return m + n; });
    const std::int32_t all = counts & 0xffff, inside_bound = counts >> 16;
    const std::int32_t due = asked ? inside_bound + (limit.one_more ? 1 : 0) : 0;
    const std::int32_t least =
        limit.least < experts_ ? static_cast<std::int32_t>(limit.least) : experts_;
    const std::int32_t wanted = due < least ? least : due;
    const std::int32_t n = wanted < all ? wanted : all;
    const int place = n > 0 ? (n - 1) % Slots : 0, holder = n > 0 ? (n - 1) / Slots : 0;
    T last = x.values[0].value;
    TALPA_UNROLL
    for (int s = 1; s < Slots; ++s) last = s == place ? x.values[s].value : last;
    last = block_.shuffle(last, first_ + holder, whole_warp);
    return {n > 0 ? last : std::numeric_limits<T>::infinity(), n};
  }
  template <class T, class F>
  TALPA_HD std::int32_t last_equal(std::int32_t n, T x, F f) const {
    const bool some = x > -std::numeric_limits<T>::infinity();
    const bool cut = count([&](element e) { return f(e) >= x; }) > n && some;
    const std::int32_t last = some ? static_cast<std::int32_t>(experts_ - 1) : -1;
    if (!any(cut)) return last;
    const std::int32_t left = n - count([&](element e) { return f(e) > x; });
    std::int32_t before = 0, taken = -1;
    TALPA_UNROLL
    for (int first = 0; first < Slots; first += chunk) {
      // Experts in front of this lane's in the chunks of the group, then its own in order.
      std::int32_t mine = before;
      std::uint32_t equal[chunk];
      TALPA_UNROLL
      for (int i = 0; i < chunk; ++i) {
        const element e = at(first + i);
        equal[i] = ballot(holds(first + i) && f(e) == x);
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
  template <class T>
  TALPA_HD detail::slot_array<T, Slots> quotients(const detail::slot_array<T, Slots>& x,
                                                  T b) const {
    const detail::exact_quotient<T> over(b);
    if (!any(!over.covers() || !over.covers(x.values, Slots))) return quotients_by(over, x);
    detail::slot_array<T, Slots> q;
    TALPA_UNROLL
    for (int s = 0; s < Slots; ++s) q.values[s] = x.values[s] / b;
    return q;
  }
  /// `quotients` asks whether `exact_quotient` covers its numbers; this is the same for numbers
  /// that it does cover.
  static constexpr bool has_covered_quotients = true;
  template <class T>
  TALPA_HD static detail::slot_array<T, Slots> covered_quotients(
      const detail::slot_array<T, Slots>& x, T b) {
    return quotients_by(detail::exact_quotient<T>(b), x);
  }
  template <class F>
  TALPA_HD std::int32_t count(F f) const {
    std::int32_t n = 0;
    TALPA_UNROLL
    for (int s = 0; s < Slots; ++s) {
      const bool counts = f(at(s));
      n += (holds(s) & counts) ? 1 : 0;
    }
    return butterfly(n, [](std::int32_t a, std::int32_t b) { return a + b; });
  }
  template <class F>
  TALPA_HD bool some(F f) const {
    // In pairs: one comparison finds a NaN among two numbers.
    bool found = false;
    TALPA_UNROLL
    for (int s = 0; s < Slots; s += 2) {
      const int other = s + 1 < Slots ? s + 1 : s;
      const bool counts = f(at(s)), counts_too = f(at(other));
      const bool first = holds(s) & counts, second = holds(other) & counts_too;
      found |= first | second;
    }
    return ballot(found) != 0;
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
      const std::uint32_t word = w * (W * chunk) < limit_ ? mask.data[w] >> (lane_ * chunk) : 0u;
      row.bits |= (chunk == 32 ? word : word & ((1u << chunk % 32) - 1u)) << first;
    }
    row.bits &= held_bits();
    return row;
  }
  TALPA_HD bool load_bit(row_pointer<const std::uint32_t> mask, element e) const {
    const std::int32_t expert = e.expert();
    return inside(e) && ((mask.data[expert / 32] >> (expert % 32)) & 1u) != 0;
  }
  template <class F>
  TALPA_HD void store_mask(row_pointer<std::uint32_t> mask, F f) const {
    store_bits(mask, bits_of(f));
  }
  template <class T, class F>
  TALPA_HD void store_first(row_pointer<std::uint32_t> mask, std::int32_t n, T x,
                            std::int32_t early, F f) const {
    // Those that reach x, if these are no more than n; -inf reaches nothing.
    const T lowest = std::numeric_limits<T>::lowest();
    const T bar = x > lowest ? x : lowest;
    std::uint32_t bits = bits_reaching(bar, f);
    const std::int32_t reached =
        butterfly(std::popcount(bits), [](std::int32_t a, std::int32_t b) { return a + b; });
    if (any((reached > n) | (early > 0))) {
      const std::int32_t last = last_equal<T>(n, x, f);
      const bool other = early > 0;
      bits = bits_of([&](element e) {
        const T y = f(e);
        const bool chosen = (y > x) | ((y == x) & (e.expert() <= last));
        return other ? e.expert() < early : chosen;
      });
    }
    store_bits(mask, bits);
  }

 private:
  TALPA_HD element at(int slot) const { return {slot, lane_}; }
  template <class T>
  TALPA_HD static detail::slot_array<T, Slots> quotients_by(const detail::exact_quotient<T>& over,
                                                            const detail::slot_array<T, Slots>& x) {
    detail::slot_array<T, Slots> q;
    TALPA_UNROLL
    for (int s = 0; s < Slots; ++s) q.values[s] = over(x.values[s]);
    return q;
  }
  /// Bit s: whether the condition holds for this lane's element s.
  template <class F>
  TALPA_HD std::uint32_t bits_of(F f) const {
    static_assert(Slots <= 32);
    std::uint32_t bits = 0;
    TALPA_UNROLL
    for (int s = 0; s < Slots; ++s) {
      const bool on = f(at(s));
      bits |= on ? 1u << s : 0u;
    }
    return bits & held_bits();
  }
  /// The same for f(e) >= bar, of numbers, bar > -inf: it holds unless the sign of f(e) - bar says
  /// otherwise. Of equal numbers that difference is +0; for a bar of zero it is f(e) + 0.
  template <class T, class F>
  TALPA_HD std::uint32_t bits_reaching(T bar, F f) const {
    static_assert(Slots <= 32);
    const T back = T{0} - bar;
    std::uint32_t below = 0;
    TALPA_UNROLL
    for (int s = Slots - 1; s >= 0; --s) below = below << 1 | sign_bit(f(at(s)) + back);
    return ~below & held_bits();
  }
  TALPA_HD static std::uint32_t sign_bit(float x) {
    return __builtin_bit_cast(std::uint32_t, x) >> 31;
  }
  TALPA_HD static std::uint32_t sign_bit(double x) {
    return static_cast<std::uint32_t>(__builtin_bit_cast(std::uint64_t, x) >> 63);
  }
  /// Bit s: whether this lane's element s is one of the row.
  TALPA_HD std::uint32_t held_bits() const {
    std::uint32_t bits = 0;
    TALPA_UNROLL
    for (int first = 0; first < Slots; first += chunk) {
      const int here = Whole ? chunk : left_ - place(first);
      const std::uint32_t all = chunk == 32 ? ~0u : (1u << chunk % 32) - 1u;
      const std::uint32_t some = here > 0 ? (1u << here % 32) - 1u : 0u;
      bits |= (here >= chunk ? all : some) << first;
    }
    return bits;
  }
  /// Half of the words goes to the lane on the other side as long as there are several, so that
  /// each lane ends with one of them.
  TALPA_HD void store_bits(row_pointer<std::uint32_t> mask, std::uint32_t bits) const {
    constexpr int words = Slots / chunk;
    static_assert(words <= W && W % words == 0);
    std::uint32_t word[words];
    TALPA_UNROLL
    for (int w = 0; w < words; ++w) {
      const std::uint32_t own_bits =
          chunk == 32 ? bits : (bits >> (w * chunk)) & ((1u << chunk % 32) - 1u);
      word[w] = own_bits << (lane_ * chunk);
    }
    TALPA_UNROLL
    for (int distance = W / 2; distance > 0; distance /= 2) {
      const int half = words * distance / W;
      const bool upper = (lane_ & distance) != 0;
      TALPA_UNROLL
      for (int i = 0; i < words / 2; ++i) {
        if (i >= half) continue;
        std::uint32_t& other = word[i + half < words ? i + half : i];
        const std::uint32_t gives = upper ? word[i] : other;
        const std::uint32_t keeps = upper ? other : word[i];
        word[i] = keeps | block_.shuffle_xor(gives, distance, whole_warp);
      }
      if (half == 0) word[0] |= block_.shuffle_xor(word[0], distance, whole_warp);
    }
    const int w = lane_ / (W / words);
    if (lane_ % (W / words) == 0 && w * (W * chunk) < limit_) mask.data[w] = word[0];
    stores_ = true;
    stored_mask_ = mask.data;
    stored_bits_ = bits;
    block_.sync_lanes(whole_warp);  // what reads single bits again
  }
  /// The end of the canonical reduction: the upper half of the virtual lanes onto the lower, first
  /// those of other lanes.
  template <class T>
  TALPA_HD T total(T (&lanes)[chunk]) const {
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
  /// Elements from the first of this lane to that of a slot.
  static constexpr int place(int slot) { return slot / chunk * (W * chunk) + slot % chunk; }
  template <class T>
  TALPA_HD T* own(row_pointer<T> row) const {
    return row.data + lane_ * chunk;
  }
  /// Whether an element is read and written.
  TALPA_HD bool inside(element e) const { return Whole ? left_ > 0 : place(e.slot) < left_; }
  /// Whether the element of a slot is one of the row, or of a row that is not written.
  TALPA_HD bool holds(int slot) const { return Whole || place(slot) < left_; }
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
  template <class T, class F>
  TALPA_HD numbers<T> numbers_of(F f) const {
    numbers<T> x;
    TALPA_UNROLL
    for (int s = 0; s < Slots; ++s) {
      const T y = f(at(s));
      x.values[s] = {holds(s) ? y : -std::numeric_limits<T>::infinity()};
    }
    return x;
  }
  /// x[0 .. N), largest first, by Batcher's odd-even merge sort, whose exchanges are known here.
  template <int N, class T>
  TALPA_HD static void sort_run(detail::ranked_number<T>* x) {
    TALPA_UNROLL
    for (int p = 1; p < N; p *= 2) {
      TALPA_UNROLL
      for (int d = p; d > 0; d /= 2) {
        TALPA_UNROLL
        for (int i = 0; i < N; ++i) {
          if (i >= d % p && (i - d % p) % (2 * d) < d && i + d < N &&
              i / (2 * p) == (i + d) / (2 * p)) {
            detail::exchange(x[i], x[i + d < N ? i + d : i]);
          }
        }
      }
    }
  }
  /// x[0 .. N), a bitonic run, largest first.
  template <int N, class T>
  TALPA_HD static void merge_bitonic(detail::ranked_number<T>* x) {
    TALPA_UNROLL
    for (int d = N / 2; d > 0; d /= 2) {
      TALPA_UNROLL
      for (int i = 0; i < N; ++i) {
        if ((i & d) == 0) detail::exchange(x[i], x[i + d < N ? i + d : i]);
      }
    }
  }
  /// Batcher's bitonic merge sort over the lanes, each with its numbers in order: then the ranks of
  /// the row are those of lane 0, of lane 1, and so on.
  template <class T>
  TALPA_HD void sort_lanes(detail::ranked_number<T>* x) const {
    const auto kept = [&](detail::ranked_number<T> mine, T other, bool lower) {
      return lower ? larger(mine, {other}) : smaller(mine, {other});
    };
    TALPA_UNROLL
    for (int half = 1; half < W; half *= 2) {
      // Number i of one run meets number n - 1 - i of the other.
      const bool first_run = (lane_ & half) == 0;
      TALPA_UNROLL
      for (int s = 0; s < Slots / 2; ++s) {
        const int mirrored = Slots - 1 - s;
        const T a = block_.shuffle_xor(x[mirrored].value, 2 * half - 1, whole_warp);
        const T b = block_.shuffle_xor(x[s].value, 2 * half - 1, whole_warp);
        x[s] = kept(x[s], a, first_run), x[mirrored] = kept(x[mirrored], b, first_run);
      }
      if (Slots == 1) {
        x[0] = kept(x[0], block_.shuffle_xor(x[0].value, 2 * half - 1, whole_warp), first_run);
      }
      TALPA_UNROLL
      for (int distance = half / 2; distance > 0; distance /= 2) {
        TALPA_UNROLL
        for (int s = 0; s < Slots; ++s) {
          x[s] = kept(x[s], block_.shuffle_xor(x[s].value, distance, whole_warp),
                      (lane_ & distance) == 0);
        }
      }
      merge_bitonic<Slots>(x);
    }
  }
  /// The largest K of two runs of K, each largest first: the larger of a[i] and b[K - 1 - i] for
  /// each i, which is a bitonic run, put in order by a merge. `b` is left as it is.
  template <int K, class T>
  TALPA_HD static void merge_run(detail::ranked_number<T>* a, const detail::ranked_number<T>* b) {
    TALPA_UNROLL
    for (int i = 0; i < K; ++i) a[i] = larger(a[i], b[K - 1 - i]);
    merge_bitonic<K>(a);
  }
  /// The first and the k-th of a row, k <= K, from the largest K of each lane.
  template <int K, class T>
  TALPA_HD top_values<T> top_few(int k, numbers<T>& x) const {
    TALPA_UNROLL
    for (int first = 0; first < Slots; first += K) sort_run<K>(x.values + first);
    TALPA_UNROLL
    for (int half = Slots / 2; half >= K; half /= 2) {
      TALPA_UNROLL
      for (int first = 0; first < half; first += K) {
        merge_run<K>(x.values + first, x.values + half + first);
      }
    }
    detail::ranked_number<T> met[K];
    TALPA_UNROLL
    for (int distance = 1; distance < W; distance *= 2) {
      TALPA_UNROLL
      for (int i = 0; i < K; ++i) {
        met[i] = {block_.shuffle_xor(x.values[i].value, distance, whole_warp)};
      }
      if (distance < W / 2) merge_run<K>(x.values, met);
    }
    if (k == K) {
      // The last of the largest K is their least: they need no order.
      detail::ranked_number<T> least = larger(x.values[0], met[K - 1]);
      TALPA_UNROLL
      for (int i = 1; i < K; ++i) least = smaller(least, larger(x.values[i], met[K - 1 - i]));
      return {larger(x.values[0], met[0]).value, least.value};
    }
    merge_run<K>(x.values, met);
    T last = x.values[K - 1].value;
    TALPA_UNROLL
    for (int i = 0; i + 1 < K; ++i) last = k == i + 1 ? x.values[i].value : last;
    return {x.values[0].value, last};
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
  int left_;   // experts that it reads and writes from this lane's first on
  // The mask that was stored last, for those who read it at once.
  mutable bool stores_ = false;
  mutable const std::uint32_t* stored_mask_ = nullptr;
  mutable std::uint32_t stored_bits_ = 0;
};

}  // namespace talpa
