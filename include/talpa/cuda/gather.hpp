// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/cuda/loops.hpp>
#include <talpa/ops/gather.hpp>

#include <cstdint>
#include <limits>

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

  /// A token with slots beyond the places there are gets NaN: the host cannot know without waiting.
  template <class T>
  static void combine(context<B>& ctx, const segments<B>& s, matrix_view<const T, B> x,
                      matrix_view<T, B> y, grad_mode mode) {
    const bool keeps = mode == grad_mode::accumulate;
    kernels::for_each_element(ctx, y.rows, y.cols, [=] TALPA_DEVICE(index n, index d) {
      T sum = keeps ? y(n, d) : T{0};
      for (index i = s.slot_offset_of_token[n]; i < s.slot_offset_of_token[n + 1]; ++i) {
        const index slot = i < s.slot_of_token.size ? s.slot_of_token[i] : x.rows;
        sum += slot < x.rows ? x(slot, d) : std::numeric_limits<T>::quiet_NaN();
      }
      y(n, d) = sum;
    });
  }
};

}  // namespace talpa::ops
