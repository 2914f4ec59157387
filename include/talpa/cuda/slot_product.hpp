// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/row_run.hpp>
#include <talpa/core/view.hpp>
#include <talpa/cuda/kernel.hpp>
#include <talpa/cuda/quad.hpp>
#include <talpa/cuda/tensor_tile.hpp>
#include <talpa/cuda/tile_operand.hpp>
#include <talpa/ops/gemm.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>

// Products of the slots of each expert with its block of a stacked bank. Where the slots of an
// expert begin only the device knows, so each block of threads finds its expert from the offsets.

namespace talpa::kernels {

/// A tile [M, N] of a product by a block of 256 threads, through shared memory K terms at a time;
/// 4 x 4 sums a thread. Of narrow tiles several groups of threads sum every so many-th term each,
/// and the first adds up what they have in order.
template <class T, int M, int N, int K>
struct product_tile {
  static constexpr int threads = 256, m = M, n = N;

  static constexpr std::size_t shared_bytes() {
    const std::size_t slabs = sizeof(sum_quad) * K * a_stride + sizeof(T) * K * b_stride;
    return std::max(slabs, sizeof(T) * (groups - 1) * M * N);
  }

  /// put(m, n, sum over k < inner of a(m, k) b(n, k)) for m < M, n < N inside both operands, whose
  /// rows stand in order. All threads of the block call it together.
  template <class Block, class Put>
  TALPA_HD static void run(Block& block, const tile_operand<T>& a, const tile_operand<T>& b,
                           index inner, const Put& put) {
    sum_quad* const as = block.template shared<sum_quad>();  // [K, M / 4]
    T* const bs = reinterpret_cast<T*>(as + K * a_stride);   // [K, N]
    const int thread = block.thread();
    const int group = thread / group_threads, inside = thread % group_threads;
    const int row = inside / columns, col = inside % columns;
    T sum[4][4] = {};
    T next_a[M * K / threads], next_b[N * K / threads];
    reader<M> of_a(a, thread);
    reader<N> of_b(b, thread);
    of_a.fetch(inner, next_a);
    of_b.fetch(inner, next_b);
    for (index left = inner; left > 0; left -= K) {
      TALPA_UNROLL
      for (int i = 0; i < M * K / threads; ++i) {
        const int outer = of_a.outer_of(i);
        as[of_a.inner_of(i) * a_stride + outer / 4].values[outer % 4] = next_a[i];
      }
      TALPA_UNROLL
      for (int i = 0; i < N * K / threads; ++i) {
        bs[of_b.inner_of(i) * b_stride + of_b.outer_of(i)] = next_b[i];
      }
      block.sync();
      of_a.fetch(left - K, next_a);
      of_b.fetch(left - K, next_b);
      TALPA_UNROLL
      for (int k = 0; k < K; k += groups) {
        const sum_quad x = as[(k + group) * a_stride + row];
        TALPA_UNROLL
        for (int j = 0; j < 4; ++j) {
          const T y = bs[(k + group) * b_stride + col + j * columns];
          TALPA_UNROLL
          for (int i = 0; i < 4; ++i) sum[i][j] += x.values[i] * y;
        }
      }
      block.sync();
    }
    if constexpr (groups > 1) {
      T* const others = block.template shared<T>();  // [groups - 1, 16, group_threads]
      if (group > 0) {
        TALPA_UNROLL
        for (int i = 0; i < 16; ++i) {
          others[((group - 1) * 16 + i) * group_threads + inside] = sum[i / 4][i % 4];
        }
      }
      block.sync();
      if (group > 0) return;
      for (int g = 0; g < groups - 1; ++g) {
        TALPA_UNROLL
        for (int i = 0; i < 16; ++i) {
          sum[i / 4][i % 4] += others[(g * 16 + i) * group_threads + inside];
        }
      }
    }
    TALPA_UNROLL
    for (int i = 0; i < 4; ++i) {
      TALPA_UNROLL
      for (int j = 0; j < 4; ++j) {
        const int to_m = 4 * row + i, to_n = col + j * columns;
        if (to_m < a.outer && to_n < b.outer) put(to_m, to_n, sum[i][j]);
      }
    }
  }

 private:
  /// Four neighbours, read from shared memory at once.
  struct alignas(16) sum_quad {
    T values[4];
  };
  // One more a row keeps threads that store neighbours of k off each other's banks.
  static constexpr int a_stride = M / 4 + 1, b_stride = N + 1;
  static constexpr int columns = N / 4, group_threads = M / 4 * columns,
                       groups = threads / group_threads;
  static_assert(threads % group_threads == 0 && K % groups == 0 && M * K % threads == 0 &&
                N * K % threads == 0);

  /// What a thread fetches of an operand, slab after slab: neighbouring threads, neighbouring
  /// addresses.
  template <int Size>
  struct reader {
    const tile_operand<T>& of;
    const T* from;
    index element_step, slab_step, slab = 0;
    int outer, inner, outer_step, inner_step, outer_end;

    TALPA_HD reader(const tile_operand<T>& o, int thread) : of(o) {
      const bool along = o.inner_step == 1;
      outer = along ? thread / K : thread % Size;
      inner = along ? thread % K : thread / Size;
      outer_step = along ? threads / K : 0;
      inner_step = along ? 0 : threads / Size;
      outer_end = o.outer < Size ? static_cast<int>(o.outer) : Size;
      from = o.data + outer * o.outer_step + inner * o.inner_step;
      element_step = outer_step * o.outer_step + inner_step * o.inner_step;
      slab_step = K * o.inner_step;
    }
    TALPA_HD int outer_of(int i) const { return outer + i * outer_step; }
    TALPA_HD int inner_of(int i) const { return inner + i * inner_step; }
    /// The next slab, of which `left` terms exist; zeros for what does not.
    TALPA_HD void fetch(index left, T (&to)[Size * K / threads]) {
      const int inner_end = left < K ? static_cast<int>(left) : K;
      TALPA_UNROLL
      for (int i = 0; i < Size * K / threads; ++i) {
        const bool there = outer_of(i) < outer_end && inner_of(i) < inner_end;
        to[i] = there ? (of.rows == nullptr ? from[i * element_step] : by_row(i)) : T{0};
      }
      from += slab_step;
      slab += K;
    }
    TALPA_HD T by_row(int i) const {
      const index term = slab + inner_of(i);
      return of.by_inner ? of.data[outer_of(i) * of.outer_step + of.rows[term] * of.inner_step]
                         : of.data[of.rows[outer_of(i)] * of.outer_step + term * of.inner_step];
    }
  };
};

/// f(tile) with the tile for products of which one side has `narrow` elements. AlongA, AlongB: as
/// tensor_tile says; tiles of whole numbers find out themselves.
template <class S, bool AlongA, bool AlongB, class F>
void with_product_tile(index narrow, F f) {
  if constexpr (half_storage<S>) {
    if (narrow <= 32) {
      f(tensor_tile<S, 128, 32, AlongA, AlongB>{});
    } else {
      f(tensor_tile<S, 128, 128, AlongA, AlongB>{});
    }
  } else if (narrow <= 16) {
    f(product_tile<S, 64, 16, 32>{});
  } else {
    f(product_tile<S, 64, 64, 16>{});
  }
}

/// Puts sums into a block of c, or adds them to what is there. With Turned rows of the tile are
/// columns of c.
template <class C, class Sum, bool Turned>
struct block_writer {
  C* c;  // element (0, 0) of the block
  index stride;
  bool keeps, quads;

  template <class B>
  TALPA_HD block_writer(matrix_view<C, B> of, index row, index col, bool keeps_)
      : c(of.row(row) + col),
        stride(of.stride),
        keeps(keeps_),
        quads(stride % 4 == 0 && reinterpret_cast<std::uintptr_t>(c) % (4 * sizeof(C)) == 0) {}

  TALPA_HD void operator()(int m, int n, Sum sum) const {
    C& to = Turned ? c[n * stride + m] : c[m * stride + n];
    to = static_cast<C>(keeps ? static_cast<Sum>(to) + sum : sum);
  }
  TALPA_HD void four(int m, int n, const quad<Sum>& sums) const {
    if (Turned || !quads) {
      TALPA_UNROLL
      for (int j = 0; j < 4; ++j) (*this)(m, n + j, sums.v[j]);
      return;
    }
    C* const to = c + m * stride + n;
    quad<C> result{};
    if (keeps) result = load_quad(to);
    TALPA_UNROLL
    for (int j = 0; j < 4; ++j) {
      result.v[j] = static_cast<C>(keeps ? static_cast<Sum>(result.v[j]) + sums.v[j] : sums.v[j]);
    }
    store_quad(to, result);
  }
};

/// Bank rows of group e, all groups alike.
struct equal_blocks {
  index rows;
  TALPA_HD index first(index e) const { return e * rows; }
};
/// Bank rows of group e: [starts[e], starts[e + 1]).
struct unequal_blocks {
  const index* starts;
  TALPA_HD index first(index e) const { return starts[e]; }
};

/// Rows of a matrix by slot: slot s is row rows[s], or row s where there are no `rows`.
template <class S, class B>
struct slot_rows {
  matrix_view<const S, B> of;
  const std::int32_t* rows = nullptr;

  /// Operand whose rows are the slots from `first` on, as outer or as inner dimension; from column
  /// `col`.
  TALPA_HD tile_operand<S> outer(index first, index slots) const {
    if (rows == nullptr) return {of.row(first), of.stride, 1, slots};
    return {of.data, of.stride, 1, slots, rows + first};
  }
  TALPA_HD tile_operand<S> inner(index first, index col, index cols) const {
    if (rows == nullptr) return {of.row(first) + col, 1, of.stride, cols};
    return {of.data + col, 1, of.stride, cols, rows + first, true};
  }
};

/// Tile `block` of a grid of tiles: panels of 16 rows of tiles, in a panel column by column, so
/// that the tiles that run together share rows and columns alike.
struct tile_place {
  index row, column;

  TALPA_HD tile_place(index block, index rows, index columns) {
    constexpr index panel = 16;
    const index first = block / (panel * columns) * panel;
    const index height = rows - first < panel ? rows - first : panel;
    row = first + block % (panel * columns) % height;
    column = block % (panel * columns) / height;
  }
};

/// c_s (+)= a_s op(block of its group). The tiles of group e are those from offsets[e] / M + e on:
/// its slots need no more of them than lie in front of those of group e + 1. So S / M + E tiles
/// suffice, and the group of one is found by bisection.
template <class S, class C, class B, class Blocks, class Tile>
struct slot_product {
  vector_view<const index, B> offsets;
  Blocks blocks;
  slot_rows<S, B> a;
  matrix_view<const S, B> bank;
  bool transposed;
  matrix_view<C, B> c;
  bool keeps;
  index row_tiles, column_tiles;

  template <class Block>
  TALPA_HD void operator()(Block& block) const {
    const tile_place place(block.index(), row_tiles, column_tiles);
    const index tile = place.row, col = place.column * Tile::n;
    index e = 0, beyond = offsets.size - 1;
    while (beyond - e > 1) {
      const index middle = (e + beyond) / 2;
      (offsets[middle] / Tile::m + middle <= tile ? e : beyond) = middle;
    }
    const index first = offsets[e] + (tile - offsets[e] / Tile::m - e) * Tile::m;
    const index last = offsets[e + 1] < c.rows ? offsets[e + 1] : c.rows;
    const index bank_row = blocks.first(e), rows = blocks.first(e + 1) - bank_row;
    const index outer = transposed ? rows : bank.cols;
    if (first >= last || col >= outer) return;
    const tile_operand<S> right{transposed ? bank.row(bank_row + col) : bank.row(bank_row) + col,
                                transposed ? bank.stride : 1, transposed ? 1 : bank.stride,
                                outer - col};
    Tile::run(block, a.outer(first, last - first), right, transposed ? bank.cols : rows,
              block_writer<C, sum_type<S>, false>(c, first, col, keeps));
  }
};

template <class S, class C, class B, class Blocks>
void multiply_slots(context<B>& ctx, vector_view<const index, B> offsets, const Blocks& blocks,
                    const slot_rows<S, B>& a, matrix_view<const S, B> bank, transpose tb,
                    matrix_view<C, B> c, bool keeps) {
  if (c.empty() || offsets.size < 2) return;
  const auto run = [&](auto tile) {
    using tile_type = decltype(tile);
    const index row_tiles = c.rows / tile_type::m + offsets.size - 1;
    const index column_tiles = ceil_div(c.cols, tile_type::n);
    detail::launch<tile_type::threads>(
        ctx, row_tiles * column_tiles, tile_type::shared_bytes(),
        slot_product<S, C, B, Blocks, tile_type>{offsets, blocks, a, bank, tb == transpose::yes, c,
                                                 keeps, row_tiles, column_tiles});
  };
  if (tb == transpose::yes) {
    with_product_tile<S, true, true>(c.cols, run);
  } else {
    with_product_tile<S, true, false>(c.cols, run);
  }
}

/// Rows of `run` of the bank's gradient += a_e^T b_e, the slots of a group in order; with Turned
/// the columns of b are on the long side of a tile.
template <class S, class B, class Blocks, class Tile, bool Turned>
struct slot_product_gradient {
  vector_view<const index, B> offsets;
  Blocks blocks;
  matrix_view<const S, B> a;
  slot_rows<S, B> b;
  row_run run;
  matrix_view<sum_type<S>, B> dbank;
  index first_group;
  index row_tiles, column_tiles;

  template <class Block>
  TALPA_HD void operator()(Block& block) const {
    const index tile = block.index() % (row_tiles * column_tiles);
    const index e = first_group + block.index() / (row_tiles * column_tiles);
    const index begin = blocks.first(e), end = blocks.first(e + 1);
    const index from = (begin > run.first ? begin : run.first) +
                       tile / column_tiles * (Turned ? Tile::n : Tile::m);
    const index to = end < run.first + run.rows ? end : run.first + run.rows;
    const index col = tile % column_tiles * (Turned ? Tile::m : Tile::n);
    // No further than the rows there are, whatever the routing counted.
    const index last = offsets[e + 1] < a.rows ? offsets[e + 1] : a.rows;
    const index first = offsets[e], slots = last - first;
    if (from >= to || slots <= 0) return;
    const tile_operand<S> of_a{a.row(first) + (from - begin), 1, a.stride, to - from};
    const tile_operand<S> of_b = b.inner(first, col, b.of.cols - col);
    Tile::run(block, Turned ? of_b : of_a, Turned ? of_a : of_b, slots,
              block_writer<sum_type<S>, sum_type<S>, Turned>(
                  dbank, run.grad_first + from - run.first, col, true));
  }
};

/// For the groups [first_group, first_group + groups), of which each has at most a.cols rows.
template <class S, class B, class Blocks>
void add_slot_products(context<B>& ctx, vector_view<const index, B> offsets, const Blocks& blocks,
                       matrix_view<const S, B> a, const slot_rows<S, B>& b, const row_run& run,
                       matrix_view<sum_type<S>, B> dbank, index first_group, index groups) {
  if (run.rows == 0 || dbank.empty() || a.empty()) return;
  with_product_tile<S, false, false>(a.cols, [&](auto tile) {
    using tile_type = decltype(tile);
    constexpr bool turned = tile_type::n < tile_type::m;
    const index row_tiles = ceil_div(a.cols, turned ? tile_type::n : tile_type::m);
    const index column_tiles = ceil_div(b.of.cols, turned ? tile_type::m : tile_type::n);
    detail::launch<tile_type::threads>(
        ctx, groups * row_tiles * column_tiles, tile_type::shared_bytes(),
        slot_product_gradient<S, B, Blocks, tile_type, turned>{
            offsets, blocks, a, b, run, dbank, first_group, row_tiles, column_tiles});
  });
}

}  // namespace talpa::kernels
