// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/cpu/context.hpp>
#include <talpa/ops/ragged_gate.hpp>

#include <algorithm>

namespace talpa::ops {

template <>
struct ragged_gate_impl<cpu> {
  static constexpr index task_rows = 128;

  template <class T>
  static void forward(context<cpu>& ctx, vector_view<const index, cpu> blocks,
                      vector_view<const T, cpu> scales, matrix_view<const T, cpu> gates,
                      matrix_view<const T, cpu> u, matrix_view<T, cpu> z) {
    detail::parallel_for_blocks(ctx, u.rows, task_rows, [&](index first, index rows, int) {
      for (index n = first; n < first + rows; ++n) {
        for (index e = 0; e < gates.cols; ++e) {
          scale_by(scales[e] * gates(n, e), blocks[e + 1] - blocks[e], u.row(n) + blocks[e],
                   z.row(n) + blocks[e]);
        }
      }
    });
  }

  template <class T>
  static void backward(context<cpu>& ctx, vector_view<const index, cpu> blocks,
                       vector_view<const T, cpu> scales, matrix_view<const T, cpu> gates,
                       matrix_view<const T, cpu> u, matrix_view<const T, cpu> dz,
                       matrix_view<T, cpu> du, matrix_view<T, cpu> dgates) {
    detail::parallel_for_blocks(ctx, u.rows, task_rows, [&](index first, index rows, int) {
      for (index n = first; n < first + rows; ++n) {
        for (index e = 0; e < gates.cols; ++e) {
          dgates(n, e) = scales[e] * scale_and_dot(scales[e] * gates(n, e),
                                                   blocks[e + 1] - blocks[e], u.row(n) + blocks[e],
                                                   dz.row(n) + blocks[e], du.row(n) + blocks[e]);
        }
      }
    });
  }

  template <class T>
  static void slot_forward(context<cpu>& ctx, vector_view<const index, cpu> offsets,
                           vector_view<const index, cpu> blocks, vector_view<const T, cpu> scales,
                           vector_view<const T, cpu> gates, matrix_view<const T, cpu> u,
                           matrix_view<T, cpu> z) {
    for_each_slot(ctx, offsets, [&](index s, index e) {
      scale_by(scales[e] * gates[s], blocks[e + 1] - blocks[e], u.row(s), z.row(s));
    });
  }

  template <class T>
  static void slot_backward(context<cpu>& ctx, vector_view<const index, cpu> offsets,
                            vector_view<const index, cpu> blocks, vector_view<const T, cpu> scales,
                            vector_view<const T, cpu> gates, matrix_view<const T, cpu> u,
                            matrix_view<const T, cpu> dz, matrix_view<T, cpu> du,
                            vector_view<T, cpu> dgates) {
    for_each_slot(ctx, offsets, [&](index s, index e) {
      dgates[s] = scales[e] * scale_and_dot(scales[e] * gates[s], blocks[e + 1] - blocks[e],
                                            u.row(s), dz.row(s), du.row(s));
    });
  }

 private:
  template <class T>
  static void scale_by(T factor, index count, const T* from, T* to) {
    for (index r = 0; r < count; ++r) to[r] = factor * from[r];
  }
  template <class T>
  static T scale_and_dot(T factor, index count, const T* values, const T* from, T* to) {
    T sum{};
    for (index r = 0; r < count; ++r) {
      sum += from[r] * values[r];
      to[r] = factor * from[r];
    }
    return sum;
  }
  /// f(slot, its expert).
  template <class F>
  static void for_each_slot(context<cpu>& ctx, vector_view<const index, cpu> offsets, F f) {
    const index* const ends = offsets.data + 1;
    const index experts = offsets.size - 1, slots = offsets[experts];
    detail::parallel_for_blocks(ctx, slots, task_rows, [&](index first, index rows, int) {
      // The expert of a slot is the first whose segment ends behind it.
      index e = std::upper_bound(ends, ends + experts, first) - ends;
      for (index s = first; s < first + rows; ++s) {
        while (ends[e] <= s) ++e;
        f(s, e);
      }
    });
  }
};

}  // namespace talpa::ops
