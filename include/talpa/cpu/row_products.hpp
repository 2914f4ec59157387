// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/view.hpp>
#include <talpa/cpu/indexed_tile.hpp>
#include <talpa/cpu/tiled_product.hpp>

#include <algorithm>

// Products with few rows on one side, by the loops of indexed_tile. Rows are what a function of
// their number returns a pointer to. What depends on the width of a register has the tile among its
// template parameters, so that no two widths share a name.

namespace talpa::detail {

/// Bytes of a sum of outer products: it stays in L1.
inline constexpr index outer_sum_bytes = 16384;

/// inner_products for up to Tokens rows from `first` on.
template <class Tile, index Tokens, class T, class Row, class Put>
void inner_block(index first, index count, index cols, const Row& row,
                 matrix_view<const T, cpu> bank, const Put& put) {
  const index whole = cols / Tile::lanes * Tile::lanes;
  // What is missing is read twice, and the second result dropped.
  const T* rows[Tokens];
  for (index i = 0; i < Tokens; ++i) rows[i] = row(first + std::min(i, count - 1));
  for (index start = 0; start < bank.rows; start += Tile::ranks) {
    const index ranks = std::min(Tile::ranks, bank.rows - start);
    const T* block[Tile::ranks];
    for (index r = 0; r < Tile::ranks; ++r) block[r] = bank.row(start + std::min(r, ranks - 1));
    alignas(host_alignment) T out[Tokens][Tile::ranks][Tile::lanes];
    Tile::template inner<Tokens>(whole, rows, block, out);
    for (index i = 0; i < count; ++i) {
      for (index r = 0; r < ranks; ++r) {
        T sum = Tile::total(out[i][r]);
        for (index d = whole; d < cols; ++d) sum += rows[i][d] * block[r][d];
        put(first + i, start + r, sum);
      }
    }
  }
}

/// put(i, r, the inner product of row(i) and row r of the bank) for i < count.
template <class T, class Tile = indexed_tile<T>, class Row, class Put>
void inner_products(index count, index cols, const Row& row, matrix_view<const T, cpu> bank,
                    const Put& put) {
  constexpr index several = Tile::tokens;
  for (index i = 0; i < count; i += several) {
    const index some = std::min(several, count - i);
    if (some == 1) {
      inner_block<Tile, 1>(i, some, cols, row, bank, put);
    } else {
      inner_block<Tile, several>(i, some, cols, row, bank, put);
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
