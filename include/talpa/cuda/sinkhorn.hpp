// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/math.hpp>
#include <talpa/cuda/loops.hpp>
#include <talpa/cuda/routable_rows.hpp>
#include <talpa/ops/sinkhorn.hpp>

#include <algorithm>
#include <cstdint>
#include <limits>

namespace talpa::kernels {

/// Tokens whose columns are summed in order, then the sums of such blocks.
inline constexpr index sinkhorn_block_rows = 256;
/// Threads of a block: one for each of these tokens; and of the only block of a small problem.
inline constexpr int sinkhorn_threads = 256;
inline constexpr int sinkhorn_many_threads = 1024;
/// Up to this many logits one block of threads runs all iterations and stops when it may. Beyond,
/// each iteration is launched, and those after the last have nothing to do.
inline constexpr index sinkhorn_small = index{1} << 18;

/// What an iteration works on. Logits count from the largest of their row.
template <class T, class B>
struct sinkhorn_state {
  matrix_view<const T, B> logits;
  vector_view<T, B> row;              // [N] relative to top while it runs
  vector_view<T, B> column;           // [E]
  vector_view<std::uint8_t, B> part;  // [N] whether a token takes part
  vector_view<T, B> top;              // [N] its largest logit, 0 for the others
  matrix_view<T, B> peak;             // [blocks, E] largest exponent of a block
  matrix_view<T, B> sum;              // [blocks, E] of exponentials relative to it
  vector_view<double, B> change;      // [E] of a column's scale
  vector_view<T, B> share;            // [1] of the logarithm of a row's sum
  vector_view<int, B> going;          // [1] whether there is something left to do
  double tolerance;

  TALPA_HD index blocks() const { return peak.rows; }

  /// The scales of the rows of blocks first .. last - 1, then the sums of their columns.
  template <class Block>
  TALPA_HD void scale_rows(Block& block, index first, index last) const {
    const index end =
        last * sinkhorn_block_rows < logits.rows ? last * sinkhorn_block_rows : logits.rows;
    for (index n = first * sinkhorn_block_rows + block.thread(); n < end; n += Block::threads()) {
      if (part[n] != 0) row[n] = share[0] - log_sum(n);
    }
    block.sync();
    for (index i = block.thread(); i < (last - first) * logits.cols; i += Block::threads()) {
      sum_column(first + i / logits.cols, i % logits.cols);
    }
  }

  /// The scales of the columns from the sums of blocks, and whether they changed enough to go on.
  template <class Block>
  TALPA_HD void scale_columns(Block& block) const {
    const index experts = logits.cols;
    const T column_share = -math::log(static_cast<T>(experts));
    for (index e = block.thread(); e < experts; e += Block::threads()) {
      change[e] = scale_column(e, column_share);
    }
    block.sync();
    if (block.thread() == 0) {
      double all = 0.0;
      for (index e = 0; e < experts; ++e) all = all + change[e];
      if (all <= tolerance * static_cast<double>(experts)) going[0] = 0;
    }
  }

 private:
  TALPA_HD T exponent(index n, index e) const { return (logits(n, e) - top[n]) + row[n]; }

  /// log sum_e exp(u_e - top + c_e).
  TALPA_HD T log_sum(index n) const {
    const T highest = top[n];
    T most = -std::numeric_limits<T>::infinity(), total = 0;
    for (index e = 0; e < logits.cols; ++e) {
      const T x = (logits(n, e) - highest) + column[e];
      most = x > most ? x : most;
    }
    for (index e = 0; e < logits.cols; ++e) {
      total = total + math::exp(((logits(n, e) - highest) + column[e]) - most);
    }
    return most + math::log(total);
  }

  TALPA_HD void sum_column(index b, index e) const {
    const index first = b * sinkhorn_block_rows;
    const index last =
        first + sinkhorn_block_rows < logits.rows ? first + sinkhorn_block_rows : logits.rows;
    T most = -std::numeric_limits<T>::infinity(), total = 0;
    for (index n = first; n < last; ++n) {
      if (part[n] == 0) continue;
      const T x = exponent(n, e);
      most = x > most ? x : most;
    }
    if (most > -std::numeric_limits<T>::infinity()) {
      for (index n = first; n < last; ++n) {
        if (part[n] != 0) total = total + math::exp(exponent(n, e) - most);
      }
    }
    peak(b, e) = most;
    sum(b, e) = total;
  }

  /// Returns by how much it changed.
  TALPA_HD double scale_column(index e, T column_share) const {
    T most = -std::numeric_limits<T>::infinity(), total = 0;
    for (index b = 0; b < blocks(); ++b) most = peak(b, e) > most ? peak(b, e) : most;
    // Nobody can be sent to this expert.
    if (!(most > -std::numeric_limits<T>::infinity())) return 0.0;
    for (index b = 0; b < blocks(); ++b) {
      total = math::fma(sum(b, e), math::exp(peak(b, e) - most), total);
    }
    const T next = column_share - (most + math::log(total));
    const double difference =
        math::exp(static_cast<double>(next)) - math::exp(static_cast<double>(column[e]));
    column[e] = next;
    return difference < 0.0 ? -difference : difference;
  }
};

/// The largest logits of the tokens that take part, and scales of zero.
template <class T, class B>
struct sinkhorn_rows {
  sinkhorn_state<T, B> state;

  template <class Warp>
  TALPA_HD void operator()(const Warp& warp, index n) const {
    const T most =
        warp.template max<T>(state.logits.cols, [&](index e) { return state.logits(n, e); });
    if (warp.lane() != 0) return;
    state.top[n] = state.part[n] != 0 ? most : T{0};
    state.row[n] = T{0};
  }
};

/// Counts those tokens; one warp.
template <class T, class B>
struct sinkhorn_start {
  sinkhorn_state<T, B> state;

  template <class Warp>
  TALPA_HD void operator()(const Warp& warp, index) const {
    const index count = warp.template sum<index>(
        state.part.size, [&](index n) { return static_cast<index>(state.part[n]); });
    warp.for_each(state.column.size, [&](index e) { state.column[e] = T{0}; });
    if (warp.lane() != 0) return;
    state.share[0] = count > 0 ? -math::log(static_cast<T>(count)) : T{0};
    state.going[0] = count > 0 ? 1 : 0;
  }
};

/// All iterations, by one block of threads.
template <class T, class B>
struct sinkhorn_loop {
  sinkhorn_state<T, B> state;
  index iterations;

  template <class Block>
  TALPA_HD void operator()(Block& block) const {
    for (index i = 0; i < iterations && state.going[0] != 0; ++i) {
      state.scale_rows(block, 0, state.blocks());
      block.sync();
      state.scale_columns(block);
      block.sync();
    }
  }
};

/// One iteration: the rows, by a block of threads for each block of rows, and the columns, by one.
template <class T, class B>
struct sinkhorn_scale_rows {
  sinkhorn_state<T, B> state;

  template <class Block>
  TALPA_HD void operator()(Block& block) const {
    if (state.going[0] != 0) state.scale_rows(block, block.index(), block.index() + 1);
  }
};
template <class T, class B>
struct sinkhorn_scale_columns {
  sinkhorn_state<T, B> state;

  template <class Block>
  TALPA_HD void operator()(Block& block) const {
    const bool goes_on = state.going[0] != 0;
    block.sync();  // one thread changes it below
    if (goes_on) state.scale_columns(block);
  }
};

}  // namespace talpa::kernels

namespace talpa::ops {

template <kernel_backend B>
struct sinkhorn_impl<B> {
  template <class T>
  static void run(context<B>& ctx, matrix_view<const T, B> logits,
                  vector_view<const std::uint8_t, B> padding_mask, double tolerance,
                  index iterations, vector_view<T, B> row, matrix_view<T, B> column) {
    const index tokens = logits.rows, experts = logits.cols;
    const index blocks = ceil_div(tokens, kernels::sinkhorn_block_rows);
    const typename workspace<B>::scope scope(ctx.scratch);
    kernels::sinkhorn_state<T, B> state{};
    state.logits = logits;
    state.row = row;
    state.column = {column.data, experts};
    state.part = kernels::routable_rows(ctx, logits, padding_mask);
    state.top = ctx.scratch.template take<T>(tokens);
    state.peak = ctx.scratch.template take<T>(blocks, experts);
    state.sum = ctx.scratch.template take<T>(blocks, experts);
    state.change = ctx.scratch.template take<double>(experts);
    state.share = ctx.scratch.template take<T>(1);
    state.going = ctx.scratch.template take<int>(1);
    state.tolerance = tolerance;

    kernels::for_each_row(ctx, tokens, kernels::sinkhorn_rows<T, B>{state});
    kernels::for_each_row(ctx, 1, kernels::sinkhorn_start<T, B>{state});
    if (tokens == 0 || experts == 0) return;
    if (tokens * experts <= kernels::sinkhorn_small) {
      detail::launch<kernels::sinkhorn_many_threads>(
          ctx, 1, 0, kernels::sinkhorn_loop<T, B>{state, iterations});
    } else {
      for (index i = 0; i < iterations; ++i) {
        detail::launch<kernels::sinkhorn_threads>(ctx, blocks, 0,
                                                  kernels::sinkhorn_scale_rows<T, B>{state});
        detail::launch<kernels::sinkhorn_threads>(ctx, 1, 0,
                                                  kernels::sinkhorn_scale_columns<T, B>{state});
      }
    }
    // Count from zero again.
    const vector_view<T, B> top = state.top;
    kernels::for_each_element(ctx, 1, tokens,
                              [=] TALPA_DEVICE(index, index n) { row[n] = row[n] - top[n]; });
  }
};

}  // namespace talpa::ops
