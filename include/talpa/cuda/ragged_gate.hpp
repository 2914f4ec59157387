// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/cuda/loops.hpp>
#include <talpa/ops/ragged_gate.hpp>

#include <algorithm>
#include <cstdint>

namespace talpa::kernels {

/// The segment e of [0, starts[segments]) with starts[e] <= i < starts[e + 1]; empty ones hold
/// nothing.
TALPA_HD inline index segment_of(const index* starts, index segments, index i) {
  index low = 0, high = segments - 1;
  while (low < high) {
    const index middle = (low + high) / 2;
    if (i < starts[middle + 1]) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

/// Lanes that share one segment of ranks.
inline constexpr int rank_lanes = 8;

/// Writes factor dz over one segment and returns the sum of dz u: rank r belongs to lane r mod 8,
/// each sums in order, then the tree 4, 2, 1. Each number is read before du, which may be dz, is
/// written.
template <class Block, class T>
TALPA_HD T scale_and_dot(Block& block, std::uint32_t lanes, T factor, index count, const T* u,
                         const T* dz, T* du) {
  T sum{0};
  for (index r = block.thread() % rank_lanes; r < count; r += rank_lanes) {
    const T from = dz[r];
    sum = sum + from * u[r];
    du[r] = factor * from;
  }
  for (int distance = rank_lanes / 2; distance > 0; distance /= 2) {
    sum = sum + block.shuffle_xor(sum, distance, lanes);
  }
  return sum;
}

/// Calls f(block, i, lanes) for each i < count, eight neighbouring lanes each in turn.
template <class F>
struct rank_loop {
  F f;
  index count;

  template <class Block>
  TALPA_HD void operator()(Block& block) const {
    constexpr index segments = Block::threads() / rank_lanes;
    const std::uint32_t lanes = 0xffu << (block.thread() % 32 / rank_lanes * rank_lanes);
    for (index i = block.index() * segments + block.thread() / rank_lanes; i < count;
         i += block.count() * segments) {
      f(block, i, lanes);
    }
  }
};
template <class B, class F>
void for_each_segment(context<B>& ctx, index count, const F& f) {
  detail::launch<loop_threads>(ctx,
                               std::min(ceil_div(count, loop_threads / rank_lanes), loop_blocks), 0,
                               rank_loop<F>{f, count});
}

/// The gradients of one token and expert.
template <class T, class B>
struct ragged_gate_backward {
  vector_view<const index, B> blocks;
  vector_view<const T, B> scales;
  matrix_view<const T, B> gates, u, dz;
  matrix_view<T, B> du, dgates;

  template <class Block>
  TALPA_HD void operator()(Block& block, index i, std::uint32_t lanes) const {
    const index n = i / gates.cols, e = i % gates.cols, first = blocks[e];
    const T scale = scales[e];
    const T dot = scale_and_dot(block, lanes, scale * gates(n, e), blocks[e + 1] - first,
                                u.row(n) + first, dz.row(n) + first, du.row(n) + first);
    if (block.thread() % rank_lanes == 0) dgates(n, e) = scale * dot;
  }
};

/// The gradients of one slot.
template <class T, class B>
struct ragged_slot_gate_backward {
  vector_view<const index, B> offsets, blocks;
  vector_view<const T, B> scales, gates;
  matrix_view<const T, B> u, dz;
  matrix_view<T, B> du;
  vector_view<T, B> dgates;

  template <class Block>
  TALPA_HD void operator()(Block& block, index s, std::uint32_t lanes) const {
    const index experts = offsets.size - 1;
    if (s >= offsets[experts]) return;
    const index e = segment_of(offsets.data, experts, s);
    const T scale = scales[e];
    const T dot = scale_and_dot(block, lanes, scale * gates[s], blocks[e + 1] - blocks[e], u.row(s),
                                dz.row(s), du.row(s));
    if (block.thread() % rank_lanes == 0) dgates[s] = scale * dot;
  }
};

}  // namespace talpa::kernels

namespace talpa::ops {

template <kernel_backend B>
struct ragged_gate_impl<B> {
  template <class T>
  static void forward(context<B>& ctx, vector_view<const index, B> blocks,
                      vector_view<const T, B> scales, matrix_view<const T, B> gates,
                      matrix_view<const T, B> u, matrix_view<T, B> z) {
    kernels::for_each_element(ctx, u.rows, u.cols, [=] TALPA_DEVICE(index n, index j) {
      const index e = kernels::segment_of(blocks.data, gates.cols, j);
      z(n, j) = (scales[e] * gates(n, e)) * u(n, j);
    });
  }

  template <class T>
  static void backward(context<B>& ctx, vector_view<const index, B> blocks,
                       vector_view<const T, B> scales, matrix_view<const T, B> gates,
                       matrix_view<const T, B> u, matrix_view<const T, B> dz, matrix_view<T, B> du,
                       matrix_view<T, B> dgates) {
    kernels::for_each_segment(
        ctx, gates.rows * gates.cols,
        kernels::ragged_gate_backward<T, B>{blocks, scales, gates, u, dz, du, dgates});
  }

  template <class T>
  static void slot_forward(context<B>& ctx, vector_view<const index, B> offsets,
                           vector_view<const index, B> blocks, vector_view<const T, B> scales,
                           vector_view<const T, B> gates, matrix_view<const T, B> u,
                           matrix_view<T, B> z) {
    kernels::for_each_element(ctx, u.rows, u.cols, [=] TALPA_DEVICE(index s, index r) {
      const index experts = offsets.size - 1;
      if (s >= offsets[experts]) return;
      const index e = kernels::segment_of(offsets.data, experts, s);
      if (r < blocks[e + 1] - blocks[e]) z(s, r) = (scales[e] * gates[s]) * u(s, r);
    });
  }

  template <class T>
  static void slot_backward(context<B>& ctx, vector_view<const index, B> offsets,
                            vector_view<const index, B> blocks, vector_view<const T, B> scales,
                            vector_view<const T, B> gates, matrix_view<const T, B> u,
                            matrix_view<const T, B> dz, matrix_view<T, B> du,
                            vector_view<T, B> dgates) {
    kernels::for_each_segment(ctx, u.rows,
                              kernels::ragged_slot_gate_backward<T, B>{offsets, blocks, scales,
                                                                       gates, u, dz, du, dgates});
  }
};

}  // namespace talpa::ops
