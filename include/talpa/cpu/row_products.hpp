// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/view.hpp>
#include <talpa/cpu/indexed_tile.hpp>
#include <talpa/cpu/tiled_product.hpp>

#include <algorithm>
#include <cstdint>

// Products with few rows on one side, by the loops of indexed_tile. Rows are what a function of
// their number returns a pointer to. What depends on the width of a register has the tile among its
// template parameters, so that no two widths share a name.

namespace talpa::detail {

/// Bytes of a sum of outer products: it stays in L1.
inline constexpr index outer_sum_bytes = 16384;

/// Fetches lines from an address on, be they there or not.
template <index Lines>
void prefetch(std::uintptr_t from) {
  unrolled<Lines>([&](auto line) __attribute__((always_inline)) {
    constexpr auto bytes = static_cast<std::uintptr_t>(line * panel_bytes);
    __builtin_prefetch(reinterpret_cast<const void*>(from + bytes));
  });
}

/// Bytes of a row that inner products read at a time, so that pieces of rows of the bank stay in
/// L1; how many rows of the bank, in blocks of a tile, and for how many blocks of rows.
inline constexpr index inner_piece_bytes = 1536;
inline constexpr index inner_bank_blocks = 2, inner_row_blocks = 6;

/// sum + left[0] right[0] + left[1] right[1] + ... Not inlined: multiply-adds may be made of it in
/// one place and not in another, and every caller is to get the same bits.
template <class T>
[[gnu::noinline]] T add_inner(T sum, const T* left, const T* right, index count) {
  for (index d = 0; d < count; ++d) sum += left[d] * right[d];
  return sum;
}

/// put(i, r, the inner product of row(i) and row r of the bank) for i < count.
template <class T, class Tile = indexed_tile<T>, class Row, class Put>
void inner_products(index count, index cols, const Row& row, matrix_view<const T, cpu> bank,
                    const Put& put) {
  constexpr index several = Tile::tokens, ranks = Tile::ranks;
  constexpr index length = inner_piece_bytes / static_cast<index>(sizeof(T));
  constexpr index fetched = Tile::fetched, passes = ceil_div(several, fetched);
  const index whole = cols / Tile::lanes * Tile::lanes;
  alignas(host_alignment) T out[inner_row_blocks][inner_bank_blocks][several][ranks][Tile::lanes];
  const T* rows[inner_row_blocks][several];
  const T* block[inner_bank_blocks][ranks];
  for (index first = 0; first < count; first += inner_row_blocks * several) {
    const index some = std::min(inner_row_blocks * several, count - first);
    const index row_blocks = ceil_div(some, several);
    // What is missing is read twice, and the second result dropped.
    for (index i = 0; i < row_blocks * several; ++i) {
      rows[i / several][i % several] = row(first + std::min(i, some - 1));
    }
    for (index start = 0; start < bank.rows; start += inner_bank_blocks * ranks) {
      const index some_ranks = std::min(inner_bank_blocks * ranks, bank.rows - start);
      const index bank_blocks = ceil_div(some_ranks, ranks);
      for (index r = 0; r < bank_blocks * ranks; ++r) {
        block[r / ranks][r % ranks] = bank.row(start + std::min(r, some_ranks - 1));
      }
      for (index d = 0; d == 0 || d < whole; d += length) {
        const index end = std::min(d + length, whole);
        for (index i = 0; i < row_blocks; ++i) {
          // The same piece of the next rows, the next piece of the first ones, other rows.
          std::uintptr_t next_end[passes * fetched];
          for (index j = 0; j < passes * fetched; ++j) {
            const index at = std::min(j, several - 1);
            const T* const next = i + 1 < row_blocks ? rows[i + 1][at] + d
                                  : end < whole      ? rows[0][at] + end
                                                     : row(std::min(first + some + at, count - 1));
            // What no pass over the bank is left for.
            if (j >= bank_blocks * fetched) {
              prefetch<ceil_div(length, panel_width<T>)>(reinterpret_cast<std::uintptr_t>(next));
            }
            next_end[j] = reinterpret_cast<std::uintptr_t>(next) +
                          static_cast<std::uintptr_t>(end - d) * sizeof(T);
          }
          for (index r = 0; r < bank_blocks; ++r) {
            const std::uintptr_t* const soon = next_end + r % passes * fetched;
            if (some - i * several == 1) {
              Tile::template inner<1>(d, end, {rows[i][0]}, block[r], soon, d > 0,
                                      reinterpret_cast<T(&)[1][ranks][Tile::lanes]>(out[i][r]));
            } else {
              Tile::template inner<several>(d, end, rows[i], block[r], soon, d > 0, out[i][r]);
            }
          }
        }
      }
      for (index i = 0; i < some; ++i) {
        const T* const left = rows[i / several][i % several];
        for (index r = 0; r < some_ranks; ++r) {
          T sum = Tile::total(out[i / several][r / ranks][i % several][r % ranks]);
          if (whole < cols) {
            sum =
                add_inner<T>(sum, left + whole, block[r / ranks][r % ranks] + whole, cols - whole);
          }
          put(first + i, start + r, sum);
        }
      }
    }
  }
}

/// Columns of a sum of outer products in one task, by its shape.
template <class T, class Tile = indexed_tile<T>>
index outer_chunk(index ranks, index cols) {
  constexpr index width = Tile::outer_cols;
  const index fit = outer_sum_bytes / static_cast<index>(sizeof(T)) / ranks / width * width;
  return piece(cols, std::max(fit, width), width);
}

/// sum = the sum of factors(i)[r] times row(i)[0..cols) over i < count, in ascending order, for
/// r < ranks, as [ceil(cols / width), ranks, width] with the width of a step.
template <class T, class Tile = indexed_tile<T>, class Factors, class Row>
void outer_products(index count, index ranks, index cols, const Factors& factors, const Row& row,
                    T* sum) {
  constexpr index width = Tile::outer_cols, several = Tile::outer_tokens;
  const index steps = cols / width;
  std::fill_n(sum, ceil_div(cols, width) * width * ranks, T{0});
  for (index i = 0; i < count;) {
    const index some = count - i < several ? 1 : several;
    if (some == several) {
      const T* z[several];
      const T* x[several];
      const T* next[several];
      for (index j = 0; j < several; ++j) {
        z[j] = factors(i + j);
        x[j] = row(i + j);
        next[j] = row(std::min(i + j + several, count - 1));
      }
      Tile::template outer<several>(steps, ranks, z, x, next, sum);
    } else {
      Tile::template outer<1>(steps, ranks, {factors(i)}, {row(i)}, {row(i)}, sum);
    }
    for (index j = i; steps * width < cols && j < i + some; ++j) {
      const T* const z = factors(j);
      const T* const x = row(j) + steps * width;
      for (index r = 0; r < ranks; ++r) {
        T* const to = sum + (steps * ranks + r) * width;
        for (index d = 0; d < cols - steps * width; ++d) to[d] += z[r] * x[d];
      }
    }
    i += some;
  }
}

/// put(d, element d < cols of row r) of what outer_products made.
template <class T, class Tile = indexed_tile<T>, class Put>
void for_each_outer(const T* sum, index ranks, index cols, index r, const Put& put) {
  constexpr index width = Tile::outer_cols;
  index d = 0;
  for (const T* from = sum + r * width; d + width <= cols; d += width, from += ranks * width) {
    for (index j = 0; j < width; ++j) put(d + j, from[j]);
  }
  const T* const rest = sum + (d / width * ranks + r) * width;
  for (index j = 0; d + j < cols; ++j) put(d + j, rest[j]);
}

}  // namespace talpa::detail
