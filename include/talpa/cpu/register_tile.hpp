// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/half.hpp>
#include <talpa/core/index.hpp>
#include <talpa/core/matrix.hpp>
#include <talpa/core/registers.hpp>

#include <concepts>
#include <cstdint>
#include <type_traits>
#include <utility>

namespace talpa::detail {

/// Bytes of one row of a panel of T: a cache line, whatever the instruction set, so that packed
/// matrices have one layout in all translation units. A pair of rows of bfloat16 is one, too.
inline constexpr index panel_bytes = static_cast<index>(host_alignment);

/// Columns of a panel.
template <class T>
inline constexpr index panel_width = panel_bytes / static_cast<index>(sizeof(T));

/// f(0), f(1), ... f(Count - 1), each with its own constant. Indices that are constants keep arrays
/// in registers.
template <index Count, class F>
[[gnu::always_inline]] inline void unrolled(F&& f) {
  [&]<index... I>(std::integer_sequence<index, I...>) __attribute__((always_inline)) {
    (f(std::integral_constant<index, I>{}), ...);
  }
  (std::make_integer_sequence<index, Count>{});
}

/// Rows of a panel that lie side by side, element by element: two of bfloat16, so that a word holds
/// one of each and a shift or a mask makes it a float.
template <class Stored>
inline constexpr index paired_rows = std::same_as<Stored, bfloat16> ? 2 : 1;

/// Rows of a panel of depth K, the last pair filled up with zeros.
template <class Stored>
constexpr index stored_depth(index k) {
  return ceil_div(k, paired_rows<Stored>) * paired_rows<Stored>;
}

/// A tile's share of the panels that are read after those which it and others below it read. They
/// come from L3 or memory, slower than tiles compute with them: each tile fetches some into L2.
/// `first` lies in the first panel, what is fetched of the others as far behind as its own do.
struct panel_share {
  const void* first = nullptr;
  index step = 0;  ///< bytes for two rows of a panel
};

/// A block of the result that stays in vector registers while K runs. Bytes is the width of a
/// register, Registers their number.
///
/// Each element is the sum over k, in ascending order from +0, of a[k] b[k], by multiply-adds where
/// the machine has them: the same bits in every position and for every width. b is stored as T, or
/// as bfloat16 for floats, which are widened when they are read.
template <class T, index Bytes = register_bytes, index Registers = register_count>
struct register_tile {
  static constexpr index lanes = Bytes / static_cast<index>(sizeof(T));
  /// Panels side by side: two where one panel is one register.
  static constexpr index panels = Bytes == panel_bytes ? 2 : 1;
  static constexpr index vectors = panels * panel_bytes / Bytes;
  /// As many rows as leave registers for a row of b, an element of a and a product.
  static constexpr index rows = (Registers - vectors - 2) / vectors;
  static_assert(rows > 0, "talpa::register_tile: a row of the tile needs more registers");
  static constexpr index cols = panels * panel_width<T>;

  // Aligned like its elements: c may lie anywhere.
  typedef T vector __attribute__((vector_size(Bytes), aligned(alignof(T)), may_alias));
  typedef T register_vector __attribute__((vector_size(Bytes)));
  typedef std::uint32_t word_vector
      __attribute__((vector_size(lanes * sizeof(std::uint32_t)), may_alias));

  /// Row k + Half of b, lanes [column, column + lanes) of the panel that `row` is k of.
  template <index Half>
  [[gnu::always_inline]] static register_vector load(const T* row, index column) {
    return *reinterpret_cast<const vector*>(row + column);
  }
  template <index Half>
  [[gnu::always_inline]] static register_vector load(const bfloat16* row,
                                                     index column) requires std::same_as<T, float> {
    const word_vector words = *reinterpret_cast<const word_vector*>(row + 2 * column);
    if constexpr (Half == 0) {
      return (register_vector)(words << 16);
    } else {
      // From memory each time: gcc, which cannot know it here, would keep the mask on the stack.
      static constexpr std::uint32_t upper_half = 0xffff0000u;
      const std::uint32_t* mask = &upper_half;
      asm("" : "+r"(mask));
      return (register_vector)(words & *mask);
    }
  }

  /// c = alpha a b + beta c for the whole tile; beta == 0 ignores what c held.
  /// a [depth][rows]; b[p] [depth][panel_width], aligned to a cache line; depth a multiple of
  /// paired_rows. `next` is fetched on the way.
  template <class Stored>
  [[gnu::noinline]] static void run(index depth, const T* a, const Stored* const (&b)[panels],
                                    T alpha, T beta, T* c, index stride,
                                    const panel_share& next = {}) {
    // By its declaration: nvcc 13 fails on a vector constant in a lambda.
    register_vector sum[rows][vectors] = {};
    unrolled<rows>([&](auto i) __attribute__((always_inline)) {
      __builtin_prefetch(c + i * stride, 1);
      __builtin_prefetch(c + i * stride + cols - 1, 1);
    });
    const Stored* row = b[0];
    const index second = b[panels - 1] - b[0];
    auto soon = reinterpret_cast<std::uintptr_t>(next.first != nullptr ? next.first : b[0]);
    // Some rows of b: what a loop takes beside multiply-adds counts for two of them once.
    const auto add_rows = [&](auto some) __attribute__((always_inline)) {
      unrolled<some>([&](auto k) __attribute__((always_inline)) {
        constexpr index half = k % paired_rows<Stored>;
        const Stored* const from = row + (k - half) * panel_width<T>;
        register_vector right[vectors];
        unrolled<vectors>([&](auto j) __attribute__((always_inline)) {
          constexpr index column = j * lanes;
          right[j] = column < panel_width<T> ? load<half>(from, column)
                                             : load<half>(from + second, column - panel_width<T>);
          keep_in_register(right[j]);
        });
        unrolled<rows>([&](auto i) __attribute__((always_inline)) {
          const T left = a[k * rows + i];
          unrolled<vectors>([&](auto j)
                                __attribute__((always_inline)) { sum[i][j] += left * right[j]; });
        });
      });
    };
    for (index k = 2; k <= depth; k += 2) {
      add_rows(std::integral_constant<index, 2>{});
      // Into L1 what is read soon, into L2 what is read next.
      unrolled<panels>([&](auto p) __attribute__((always_inline)) {
        const auto behind = p == 0 ? 0 : static_cast<std::uintptr_t>(second) * sizeof(Stored);
        unrolled<2 / paired_rows<Stored>>([&](auto line) __attribute__((always_inline)) {
          __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<std::uintptr_t>(row) +
                                                           behind + (32 + line) * panel_bytes));
        });
        __builtin_prefetch(reinterpret_cast<const void*>(soon + behind), 0, 2);
      });
      soon += static_cast<std::uintptr_t>(next.step);
      a += 2 * rows;
      row += 2 * panel_width<T>;
    }
    if (depth % 2 != 0) add_rows(std::integral_constant<index, 1>{});
    if (beta == T{0}) {
      unrolled<rows>([&](auto i) __attribute__((always_inline)) {
        unrolled<vectors>([&](auto j) __attribute__((always_inline)) {
          *reinterpret_cast<vector*>(c + i * stride + j * lanes) = alpha * sum[i][j];
        });
      });
    } else {
      unrolled<rows>([&](auto i) __attribute__((always_inline)) {
        unrolled<vectors>([&](auto j) __attribute__((always_inline)) {
          vector& out = *reinterpret_cast<vector*>(c + i * stride + j * lanes);
          out = alpha * sum[i][j] + beta * out;
        });
      });
    }
  }

  /// The same for the first `tile_rows` rows and `tile_cols` columns, through a copy.
  template <class Stored>
  static void run_edge(index depth, const T* a, const Stored* const (&b)[panels], T alpha, T beta,
                       T* c, index stride, index tile_rows, index tile_cols,
                       const panel_share& next = {}) {
    alignas(host_alignment) T copy[rows * cols] = {};
    if (beta != T{0}) {
      for (index i = 0; i < tile_rows; ++i) {
        for (index j = 0; j < tile_cols; ++j) copy[i * cols + j] = c[i * stride + j];
      }
    }
    run(depth, a, b, alpha, beta, copy, cols, next);
    for (index i = 0; i < tile_rows; ++i) {
      for (index j = 0; j < tile_cols; ++j) c[i * stride + j] = copy[i * cols + j];
    }
  }
};

/// The tile of a b stored as Stored: pairs of rows take as many registers more as a row of b.
template <class T, class Stored>
using stored_tile =
    register_tile<T, register_bytes,
                  register_count - (paired_rows<Stored> > 1 ? register_tile<T>::vectors : 0)>;

}  // namespace talpa::detail
