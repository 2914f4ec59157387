// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/cuda/quad.hpp>
#include <talpa/cuda/route.hpp>
#include <talpa/cuda/select.hpp>
#include <talpa/ops/mole_route.hpp>

namespace talpa::kernels {

/// Numbers of a row gated in rank space: scale g x of column j, 0 beyond the ranks. An expert that
/// is off gives 0, whatever x is.
struct gated_row {
  const float* gates;
  float scale;
  int rank;
  int used;  // E R

  TALPA_HD float factor(int j) const { return scale * gates[j / rank]; }
  TALPA_HD static float gated(float factor, float x) { return factor == 0.0f ? 0.0f : factor * x; }
  TALPA_HD float at(const float* x, int j) const {
    return j < used ? gated(factor(j), x[j]) : 0.0f;
  }
  /// Columns j .. j + 3 of one expert; `used` is a multiple of four.
  template <class S>
  TALPA_HD quad<S> quad_at(const float* x, int j) const {
    quad<float> y{};
    float f = 0.0f;
    if (j < used) {
      y = load_quad(x + j);
      f = factor(j);
    }
    quad<S> z;
    TALPA_UNROLL
    for (int i = 0; i < 4; ++i) z.v[i] = static_cast<S>(gated(f, y.v[i]));
    return z;
  }
};

/// The warps of a block gate rows first .. last - 1 in rank space, one each, neighbouring lanes on
/// neighbouring columns.
template <class S, class B>
struct gate_ranks {
  mole_rows<S, B> in;
  bool quads;  // four columns at a time: they share an expert and an access

  template <class Block>
  TALPA_HD void operator()(const Block& block, index first, index last) const {
    constexpr index warps = Block::threads() / 32;
    const int width = static_cast<int>(in.z.cols), lane = block.thread() % 32;
    for (index row = first + block.thread() / 32; row < last; row += warps) {
      const gated_row g{in.gates.row(row), in.scale, static_cast<int>(in.rank),
                        static_cast<int>(in.u.cols)};
      const float* const u = in.u.row(row);
      S* const z = in.z.row(row);
      if (quads) {
        for (int j = 4 * lane; j < width; j += 128) store_quad(z + j, g.quad_at<S>(u, j));
      } else {
        for (int j = lane; j < width; j += 32) z[j] = static_cast<S>(g.at(u, j));
      }
    }
  }
};

/// Rows that a block routes: no more than 32, whose ranks all of its warps gate.
template <int W>
inline constexpr int rows_of_a_block = row_threads / W < 32 ? row_threads / W : 32;

/// Routes the rows of a block with one lane group each, then gates these rows.
template <int W, int Slots, bool Whole, class Selector, class S, class B>
struct mole_route_body {
  static constexpr int least_blocks = 4;  // see select_one_row

  Selector selector;
  gate_ranks<S, B> gate;

  template <class Block>
  TALPA_HD void operator()(Block& block) const {
    constexpr int groups = rows_of_a_block<W>;
    const mole_rows<S, B>& in = gate.in;
    const index rows = in.logits.rows;
    const warp_tile<W, Slots, Block, Whole> group(block, in.logits.cols);
    const select_one_row<false, Selector, float, B> select_row_{
        selector, in.logits, in.padding_mask, in.gates, in.mask, {}};
    for (index first = block.index() * groups; first < rows; first += block.count() * groups) {
      const index n = first + block.thread() / W;
      if (block.thread() < groups * W) select_row_(group.only(n < rows), n < rows ? n : rows - 1);
      block.sync();
      gate(block, first, first + groups < rows ? first + groups : rows);
    }
  }
};

template <int W, int Slots, class Selector, class S, class B>
struct mole_route_backward_body {
  Selector selector;
  mole_rows<S, B> in;
  mole_rows_gradient<S, B> out;
  bool quads;

  template <class Block>
  TALPA_HD void operator()(Block& block) const {
    constexpr int groups = rows_of_a_block<W>, warps = Block::threads() / 32;
    const index rows = in.logits.rows;
    const int rank = static_cast<int>(in.rank), experts = static_cast<int>(in.logits.cols);
    const int used = static_cast<int>(in.u.cols), width = static_cast<int>(out.width);
    const int columns = static_cast<int>(out.du.cols), lane = block.thread() % 32;
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
        if (quads) {
          for (int r = 0; r < rank; r += 4) {
            const quad<float> a = load_quad(dz + r), b = load_quad(u + r);
            TALPA_UNROLL
            for (int k = 0; k < 4; ++k) sum = math::fma(a.v[k], b.v[k], sum);
          }
        } else {
          for (int r = 0; r < rank; ++r) sum = math::fma(dz[r], u[r], sum);
        }
        const float more = out.dgates_losses.data == nullptr ? 0.0f : out.dgates_losses(row, e);
        out.dgates(row, e) = math::fma(in.scale, sum, more);
      }
      block.sync();
      const index n = first + block.thread() / W;
      if (block.thread() < groups * W) select_row_(group.only(n < rows), n < rows ? n : rows - 1);
      block.sync();
      for (int i = block.thread() / 32; i < here; i += warps) {
        const index row = first + i;
        const gated_row g{in.gates.row(row), in.scale, rank, used};
        const float* const dz = out.dz.row(row);
        S* const du = out.du.row(row);
        int begin = lane;
        if (quads) {
          for (int j = 4 * lane; j < width; j += 128) store_quad(du + j, g.quad_at<S>(dz, j));
          begin = width + lane;
        }
        for (int j = begin; j < columns; j += 32) {
          float x = 0.0f;
          if (j < width) {
            x = g.at(dz, j);
          } else if (j - width < experts) {
            x = out.dlogits(row, j - width);
            if (out.dlogits_losses.data != nullptr) x += out.dlogits_losses(row, j - width);
          }
          du[j] = static_cast<S>(x);
        }
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
    kernels::with_fitting_group(
        Selector::name, rows.logits.cols, [&](auto width, auto slots, auto whole) {
          constexpr int w = decltype(width)::value, s = decltype(slots)::value;
          using body = kernels::mole_route_body<w, s, decltype(whole)::value, Selector, S, B>;
          detail::launch<kernels::row_threads>(
              ctx, kernels::row_blocks(rows.logits.rows, kernels::rows_of_a_block<w>), 0,
              body{selector, gate_of(rows)});
        });
  }
  template <class Selector, class S>
  static void forward(context<B>& ctx, const Selector& selector, const mole_rows<S, B>& rows,
                      const wanted_totals<float, B>& totals) {
    kernels::route_rows<float, B>(
        ctx, Selector::name,
        {rows.logits, rows.gates, rows.mask, rows.padding_mask, totals.group_rows}, totals,
        kernels::select_one_row<false, Selector, float, B>{
            selector, rows.logits, rows.padding_mask, rows.gates, rows.mask, {}},
        gate_of(rows));
  }
  template <class Selector, class S>
  static void backward(context<B>& ctx, const Selector& selector, const mole_rows<S, B>& rows,
                       const mole_rows_gradient<S, B>& gradient) {
    const bool quads = rows.rank % 4 == 0 && gradient.width % 4 == 0 &&
                       kernels::holds_quads(rows.u) && kernels::holds_quads(gradient.dz) &&
                       kernels::holds_quads(gradient.du);
    kernels::with_group(Selector::name, rows.logits.cols, [&](auto width, auto slots) {
      constexpr int w = decltype(width)::value, s = decltype(slots)::value;
      detail::launch<kernels::row_threads>(
          ctx, kernels::row_blocks(rows.logits.rows, kernels::rows_of_a_block<w>), 0,
          kernels::mole_route_backward_body<w, s, Selector, S, B>{selector, rows, gradient, quads});
    });
  }

 private:
  template <class S>
  static kernels::gate_ranks<S, B> gate_of(const mole_rows<S, B>& rows) {
    return {rows, rows.rank % 4 == 0 && rows.z.cols % 4 == 0 && kernels::holds_quads(rows.u) &&
                      kernels::holds_quads(rows.z)};
  }
};

}  // namespace talpa::ops
