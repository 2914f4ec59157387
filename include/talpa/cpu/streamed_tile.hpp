// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/index.hpp>
#include <talpa/cpu/register_tile.hpp>

#include <cstdint>

namespace talpa::detail {

/// Cache lines that a loop over K fetches to L2 on its way, a line of K at a time: `lines` lines,
/// `stride` bytes apart, the next time `advance` bytes further on. They need not be there.
struct fetched_lines {
  std::uintptr_t from = 0;
  index lines = 0, stride = 0, advance = 0;
};

/// As many rows of a tile as leave registers for a row of the right side, an element of the left
/// one and a product.
template <index Panels, index Bytes = register_bytes, index Registers = register_count>
inline constexpr index streamed_tile_rows = (Registers - Panels * panel_bytes / Bytes - 2) /
                                            (Panels * panel_bytes / Bytes);

/// A block of the result that stays in vector registers while K runs, like that of register_tile,
/// for a left side that is read once or a few times: it need not be turned first, and what comes
/// next of it is fetched. The right side is Panels panels wide. The same sums, to the same bits.
template <class T, index Panels, index Rows, index Bytes = register_bytes>
struct streamed_tile {
  static constexpr index rows = Rows, lanes = Bytes / static_cast<index>(sizeof(T));
  static constexpr index vectors = Panels * panel_bytes / Bytes;
  /// Rows that are reached from one pointer, by what addresses can add to it.
  static constexpr index reached = 5;
  /// How many rows ahead panels are fetched.
  static constexpr index prefetch_rows = 32;

  typedef T vector __attribute__((vector_size(Bytes), aligned(alignof(T)), may_alias));
  typedef T register_vector __attribute__((vector_size(Bytes)));

  /// c = a b, or c += a b if `add`, for the whole tile. Element k of row i of a is
  /// a[i stride + k] if ByRows, else a[k rows + i]; b holds panels [depth][panel_width], one after
  /// the other, aligned to a line.
  template <bool ByRows>
  [[gnu::noinline]] static void run(index depth, const T* a, index stride, const T* b, bool add,
                                    T* c, index c_stride, fetched_lines soon) {
    constexpr index pointers = ByRows ? ceil_div(rows, reached) : 1;
    // By its declaration: nvcc 13 fails on a vector constant in a lambda.
    register_vector sum[rows][vectors] = {};
    index once = stride * static_cast<index>(sizeof(T)), thrice = 3 * once;
    const char* at[pointers];
    for (index p = 0; p < pointers; ++p) {
      at[p] = reinterpret_cast<const char*>(a) + p * reached * once;
    }
    const index panel = depth * panel_width<T>;
    for (index left = depth; left > 0; left -= panel_width<T>) {
      for (index l = 0; l < soon.lines; ++l) {
        const auto line = soon.from + static_cast<std::uintptr_t>(l * soon.stride);
        __builtin_prefetch(reinterpret_cast<const void*>(line), 0, 2);
      }
      soon.from += static_cast<std::uintptr_t>(soon.advance);
      for (index k = left < panel_width<T> ? left : panel_width<T>; k > 0; --k) {
        // Not to be known from one turn to the next: gcc would keep a pointer to each row instead,
        // on the stack.
        if constexpr (ByRows) asm("" : "+r"(once), "+r"(thrice));
        register_vector right[vectors];
        unrolled<vectors>([&](auto j) __attribute__((always_inline)) {
          constexpr index column = j * lanes;
          right[j] = *reinterpret_cast<const vector*>(b + column / panel_width<T> * panel +
                                                      column % panel_width<T>);
        });
        unrolled<rows>([&](auto i) __attribute__((always_inline)) {
          const char* from = at[0] + i * static_cast<index>(sizeof(T));
          if constexpr (ByRows) {
            constexpr index place = i % reached;
            from = at[i / reached] + (place == 3 ? thrice : place * once);
          }
          const T factor = *reinterpret_cast<const T*>(from);
          unrolled<vectors>([&](auto j)
                                __attribute__((always_inline)) { sum[i][j] += factor * right[j]; });
        });
        unrolled<Panels>([&](auto p) __attribute__((always_inline)) {
          __builtin_prefetch(reinterpret_cast<const void*>(
              reinterpret_cast<std::uintptr_t>(b + p * panel) + prefetch_rows * panel_bytes));
        });
        unrolled<pointers>([&](auto p) __attribute__((always_inline)) {
          at[p] += (ByRows ? 1 : rows) * static_cast<index>(sizeof(T));
        });
        b += panel_width<T>;
      }
    }
    unrolled<rows>([&](auto i) __attribute__((always_inline)) {
      unrolled<vectors>([&](auto j) __attribute__((always_inline)) {
        vector& out = *reinterpret_cast<vector*>(c + i * c_stride + j * lanes);
        out = add ? out + sum[i][j] : sum[i][j];
      });
    });
  }
};

/// Loops for so few rows on the other side that a product is bound by memory: whole rows of the
/// bank go past, as many as have one stream of requests each.
template <class T, index Bytes = register_bytes, index Registers = register_count>
struct streamed_rows {
  static constexpr index lanes = Bytes / static_cast<index>(sizeof(T));
  /// Rows of the bank in one block of inner products, and of the other side.
  static constexpr index inner_rows = Registers >= 32 ? 6 : 2, inner_slots = 4;
  /// Rows of the bank that enter a sum at a time.
  static constexpr index sum_rows = Registers >= 32 ? 8 : 4;

  typedef T vector __attribute__((vector_size(Bytes), aligned(alignof(T)), may_alias));
  typedef T register_vector __attribute__((vector_size(Bytes)));

  /// out[r][s][l] = the sum over k = l, l + lanes, ... < length, a multiple of lanes, in ascending
  /// order, of b[r][k] x[s][k]. The rows of b behind these are fetched.
  [[gnu::noinline]] static void inner(index length, const T* b, index stride, const T* x,
                                      index x_stride, T (&out)[inner_rows][inner_slots][lanes]) {
    // By its declaration: nvcc 13 fails on a vector constant in a lambda.
    register_vector sum[inner_rows][inner_slots] = {};
    const auto behind = static_cast<std::uintptr_t>(inner_rows * stride) * sizeof(T);
    for (index k = 0; k < length; k += lanes) {
      register_vector right[inner_slots];
      const T* slot = x + k;
      unrolled<inner_slots>([&](auto s) __attribute__((always_inline)) {
        right[s] = *reinterpret_cast<const vector*>(slot);
        keep_in_register(right[s]);
        slot = next_row(slot, x_stride);
      });
      const T* row = b + k;
      unrolled<inner_rows>([&](auto r) __attribute__((always_inline)) {
        register_vector left = *reinterpret_cast<const vector*>(row);
        keep_in_register(left);
        __builtin_prefetch(
            reinterpret_cast<const void*>(reinterpret_cast<std::uintptr_t>(row) + behind));
        unrolled<inner_slots>([&](auto s)
                                  __attribute__((always_inline)) { sum[r][s] += left * right[s]; });
        row = next_row(row, stride);
      });
    }
    unrolled<inner_rows>([&](auto r) __attribute__((always_inline)) {
      unrolled<inner_slots>([&](auto s) __attribute__((always_inline)) {
        *reinterpret_cast<vector*>(out[r][s]) = sum[r][s];
      });
    });
  }

  /// c[s][i] += the sum over r < sum_rows, in ascending order, of factors[r][s] b[r][i], with
  /// factors as a panel, for s < Slots and i < cols, a multiple of lanes.
  template <index Slots>
  [[gnu::noinline]] static void sum(index cols, const T* b, index stride, const T* factors, T* c,
                                    index c_stride) {
    for (index i = 0; i < cols; i += lanes) {
      register_vector left[sum_rows];
      const T* row = b + i;
      unrolled<sum_rows>([&](auto r) __attribute__((always_inline)) {
        left[r] = *reinterpret_cast<const vector*>(row);
        row = next_row(row, stride);
      });
      T* slot = c + i;
      unrolled<Slots>([&](auto s) __attribute__((always_inline)) {
        vector& out = *reinterpret_cast<vector*>(slot);
        register_vector all = out;
        unrolled<sum_rows>([&](auto r) __attribute__((always_inline)) {
          all += factors[r * panel_width<T> + s] * left[r];
        });
        out = all;
        slot = next_row(slot, c_stride);
      });
    }
  }

 private:
  /// A row further, not to be known before: gcc would keep a pointer to each row, on the stack.
  template <class P>
  [[gnu::always_inline]] static P* next_row(P* row, index stride) {
    row += stride;
    asm("" : "+r"(row));
    return row;
  }
};

}  // namespace talpa::detail
