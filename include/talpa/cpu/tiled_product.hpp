// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/view.hpp>
#include <talpa/core/workspace.hpp>
#include <talpa/cpu/context.hpp>
#include <talpa/cpu/parallel.hpp>
#include <talpa/cpu/register_tile.hpp>
#include <talpa/cpu/transpose_rows.hpp>
#include <talpa/ops/gemm.hpp>

#include <algorithm>
#include <concepts>

namespace talpa::detail {

/// Most of K that a tile sums before it goes to c: each further piece of K reads and writes c once
/// more.
template <class T>
inline constexpr index tile_depth = 3072 / static_cast<index>(sizeof(T));
/// Most rows of c in one task: its block of a, tile_depth deep, stays in L2.
inline constexpr index tile_task_rows = 140;
/// Most of K and of the columns of b that are packed at a time, so that a product takes at most
/// 8 MiB of scratch in floats for it.
inline constexpr index packed_depth = 4096;
inline constexpr index packed_cols = 512;

/// Length of the pieces of `size`, as equal as multiples of `unit` allow, each at most `most`.
inline index piece(index size, index most, index unit) {
  const index pieces = std::max<index>(1, ceil_div(size, most));
  return ceil_div(ceil_div(size, pieces), unit) * unit;
}

/// Rows that pack_panel turns at a time.
inline constexpr index packed_side = 4;

/// out[l * Width + i] = source(row + i, k + l) for i < packed_side and a cache line of l.
template <index Width, class T>
[[gnu::always_inline]] inline void pack_lines(matrix_view<const T, cpu> source, index row, index k,
                                              T* out) {
  constexpr index side = packed_side;
  typedef T vector __attribute__((vector_size(side * sizeof(T))));
  unrolled<panel_width<T> / side>([&](auto part) __attribute__((always_inline)) {
    constexpr index at = part * side;
    vector block[side];
    unrolled<side>([&](auto i) __attribute__((always_inline)) {
      __builtin_memcpy(&block[i], source.row(row + i) + k + at, sizeof(vector));
    });
    transpose_rows<side>(block);
    unrolled<side>([&](auto l) __attribute__((always_inline)) {
      __builtin_memcpy(out + (at + l) * Width, &block[l], sizeof(vector));
    });
  });
}

/// out[k][0..Width) = element k of vectors first, first + 1, ... of `source`, zero from `count` on,
/// for k in [k0, k0 + depth). The vectors are rows of the source if `rows`, else its columns.
template <index Width, class T>
void pack_panel(matrix_view<const T, cpu> source, bool rows, index first, index count, index k0,
                index depth, T* out) {
  const index some = std::min(Width, count);
  if (some < Width) std::fill_n(out, depth * Width, T{0});
  if (!rows) {
    for (index k = 0; k < depth; ++k) {
      const T* const from = source.row(k0 + k) + first;
      if (some == Width) {
        __builtin_memcpy(out + k * Width, from, Width * sizeof(T));
      } else {
        for (index i = 0; i < some; ++i) out[k * Width + i] = from[i];
      }
    }
    return;
  }
  // A cache line of each row at a time: strides that are powers of two share few sets of L1.
  constexpr index line = panel_width<T>, side = packed_side;
  constexpr bool turns = side * static_cast<index>(sizeof(T)) <= pack_bytes;
  for (index k = 0; k < depth; k += line) {
    const index length = std::min(line, depth - k);
    T* const to = out + k * Width;
    if constexpr (turns) {
      if (length == line && some >= side) {
        index i = 0;
        for (; i + side <= some; i += side) pack_lines<Width>(source, first + i, k0 + k, to + i);
        // The last ones with some that are packed already.
        if (i < some) pack_lines<Width>(source, first + some - side, k0 + k, to + some - side);
        continue;
      }
    }
    for (index i = 0; i < some; ++i) {
      const T* const from = source.row(first + i) + k0 + k;
      for (index l = 0; l < length; ++l) to[l * Width + i] = from[l];
    }
  }
}

/// Elements of panels of `cols` columns.
template <class T, class Stored = T>
index packed_size(index depth, index cols) {
  return ceil_div(cols, panel_width<T>) * panel_width<T> * stored_depth<Stored>(depth);
}

/// Rows [k0, k0 + depth) and columns [first, first + cols) of op(b) as panels, one after the other:
/// [depth, panel_width], or of bfloat16 [ceil(depth / 2), panel_width, 2].
template <class T, class Stored>
void pack_panels(context<cpu>& ctx, matrix_view<const T, cpu> b, transpose tb, index first,
                 index cols, index k0, index depth, Stored* out) {
  constexpr index width = panel_width<T>;
  constexpr bool rounds = !std::same_as<T, Stored>;
  const index size = packed_size<T, Stored>(depth, width);
  const workspace<cpu>::scope scope(ctx.scratch);
  const auto exact = ctx.scratch.take<T>(ctx.threads, rounds ? size : 0);
  parallel_for_blocks(ctx, ceil_div(cols, width), 8, [&](index panel, index panels, int thread) {
    for (index p = panel; p < panel + panels; ++p) {
      const auto pack = [&](T* values) {
        pack_panel<width, T>(b, tb == transpose::yes, first + p * width,
                             std::min(width, cols - p * width), k0, depth, values);
      };
      if constexpr (rounds) {
        T* const values = exact.row(thread);
        pack(values);
        std::fill(values + depth * width, values + size, T{0});
        Stored* to = out + p * size;
        for (index k = 0; k < depth; k += 2) {
          for (index j = 0; j < width; ++j) {
            for (index half = 0; half < 2; ++half) *to++ = Stored(values[(k + half) * width + j]);
          }
        }
      } else {
        pack(out + p * size);
      }
    }
  });
}

/// How a product is cut into tasks. Cuts of rows and columns change no bit of the result, so they
/// depend on the number of threads; those of K, which come after an even number of it, do not.
template <class T, class Tile>
struct tile_tasks_of {
  tile_tasks_of(index m, index n, index k, index threads)
      : depth(piece(k, tile_depth<T>, 2)), tiles_(ceil_div(m, Tile::rows)) {
    // What it takes to pack a row of tiles, as a share of the time of one tile.
    constexpr double packing = 0.7;
    const index tiles_across = std::max<index>(1, ceil_div(n, Tile::cols));
    const index fewest = std::max<index>(1, ceil_div(tiles_, tile_task_rows / Tile::rows));
    const index most = std::max(fewest, std::min(tiles_, fewest + threads));
    double best = 0.0;
    for (index across = 1; across <= std::min(threads, tiles_across); across *= 2) {
      const index wide = ceil_div(tiles_across, across);
      for (index down = fewest; down <= most; ++down) {
        const index turns = ceil_div(down * ceil_div(tiles_across, wide), threads);
        const double time = static_cast<double>(turns * ceil_div(tiles_, down)) *
                            (static_cast<double>(wide) + packing);
        if (best != 0.0 && time >= best) continue;
        best = time;
        row_tasks = down;
        cols = wide * Tile::cols;
      }
    }
    col_tasks = ceil_div(n, cols);
  }
  /// First row of a task; the rows of all are as many tiles as those of another, or one more.
  index first_row(index row_task) const { return row_task * tiles_ / row_tasks * Tile::rows; }
  /// Elements of the packed block of a that each thread needs.
  index block_size() const { return ceil_div(tiles_, row_tasks) * Tile::rows * depth; }

  index depth, row_tasks = 1, cols = 0, col_tasks = 0;

 private:
  index tiles_;
};

/// All rows of a task and some of its columns, whose product is complete and lies in L2.
struct finished_block {
  index row, rows, col, cols;
  index col_task;  ///< the piece of the columns of c that it belongs to
  index at;        ///< its first column in this piece, a multiple of the width asked for
};

/// c = alpha op(a) b + beta c with b packed by pack_panels, k > 0; then done(block) for blocks that
/// make up c, each `width` columns wide, a multiple of a tile's, but for the last of a piece.
/// `before`, where there is one, is called for the rows of each task before a is read, which is
/// once for each row where columns are in one piece.
template <class T, class Stored, class Tile = stored_tile<T, Stored>, class Done>
void panel_product(context<cpu>& ctx, T alpha, matrix_view<const T, cpu> a, transpose ta,
                   const Stored* b, index k, T beta, matrix_view<T, cpu> c, index width,
                   const Done& done, const row_function& before = {}) {
  constexpr index panel_cols = panel_width<T>;
  const tile_tasks_of<T, Tile> cut(c.rows, c.cols, k, ctx.threads);
  const workspace<cpu>::scope scope(ctx.scratch);
  const auto blocks = ctx.scratch.take<T>(ctx.threads, cut.block_size());

  parallel_for(ctx, cut.row_tasks * cut.col_tasks, [&](index task, int thread) {
    const index row = cut.first_row(task / cut.col_tasks);
    const index col = task % cut.col_tasks * cut.cols;
    const index rows = std::min(c.rows, cut.first_row(task / cut.col_tasks + 1)) - row;
    const index cols = std::min(cut.cols, c.cols - col);
    T* const block = blocks.row(thread);
    if (before) before(row, rows, thread);
    for (index k0 = 0; k0 < k; k0 += cut.depth) {
      const index depth = std::min(cut.depth, k - k0);
      const T kept = k0 == 0 ? beta : T{1};
      const index deep = stored_depth<Stored>(depth);
      for (index i = 0; i < rows; i += Tile::rows) {
        T* const to = block + i * deep;
        pack_panel<Tile::rows, T>(a, ta == transpose::no, row + i, std::min(Tile::rows, rows - i),
                                  k0, depth, to);
        std::fill(to + depth * Tile::rows, to + deep * Tile::rows, T{0});
      }
      const auto panels_at = [&](index column, index from_k) {
        return b + column * stored_depth<Stored>(k) + from_k * panel_cols;
      };
      // What the tiles of some rows fetch of the panels that are read after these.
      const index tiles = ceil_div(rows, Tile::rows);
      const index share = deep * panel_cols * static_cast<index>(sizeof(Stored)) / tiles;
      const index step = ceil_div(share, ceil_div(deep, 2));
      for (index j = 0; j < cols; j += Tile::cols) {
        const index tile_cols = std::min(Tile::cols, cols - j);
        const Stored* panel[Tile::panels];
        for (index p = 0; p < Tile::panels; ++p) {
          // A tile that ends within its first panel reads that one twice and drops the second sums.
          panel[p] = panels_at(col + j + (p * panel_cols < tile_cols ? p * panel_cols : 0), k0);
        }
        // Those of the next piece of K, or of the next task, begin in the first column.
        const Stored* const after = j + Tile::cols < cols
                                        ? panels_at(col + j + Tile::cols, k0)
                                        : panels_at(col, k0 + depth < k ? k0 + depth : 0);
        for (index i = 0; i < rows; i += Tile::rows) {
          const index tile_rows = std::min(Tile::rows, rows - i);
          T* const out = c.row(row + i) + col + j;
          const panel_share next{reinterpret_cast<const char*>(after) + i / Tile::rows * share,
                                 step};
          if (tile_rows == Tile::rows && tile_cols == Tile::cols) {
            Tile::run(deep, block + i * deep, panel, alpha, kept, out, c.stride, next);
          } else {
            Tile::run_edge(deep, block + i * deep, panel, alpha, kept, out, c.stride, tile_rows,
                           tile_cols, next);
          }
        }
        const index end = j + tile_cols;
        if (k0 + depth == k && (end % width == 0 || end == cols)) {
          const index at = (end - 1) / width * width;
          done(finished_block{row, rows, col + at, end - at, task % cut.col_tasks, at});
        }
      }
    }
  });
}

/// The product alone. Not inlined, so that a program may instantiate it in one place.
template <class T, class Stored>
void panel_product(context<cpu>& ctx, T alpha, matrix_view<const T, cpu> a, transpose ta,
                   const Stored* b, index k, T beta, matrix_view<T, cpu> c);

template <class T, class Stored>
void panel_product(context<cpu>& ctx, T alpha, matrix_view<const T, cpu> a, transpose ta,
                   const Stored* b, index k, T beta, matrix_view<T, cpu> c) {
  panel_product<T>(ctx, alpha, a, ta, b, k, beta, c, c.cols, [](const finished_block&) {});
}

/// Bytes of scratch that tiled_product takes at most for a c of any rows and n columns with a K of
/// at most k.
template <class T>
std::size_t tiled_bytes(int threads, index n, index k) {
  constexpr index unit = workspace<cpu>::alignment;
  // A piece of b is at most packed_depth deep and, but for whole panels, as large as said there.
  const index deep = std::min(k, packed_depth);
  const index panels =
      std::min(packed_size<T>(deep, n), packed_depth * (packed_cols + register_tile<T>::cols));
  const index rows = tile_task_rows + register_tile<T>::rows;
  const auto bytes = [](index elements) {
    return ceil_div(elements * static_cast<index>(sizeof(T)), unit) * unit;
  };
  return static_cast<std::size_t>(bytes(panels) +
                                  bytes(threads * rows * std::min(k + 1, tile_depth<T>)));
}

/// c = alpha op(a) op(b) + beta c, k > 0, b packed piece by piece into scratch.
template <class T>
void tiled_product(context<cpu>& ctx, T alpha, matrix_view<const T, cpu> a, transpose ta,
                   matrix_view<const T, cpu> b, transpose tb, T beta, matrix_view<T, cpu> c) {
  const index k = cols_of(a, ta);
  const workspace<cpu>::scope scope(ctx.scratch);
  const index depth = piece(k, packed_depth, 1);
  const index cols = piece(c.cols, std::max(packed_cols, packed_depth * packed_cols / depth),
                           register_tile<T>::cols);
  const auto panels =
      ctx.scratch.take<T>(packed_size<T>(std::min(depth, k), std::min(cols, c.cols)));
  for (index col = 0; col < c.cols; col += cols) {
    const index some_cols = std::min(cols, c.cols - col);
    for (index k0 = 0; k0 < k; k0 += depth) {
      const index some = std::min(depth, k - k0);
      pack_panels<T>(ctx, b, tb, col, some_cols, k0, some, panels.data);
      panel_product<T>(ctx, alpha,
                       ta == transpose::no ? a.col_range(k0, some) : a.row_range(k0, some), ta,
                       panels.data, some, k0 == 0 ? beta : T{1}, c.col_range(col, some_cols));
    }
  }
}

}  // namespace talpa::detail
