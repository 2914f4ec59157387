// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/index.hpp>
#include <talpa/cpu/register_tile.hpp>

namespace talpa::detail {

/// Inner loops of products whose rows are given by pointers. Bytes is the width of a vector
/// register, Registers their number.
///
/// How many rows a loop takes at a time changes no bit: every result has one order of its terms.
/// What enters several multiply-adds is read as volatile: g++ 12 would read it once for each of
/// them, which takes longer than the multiply-adds.
template <class T, index Bytes = register_bytes, index Registers = register_count>
struct indexed_tile {
  static constexpr index lanes = Bytes / static_cast<index>(sizeof(T));
  /// Rows of the bank and of x in one block of inner products. Vectors of 16 bytes have no
  /// multiply-add everywhere, and the product needs a register.
  static constexpr index ranks = 4;
  static constexpr index tokens = Registers >= 32 ? 6 : (Bytes > 16 ? 3 : 2);
  /// Columns of one sum of rows: as many registers as hide the latency of a multiply-add.
  static constexpr index sum_vectors = 8;
  static constexpr index sum_cols = sum_vectors * lanes;
  /// Rows of x that enter a sum of outer products at a time, and columns of a step.
  static constexpr index outer_tokens = 4;
  static constexpr index outer_vectors = 2;
  static constexpr index outer_cols = outer_vectors * lanes;

  // Aligned like its elements: rows may lie anywhere.
  typedef T vector __attribute__((vector_size(Bytes), aligned(alignof(T)), may_alias));
  typedef T register_vector __attribute__((vector_size(Bytes)));

  /// out[i][r][l] = the sum over d = l, l + lanes, ... in [begin, end), multiples of lanes, in
  /// ascending order, of x[i][d] bank[r][d], begun with what out held if `add`.
  template <index Tokens>
  [[gnu::noinline]] static void inner(index begin, index end, const T* const (&x)[Tokens],
                                      const T* const (&bank)[ranks], bool add,
                                      T (&out)[Tokens][ranks][lanes]) {
    // By its declaration: nvcc 13 fails on a vector constant in a lambda.
    register_vector sum[Tokens][ranks] = {};
    if (add) {
      unrolled<Tokens>([&](auto i) __attribute__((always_inline)) {
        unrolled<ranks>([&](auto r) __attribute__((always_inline)) {
          sum[i][r] = *reinterpret_cast<const vector*>(out[i][r]);
        });
      });
    }
    for (index d = begin; d < end; d += lanes) {
      register_vector left[Tokens];
      unrolled<Tokens>([&](auto i) __attribute__((always_inline)) {
        left[i] = *reinterpret_cast<const volatile vector*>(x[i] + d);
      });
      unrolled<ranks>([&](auto r) __attribute__((always_inline)) {
        const register_vector right = *reinterpret_cast<const volatile vector*>(bank[r] + d);
        unrolled<Tokens>([&](auto i)
                             __attribute__((always_inline)) { sum[i][r] += left[i] * right; });
      });
    }
    unrolled<Tokens>([&](auto i) __attribute__((always_inline)) {
      unrolled<ranks>([&](auto r) __attribute__((always_inline)) {
        *reinterpret_cast<vector*>(out[i][r]) = sum[i][r];
      });
    });
  }

  /// The sum of the lanes, by a tree: its first half and its second, each lane with its own.
  static T total(const T (&lane)[lanes]) { return tree<lanes>(lane); }

  template <index Width>
  [[gnu::always_inline]] static T tree(const T* lane) {
    if constexpr (Width == 1) {
      return lane[0];
    } else if constexpr (Width == 2) {
      return lane[0] + lane[1];
    } else if constexpr (Width == 4) {
      return (lane[0] + lane[2]) + (lane[1] + lane[3]);
    } else {
      // As vectors: element by element gcc goes through memory in pieces that do not fit together.
      typedef T half __attribute__((vector_size(Width / 2 * sizeof(T)), aligned(alignof(T))));
      half lower, upper;
      __builtin_memcpy(&lower, lane, sizeof(half));
      __builtin_memcpy(&upper, lane + Width / 2, sizeof(half));
      lower += upper;
      T sum[Width / 2];
      __builtin_memcpy(sum, &lower, sizeof(half));
      return tree<Width / 2>(sum);
    }
  }

  /// Factors of some rows of a panel, one after the other from `first` on.
  struct row_factors {
    const T* factors;
    index first, count;
  };

  /// y[0..sum_cols) = the sum over the terms t < count and r < t.count of t.factors[r] times row
  /// t.first + r of the panel, in this order, added to what y held if `add`.
  [[gnu::noinline]] static void sum_rows(index count, const row_factors* terms, const T* panel,
                                         index stride, bool add, T* y) {
    register_vector sum[sum_vectors] = {};
    for (index i = 0; i < count; ++i) {
      const T* const factor = terms[i].factors;
      const T* row = panel + terms[i].first * stride;
      for (index r = 0; r < terms[i].count; ++r) {
        const T left = factor[r];
        unrolled<sum_vectors>([&](auto j) __attribute__((always_inline)) {
          sum[j] += left * *reinterpret_cast<const vector*>(row + j * lanes);
        });
        row += stride;
      }
    }
    if (add) {
      unrolled<sum_vectors>([&](auto j) __attribute__((always_inline)) {
        *reinterpret_cast<vector*>(y + j * lanes) += sum[j];
      });
    } else {
      unrolled<sum_vectors>([&](auto j) __attribute__((always_inline)) {
        *reinterpret_cast<vector*>(y + j * lanes) = sum[j];
      });
    }
  }

  /// sum[d][r][0..outer_cols) += the sum over i of z[i][r] times columns d outer_cols ... of x[i],
  /// for d < steps and r < rows. `next` are rows that will be read soon.
  template <index Tokens>
  [[gnu::noinline]] static void outer(index steps, index rows, const T* const (&z)[Tokens],
                                      const T* const (&x)[Tokens], const T* const (&next)[Tokens],
                                      T* sum) {
    // Pointers of its own: a store to sum could change those of the caller.
    const T* factor[Tokens];
    unrolled<Tokens>([&](auto i) __attribute__((always_inline)) { factor[i] = z[i]; });
    for (index d = 0; d < steps; ++d) {
      register_vector right[Tokens][outer_vectors];
      unrolled<Tokens>([&](auto i) __attribute__((always_inline)) {
        unrolled<outer_vectors>([&](auto j) __attribute__((always_inline)) {
          right[i][j] = *reinterpret_cast<const vector*>(x[i] + d * outer_cols + j * lanes);
        });
      });
      unrolled<Tokens>([&](auto i) __attribute__((always_inline)) {
        __builtin_prefetch(next[i] + d * outer_cols);
      });
      for (index r = 0; r < rows; ++r) {
        register_vector to[outer_vectors];
        unrolled<outer_vectors>([&](auto j) __attribute__((always_inline)) {
          to[j] = *reinterpret_cast<const vector*>(sum + j * lanes);
        });
        unrolled<Tokens>([&](auto i) __attribute__((always_inline)) {
          const T left = factor[i][r];
          unrolled<outer_vectors>([&](auto j) __attribute__((always_inline)) {
            to[j] += left * right[i][j];
          });
        });
        unrolled<outer_vectors>([&](auto j) __attribute__((always_inline)) {
          *reinterpret_cast<vector*>(sum + j * lanes) = to[j];
        });
        sum += outer_cols;
      }
    }
  }
};

}  // namespace talpa::detail
