// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/view.hpp>
#include <talpa/cuda/loops.hpp>
#include <talpa/cuda/slot_product.hpp>
#include <talpa/ops/gemm.hpp>

// A product without a library, for what has none and to compare one with.

namespace talpa::kernels {

/// One tile of c = alpha op(a) op(b) + beta c a block.
template <class T, class B, class Tile>
struct strided_product {
  matrix_view<const T, B> a, b;
  bool a_transposed, b_transposed;
  index inner;
  T alpha, beta;
  matrix_view<T, B> c;
  index column_tiles;

  template <class Block>
  TALPA_HD void operator()(Block& block) const {
    const index row = block.index() / column_tiles * Tile::m;
    const index col = block.index() % column_tiles * Tile::n;
    const tile_operand<T> left{a_transposed ? a.data + row : a.row(row),
                               a_transposed ? 1 : a.stride, a_transposed ? a.stride : 1,
                               c.rows - row};
    const tile_operand<T> right{b_transposed ? b.row(col) : b.data + col,
                                b_transposed ? b.stride : 1, b_transposed ? 1 : b.stride,
                                c.cols - col};
    Tile::run(block, left, right, inner, [&](int m, int n, T sum) {
      T& to = c(row + m, col + n);
      to = beta == T{0} ? alpha * sum : beta * to + alpha * sum;
    });
  }
};

/// c = alpha op(a) op(b) + beta c, shapes and edges as ops::gemm. An element's sum over K is added
/// in an order that depends on K and the columns of c only.
template <class T, class B>
void tiled_gemm(context<B>& ctx, T alpha, matrix_view<const T, B> a, transpose ta,
                matrix_view<const T, B> b, transpose tb, T beta, matrix_view<T, B> c) {
  if (c.empty()) return;
  const index inner = detail::cols_of(a, ta);
  if (inner == 0) {
    for_each_element(ctx, c.rows, c.cols, scale_in_place<T, T, B>{beta, c});
    return;
  }
  with_product_tile<T>(c.cols, [&](auto tile) {
    using tile_type = decltype(tile);
    const index row_tiles = ceil_div(c.rows, tile_type::m);
    const index column_tiles = ceil_div(c.cols, tile_type::n);
    detail::launch<tile_type::threads>(
        ctx, row_tiles * column_tiles, tile_type::shared_bytes(),
        strided_product<T, B, tile_type>{a, b, ta == transpose::yes, tb == transpose::yes, inner,
                                         alpha, beta, c, column_tiles});
  });
}

}  // namespace talpa::kernels
