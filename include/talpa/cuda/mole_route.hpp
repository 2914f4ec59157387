// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/cuda/select.hpp>
#include <talpa/ops/mole_route.hpp>

namespace talpa::kernels {

/// Routes the rows of a block with one lane group each, then all its threads gate these rows in rank
/// space, neighbouring threads on neighbouring columns.
template <int W, int Slots, class Selector, class S, class B>
struct mole_route_body {
  Selector selector;
  mole_rows<S, B> in;

  template <class Block>
  TALPA_HD void operator()(Block& block) const {
    constexpr int groups = Block::threads() / W;
    const index rows = in.logits.rows;
    const int rank = static_cast<int>(in.rank), used = static_cast<int>(in.u.cols);
    const int width = static_cast<int>(in.z.cols);
    const warp_tile<W, Slots, Block> group(block, in.logits.cols);
    const select_one_row<false, Selector, float, B> select_row_{
        selector, in.logits, in.padding_mask, in.gates, in.mask, {}};
    for (index first = block.index() * groups; first < rows; first += block.count() * groups) {
      const index n = first + block.thread() / W;
      if (n < rows) select_row_(group, n);
      block.sync();
      const int here = static_cast<int>(rows - first < groups ? rows - first : groups);
      for (int i = block.thread(); i < here * width; i += Block::threads()) {
        const index row = first + i / width;
        const int j = i % width;
        float z = 0.0f;
        if (j < used) {
          const float gate = in.gates(row, j / rank);
          // An expert that is off gives 0, whatever its A x is.
          z = gate == 0.0f ? 0.0f : in.scale * gate * in.u(row, j);
        }
        in.z(row, j) = static_cast<S>(z);
      }
    }
  }
};

template <int W, int Slots, class Selector, class S, class B>
struct mole_route_backward_body {
  Selector selector;
  mole_rows<S, B> in;
  mole_rows_gradient<S, B> out;

  template <class Block>
  TALPA_HD void operator()(Block& block) const {
    constexpr int groups = Block::threads() / W;
    const index rows = in.logits.rows;
    const int rank = static_cast<int>(in.rank), experts = static_cast<int>(in.logits.cols);
    const int used = static_cast<int>(in.u.cols), width = static_cast<int>(out.width);
    const int columns = static_cast<int>(out.du.cols);
    const warp_tile<W, Slots, Block> group(block, experts);
    const select_backward_one_row<Selector, float, B> select_row_{
        selector, in.logits, in.gates, in.mask, out.dgates, out.dlogits, {}, {}};
    for (index first = block.index() * groups; first < rows; first += block.count() * groups) {
      const int here = static_cast<int>(rows - first < groups ? rows - first : groups);
      for (int i = block.thread(); i < here * experts; i += Block::threads()) {
        const index row = first + i / experts;
        const int e = i % experts;
        const float* const dz = out.dz.row(row) + e * rank;
        const float* const u = in.u.row(row) + e * rank;
        float sum = 0.0f;
        for (int r = 0; r < rank; ++r) sum = math::fma(dz[r], u[r], sum);
        const float more = out.dgates_losses.data == nullptr ? 0.0f : out.dgates_losses(row, e);
        out.dgates(row, e) = math::fma(in.scale, sum, more);
      }
      block.sync();
      const index n = first + block.thread() / W;
      if (n < rows) select_row_(group, n);
      block.sync();
      for (int i = block.thread(); i < here * columns; i += Block::threads()) {
        const index row = first + i / columns;
        const int j = i % columns;
        float x = 0.0f;
        if (j < used) {
          const float gate = in.gates(row, j / rank);
          x = gate == 0.0f ? 0.0f : in.scale * gate * out.dz(row, j);
        } else if (j >= width && j - width < experts) {
          x = out.dlogits(row, j - width);
          if (out.dlogits_losses.data != nullptr) x += out.dlogits_losses(row, j - width);
        }
        out.du(row, j) = static_cast<S>(x);
      }
    }
  }
};

}  // namespace talpa::kernels

namespace talpa::ops {

template <kernel_backend B>
struct mole_route_impl<B> {
  template <class Selector, class S>
  static void forward(context<B>& ctx, const Selector& selector, const mole_rows<S, B>& rows) {
    kernels::with_group(Selector::name, rows.logits.cols, [&](auto width, auto slots) {
      constexpr int w = decltype(width)::value, s = decltype(slots)::value;
      detail::launch<kernels::row_threads>(
          ctx, kernels::group_blocks<w>(rows.logits.rows), 0,
          kernels::mole_route_body<w, s, Selector, S, B>{selector, rows});
    });
  }
  template <class Selector, class S>
  static void backward(context<B>& ctx, const Selector& selector, const mole_rows<S, B>& rows,
                       const mole_rows_gradient<S, B>& gradient) {
    kernels::with_group(Selector::name, rows.logits.cols, [&](auto width, auto slots) {
      constexpr int w = decltype(width)::value, s = decltype(slots)::value;
      detail::launch<kernels::row_threads>(
          ctx, kernels::group_blocks<w>(rows.logits.rows), 0,
          kernels::mole_route_backward_body<w, s, Selector, S, B>{selector, rows, gradient});
    });
  }
};

}  // namespace talpa::ops
