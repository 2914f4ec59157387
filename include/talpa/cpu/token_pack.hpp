// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/lanes.hpp>
#include <talpa/core/view.hpp>
#include <talpa/cpu/transpose_rows.hpp>

#include <cstddef>
#include <cstdint>
#include <limits>

namespace talpa {

/// Rows of W tokens in memory that are read or written soon.
struct upcoming_rows {
  const char* data = nullptr;  ///< none where there is nothing to gain
  index stride = 0;            ///< bytes from one row to the next

  /// W rows of E values from n on; none where there are fewer, and for short rows, which processors
  /// fetch ahead by themselves.
  template <int W, class T>
  static upcoming_rows of(matrix_view<T, cpu> rows, index n) {
    if (rows.data == nullptr || rows.cols <= W || n + W > rows.rows) return {};
    return {reinterpret_cast<const char*>(rows.row(n)),
            rows.stride * static_cast<index>(sizeof(T))};
  }
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
      return detail::splat<std::int32_t, W>(static_cast<std::int32_t>(slot));
    }
  };

  /// `read` by the next pack and `written` by this one, rows of E values, are fetched while it
  /// computes.
  token_pack(index experts, int valid, lane_scratch* scratch, upcoming_rows read = {},
             upcoming_rows written = {})
      : experts_(experts), valid_(valid), scratch_(scratch), read_(read), written_(written) {}

  index experts() const { return experts_; }
  template <class T>
  [[gnu::always_inline]] static pack<T, W> uniform(T c) {
    return detail::splat<T, W>(c);
  }
  /// f(), a number that depends on its kind, E and the argument alone, kept from pack to pack.
  template <class T, class F>
  [[gnu::always_inline]] T shared(int kind, double argument, F f) const {
    return scratch_->template shared<T>(kind, experts_, argument, f);
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
    const auto zero = uniform(T{});
    for (index i = experts_; i < 8; ++i) lanes[i] = zero;
    // One call of f in the code: two, and compilers no longer inline it.
    for (index e = 0; e < experts_; ++e) {
      const index lane = e % mask_word_bits;
      const pack<T, W>& before = e < mask_word_bits ? zero : lanes[lane];
      lanes[lane] = before + f(element{e});
    }
    return detail::canonical_tree(lanes, experts_);
  }
  template <class T, class Map, class F, class Use>
  [[gnu::always_inline]] pack<T, W> sum_of(Map map, F f, Use use) const {
    pack<T, W> lanes[mask_word_bits];
    const auto zero = uniform(T{});
    for (index i = experts_; i < 8; ++i) lanes[i] = zero;
    const auto add = [&](index first, auto& x) __attribute__((always_inline)) {
      constexpr int n = sizeof(x) / sizeof(x[0]);
#pragma GCC unroll 4
      for (int i = 0; i < n; ++i) x[i] = f(element{first + i});
      detail::map_all(map, x);
#pragma GCC unroll 4
      for (int i = 0; i < n; ++i) {
        const index e = first + i, lane = e % mask_word_bits;
        const pack<T, W>& before = e < mask_word_bits ? zero : lanes[lane];
        lanes[lane] = before + use(element{e}, x[i]);
      }
      fetch<T>(first, n);
    };
    index e = 0;
    for (pack<T, W> x[lock_step]; e + lock_step <= experts_; e += lock_step) add(e, x);
    for (pack<T, W> x[1]; e < experts_; ++e) add(e, x);
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
      detail::keep_largest<1, T>(r, experts_, lowest, at);
    } else if (most == 2) {
      detail::keep_largest<2, T>(r, experts_, lowest, at);
    } else if (most <= 4) {
      detail::keep_largest<4, T>(r, experts_, lowest, at);
    } else if (most <= 8) {
      detail::keep_largest<8, T>(r, experts_, lowest, at);
    } else {
      for (index e = 0; e < experts_; ++e) r[e] = at(e);
      detail::sort_descending(r, experts_, lowest);
    }
    return {r};
  }
  template <class T, class F>
  [[gnu::always_inline]] top_values<pack<T, W>> top(index k, F f) const {
    const auto r = ranks<T>(k, f);
    return {r(0), r(k - 1)};
  }
  template <class T, class Part, class Within, class F>
  [[gnu::always_inline]] leading<pack<T, W>, pack<std::int32_t, W>> leading_ranks(
      const rank_limit& limit, Part part, const pack<T, W>& b, Within within,
      const pack<bool, W>& asked, F f) const {
    return detail::lead_by_rank<T>(*this, limit, part, b, within, asked, f);
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
  template <class Array, class Value>
  [[gnu::always_inline]] static detail::quotient_array<Array, Value> quotients(const Array& x,
                                                                               const Value& b) {
    return {x, b};
  }
  template <class F>
  [[gnu::always_inline]] pack<std::int32_t, W> count(F f) const {
    pack<std::int32_t, W> n = uniform(std::int32_t{0});
    for (index e = 0; e < experts_; ++e) n = minus_one(n, f(element{e}));
    return -n;
  }
  template <class F>
  [[gnu::always_inline]] pack<bool, W> some(F f) const {
    pack<bool, W> found = uniform(false);
#pragma GCC unroll 4
    for (index e = 0; e < experts_; ++e) found = found | f(element{e});
    return found;
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
    if (stored_words_ != nullptr && mask.data == stored_mask_) return {stored_words_};
    const index count = mask_words(experts_);
    pack<std::int32_t, W>* const words = take_words();
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
    pack<std::int32_t, W>* const words = words_for(mask);
    const index count = mask_words(experts_);
    for (index w = 0; w < count; ++w) {
      words[w] = word_of(w, [&](element e) { return f(e); });
    }
    write_words(mask, words);
  }
  /// Where no row is cut among experts of equal value, its first n are those with at least x.
  template <class T, class F>
  [[gnu::always_inline]] void store_first(row_pointer<std::uint32_t> mask,
                                          const pack<std::int32_t, W>& n, const pack<T, W>& x,
                                          const pack<std::int32_t, W>& early, F f) const {
    const auto lowest = uniform(-std::numeric_limits<T>::infinity());
    pack<std::int32_t, W>* const words = words_for(mask);
    const index count = mask_words(experts_);
    auto left = n;
    for (index w = 0; w < count; ++w) {
      words[w] = word_of(w, [&](element e) {
        const auto in = f(e) >= x;
        left = minus_one(left, in);
        return in;
      });
    }
    const auto tied = left < uniform(std::int32_t{0}), empty = x <= lowest;
    if (any(tied | (empty | (early > uniform(std::int32_t{0}))))) {
      detail::store_up_to_last<T>(*this, mask, n, x, early, f);
    } else {
      write_words(mask, words);
    }
  }

 private:
  static constexpr index most_columns = 16;
  static constexpr int lock_step = 4;  // elements that sum_of maps at a time

  /// Word w of a mask row with the bits f(e).
  template <class F>
  [[gnu::always_inline]] pack<std::int32_t, W> word_of(index w, F f) const {
    auto word = uniform(std::int32_t{0});
    const index first = w * mask_word_bits;
    const index last = first + mask_word_bits < experts_ ? first + mask_word_bits : experts_;
    for (index e = first; e < last; ++e) {
      const auto bit = uniform(static_cast<std::int32_t>(1u << (e - first)));
      word = word + talpa::select(f(element{e}), bit, uniform(std::int32_t{0}));
    }
    return word;
  }
  /// Where the words of a mask row that is being written are kept for load_mask.
  pack<std::int32_t, W>* words_for(row_pointer<std::uint32_t> mask) const {
    if (stored_words_ == nullptr) stored_words_ = take_words();
    stored_mask_ = mask.data;
    return stored_words_;
  }
  [[gnu::always_inline]] void write_words(row_pointer<std::uint32_t> mask,
                                          const pack<std::int32_t, W>* words) const {
    if (experts_ <= mask_word_bits && mask.stride == 1 && valid_ == W) {
      __builtin_memcpy(mask.data, &words->v, sizeof(words->v));
      return;
    }
    for (index w = 0; w < mask_words(experts_); ++w) {
      const auto word = detail::values_of(words[w]);
      for (int i = 0; i < valid_; ++i) {
        mask.data[i * mask.stride + w] = static_cast<std::uint32_t>(word.v[i]);
      }
    }
  }
  pack<std::int32_t, W>* take_words() const {
    return static_cast<pack<std::int32_t, W>*>(scratch_->take(
        static_cast<std::size_t>(mask_words(experts_)) * sizeof(pack<std::int32_t, W>)));
  }

  /// Fetches parts `first` .. first + n - 1 of the upcoming rows, of W values each, down the rows
  /// first: E parts are all there are. Many at once would hold up what is under way.
  template <class T>
  [[gnu::always_inline]] void fetch(index first, int n) const {
    if constexpr (W >= lock_step) {
      const index row = first % W, bytes = (first - row) * static_cast<index>(sizeof(T));
      if (read_.data != nullptr) {
        for (int i = 0; i < n; ++i) {
          __builtin_prefetch(read_.data + (row + i) * read_.stride + bytes, 0);
        }
      }
      if (written_.data != nullptr) {
        for (int i = 0; i < n; ++i) {
          __builtin_prefetch(written_.data + (row + i) * written_.stride + bytes, 1);
        }
      }
    }
  }

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
    if constexpr (detail::in_register<T, W> && W >= 4) {
      if (valid_ == W && columns == most_columns) return store_whole(row, x);
    }
    const index done = store_blocks<W>(row, reinterpret_cast<const T*>(x), 0, columns);
    for (index j = done; j < columns; ++j) store(row, element{j}, x[j]);
  }
  /// The same for `most_columns` columns of W rows, in so few instructions that a processor gets to
  /// what comes next while it waits for them.
  template <class T>
  [[gnu::always_inline]] static void store_whole(row_pointer<T> row, const pack<T, W>* x) {
    for (index first = 0; first < most_columns; first += W) {
      typename detail::pack_storage<T, W>::type r[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) r[i] = x[first + i].v;
      detail::transpose_rows<W>(r);
      T* to = row.data + first;
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i, to += row.stride) __builtin_memcpy(to, &r[i], sizeof(r[i]));
    }
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
  upcoming_rows read_, written_;
  // The mask row written last, which a selector reads again for its gates.
  mutable pack<std::int32_t, W>* stored_words_ = nullptr;
  mutable const std::uint32_t* stored_mask_ = nullptr;
};

}  // namespace talpa
