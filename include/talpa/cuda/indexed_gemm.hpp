// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/cuda/quad.hpp>
#include <talpa/cuda/slot_product.hpp>
#include <talpa/ops/indexed_gemm.hpp>

#include <cstdint>
#include <limits>
#include <span>

namespace talpa::kernels {

/// Width neighbours of some tokens: the sums of rows of the bank of their slots, slot after slot. A
/// block keeps to a few columns for as many tokens as it has, so that the bank's share of them
/// stays in the near cache.
template <class T, class B, int Width>
struct expand_slots {
  static constexpr bool independent = true;
  /// Groups of columns of a block, tokens that it takes at a time, and tokens of a block.
  static constexpr int threads = 256, columns = 32, rows = threads / columns, tokens = 64;

  segments<B> s;
  matrix_view<const T, B> z, bank;
  matrix_view<T, B> y;
  bool keeps;

  static index column_blocks(const matrix_view<T, B>& y) {
    return ceil_div(y.cols, Width * columns);
  }
  static index token_blocks(const matrix_view<T, B>& y) { return ceil_div(y.rows, tokens); }

  template <class Block>
  TALPA_HD void operator()(Block& block) const {
    const index chunks = (y.rows + tokens - 1) / tokens;
    const index first = block.index() % chunks * tokens;
    const index column = block.index() / chunks * (Width * columns) +
                         Width * static_cast<index>(block.thread() % columns);
    if (column >= y.cols) return;
    const index last = first + tokens < y.rows ? first + tokens : y.rows;
    for (index n = first + block.thread() / columns; n < last; n += rows) add_slots(n, column);
  }

 private:
  TALPA_HD void add_slots(index n, index column) const {
    T* const to = y.row(n) + column;
    neighbours<T, Width> sum{};
    if (keeps) sum = load_wide<T, Width>(to);
    index e = 0;
    for (index i = s.slot_offset_of_token[n]; i < s.slot_offset_of_token[n + 1]; ++i) {
      const index slot = i < s.slot_of_token.size ? index{s.slot_of_token[i]} : z.rows;
      if (slot >= z.rows) {  // beyond the places there are, which the host cannot know
        TALPA_UNROLL
        for (int j = 0; j < Width; ++j) sum.v[j] = std::numeric_limits<T>::quiet_NaN();
        break;
      }
      // Slots of a token are in the order of experts.
      for (index beyond = s.experts(); beyond - e > 1;) {
        const index middle = (e + beyond) / 2;
        (s.offsets[middle] <= slot ? e : beyond) = middle;
      }
      const T* const factors = z.row(slot);
      const T* row = bank.row(e * z.cols) + column;
      for (index r = 0; r < z.cols; ++r, row += bank.stride) {
        const neighbours<T, Width> x = load_wide<T, Width>(row);
        TALPA_UNROLL
        for (int j = 0; j < Width; ++j) sum.v[j] += factors[r] * x.v[j];
      }
    }
    store_wide(to, sum);
  }
};

}  // namespace talpa::kernels

namespace talpa::ops {

template <kernel_backend B>
struct indexed_gemm_impl<B> {
  template <class T>
  static void shrink(context<B>& ctx, const segments<B>& s, matrix_view<const T, B> x,
                     matrix_view<const T, B> bank, matrix_view<T, B> u) {
    kernels::multiply_slots(
        ctx, vector_view<const index, B>(s.offsets), kernels::equal_blocks{u.cols},
        kernels::slot_rows<T, B>{x, s.token_of_slot.data}, bank, transpose::yes, u, false);
  }

  template <class T>
  static void expand(context<B>& ctx, const segments<B>& s, matrix_view<const T, B> z,
                     matrix_view<const T, B> bank, matrix_view<T, B> y, grad_mode y_mode) {
    if (y.empty()) return;
    const auto run = [&]<int Width>() {
      using body = kernels::expand_slots<T, B, Width>;
      detail::launch<body::threads>(ctx, body::column_blocks(y) * body::token_blocks(y), 0,
                                    body{s, z, bank, y, y_mode == grad_mode::accumulate});
    };
    if (kernels::holds_quads(bank) && kernels::holds_quads(y) && y.cols % 4 == 0) {
      run.template operator()<4>();
    } else {
      run.template operator()<1>();
    }
  }

  template <class T>
  static void gradient(context<B>& ctx, const segments<B>& s, matrix_view<const T, B> z,
                       matrix_view<const T, B> x, std::span<const row_run> runs,
                       matrix_view<T, B> dbank) {
    if (z.cols == 0) return;
    for (const row_run& run : runs) {
      kernels::add_slot_products(ctx, vector_view<const index, B>(s.offsets),
                                 kernels::equal_blocks{z.cols}, z,
                                 kernels::slot_rows<T, B>{x, s.token_of_slot.data}, run, dbank,
                                 run.first / z.cols, run.rows / z.cols);
    }
  }
};

}  // namespace talpa::ops
