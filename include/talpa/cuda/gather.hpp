// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/cuda/loops.hpp>
#include <talpa/cuda/quad.hpp>
#include <talpa/ops/gather.hpp>

#include <cstdint>
#include <limits>

namespace talpa::kernels {

/// Width neighbours of a token: the sum of its slots, in order, rounded once.
template <class T, class B, int Width>
struct combine_slots {
  segments<B> s;
  matrix_view<const T, B> x;
  matrix_view<T, B> y;
  bool keeps;

  TALPA_HD void operator()(index n, index block) const {
    using sum_of = sum_type<T>;
    T* const to = y.row(n) + Width * block;
    neighbours<sum_of, Width> sum{};
    if (keeps) sum = load_wide<sum_of, Width>(to);
    for (index i = s.slot_offset_of_token[n]; i < s.slot_offset_of_token[n + 1]; ++i) {
      const index slot = i < s.slot_of_token.size ? index{s.slot_of_token[i]} : x.rows;
      neighbours<sum_of, Width> more;
      if (slot < x.rows) {
        more = load_wide<sum_of, Width>(x.row(slot) + Width * block);
      } else {
        TALPA_UNROLL
        for (int j = 0; j < Width; ++j) more.v[j] = std::numeric_limits<sum_of>::quiet_NaN();
      }
      TALPA_UNROLL
      for (int j = 0; j < Width; ++j) sum.v[j] += more.v[j];
    }
    store_wide(to, sum);
  }
};

}  // namespace talpa::kernels

namespace talpa::ops {

template <kernel_backend B>
struct gather_impl<B> {
  /// Over all places for slots: how many are in use only the device knows.
  template <class T>
  static void gather(context<B>& ctx, const segments<B>& s, matrix_view<const T, B> x,
                     matrix_view<T, B> y) {
    const index* const used = s.offsets.data + s.experts();
    const std::int32_t* const token_of_slot = s.token_of_slot.data;
    kernels::for_each_element(ctx, y.rows, y.cols, [=] TALPA_DEVICE(index i, index d) {
      if (i < *used) y(i, d) = x(token_of_slot[i], d);
    });
  }

  template <class T>
  static void clear_unused(context<B>& ctx, const segments<B>& s, matrix_view<T, B> y) {
    const index* const used = s.offsets.data + s.experts();
    kernels::for_each_element(ctx, y.rows, y.cols, [=] TALPA_DEVICE(index i, index d) {
      if (i >= *used) y(i, d) = T{0};
    });
  }

  /// A token with slots beyond the places there are gets NaN: the host cannot know without waiting.
  template <class T>
  static void combine(context<B>& ctx, const segments<B>& s, matrix_view<const T, B> x,
                      matrix_view<T, B> y, grad_mode mode) {
    const bool keeps = mode == grad_mode::accumulate;
    if (kernels::holds_quads(x) && kernels::holds_quads(y) && y.cols % 4 == 0) {
      kernels::for_each_element(ctx, y.rows, y.cols / 4,
                                kernels::combine_slots<T, B, 4>{s, x, y, keeps});
    } else {
      kernels::for_each_element(ctx, y.rows, y.cols,
                                kernels::combine_slots<T, B, 1>{s, x, y, keeps});
    }
  }
};

}  // namespace talpa::ops
