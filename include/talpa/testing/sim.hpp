// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/lanes.hpp>

#include <cstddef>
#include <cstdint>
#include <limits>

namespace talpa {

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
    return detail::splat<T, W>(c);
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
  template <class T, class Map, class F, class Use>
  pack<T, W> sum_of(Map map, F f, Use use) const {
    return sum<T>([&](element e) { return use(e, map(f(e))); });
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
    detail::sort_descending(r, experts_, -std::numeric_limits<T>::infinity());
    return {r};
  }
  template <class T, class F>
  top_values<pack<T, W>> top(index k, F f) const {
    const auto r = ranks<T>(k, f);
    return {r(0), r(k - 1)};
  }
  template <class T, class Part, class Within, class F>
  leading<pack<T, W>, pack<std::int32_t, W>> leading_ranks(const rank_limit& limit, Part part,
                                                           const pack<T, W>& b, Within within,
                                                           const pack<bool, W>& asked, F f) const {
    return detail::lead_by_rank<T>(*this, limit, part, b, within, asked, f);
  }
  template <class T, class F>
  pack<std::int32_t, W> last_equal(const pack<std::int32_t, W>& n, const pack<T, W>& x, F f) const {
    return uniform(serial(experts_, scratch_)
                       .last_equal(n.v[0], T{x.v[0]}, [y = values_of_row<T>(f)](serial::element e) {
                         return y[e.slot];
                       }));
  }
  template <class Array, class Value>
  static detail::quotient_array<Array, Value> quotients(const Array& x, const Value& b) {
    return {x, b};
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
  template <class F>
  pack<bool, W> some(F f) const {
    return count(f) > uniform(std::int32_t{0});
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
  template <class T, class F>
  void store_first(row_pointer<std::uint32_t> mask, const pack<std::int32_t, W>& n,
                   const pack<T, W>& x, const pack<std::int32_t, W>& early, F f) const {
    detail::store_up_to_last<T>(*this, mask, n, x, early, f);
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
