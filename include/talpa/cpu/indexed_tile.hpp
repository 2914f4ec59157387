// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/index.hpp>
#include <talpa/cpu/kept_lanes.hpp>
#include <talpa/cpu/register_tile.hpp>

#include <cstdint>

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
  /// Rows of x that are fetched in one loop over columns.
  static constexpr index fetched = ceil_div(tokens, 2);
  /// Columns of sums of rows, whole panels of packed matrices, and rows of y at a time: as many
  /// registers as hide the latency of a multiply-add, while 64 rows of a panel fit L1.
  static constexpr index sum_vectors = Registers >= 32 && Bytes > 16 ? 6 : 8;
  static constexpr index summed = Registers >= 32 ? 2 : 1;
  /// How many rows ahead rows are fetched.
  static constexpr index sum_prefetch_rows = 4;
  static constexpr index sum_cols = sum_vectors * lanes;
  static_assert(sum_cols % register_tile<T, Bytes, Registers>::cols == 0);
  /// Rows of x that enter a sum of outer products at a time, and columns of a step.
  static constexpr index outer_tokens = 4;
  static constexpr index outer_vectors = 2;
  static constexpr index outer_cols = outer_vectors * lanes;

  // Aligned like its elements: rows may lie anywhere.
  typedef T vector __attribute__((vector_size(Bytes), aligned(alignof(T)), may_alias));
  typedef T register_vector __attribute__((vector_size(Bytes)));

  /// out[i][r][l] = the sum over d = l, l + lanes, ... in [begin, end), multiples of lanes, in
  /// ascending order, of x[i][d] bank[r][d], begun with what out held if `add`. As many bytes in
  /// front of each of next_end[0..fetched), which will be read soon, are fetched on the way: many
  /// lines at once would wait for each other.
  template <index Tokens>
  [[gnu::noinline]] static void inner(index begin, index end, const T* const (&x)[Tokens],
                                      const T* const (&bank)[ranks], const std::uintptr_t* next_end,
                                      bool add, T (&out)[Tokens][ranks][lanes]) {
    // By its declaration: nvcc 13 fails on a vector constant in a lambda.
    register_vector sum[Tokens][ranks] = {};
    if (add) {
      unrolled<Tokens>([&](auto i) __attribute__((always_inline)) {
        unrolled<ranks>([&](auto r) __attribute__((always_inline)) {
          sum[i][r] = *reinterpret_cast<const vector*>(out[i][r]);
        });
      });
    }
    // Bytes up to the end, one number for all addresses: every register is needed.
    const auto bytes = [](index d) { return static_cast<std::uintptr_t>(d) * sizeof(T); };
    const auto load = [](std::uintptr_t from) __attribute__((always_inline)) {
      return *reinterpret_cast<const volatile vector*>(from);
    };
    std::uintptr_t x_end[Tokens], bank_end[ranks];
    unrolled<Tokens>([&](auto i) __attribute__((always_inline)) {
      x_end[i] = reinterpret_cast<std::uintptr_t>(x[i]) + bytes(end);
    });
    unrolled<ranks>([&](auto r) __attribute__((always_inline)) {
      bank_end[r] = reinterpret_cast<std::uintptr_t>(bank[r]) + bytes(end);
    });
    for (std::uintptr_t d = bytes(begin) - bytes(end); d != 0; d += bytes(lanes)) {
      unrolled<fetched>([&](auto i) __attribute__((always_inline)) {
        const std::uintptr_t soon = *static_cast<const volatile std::uintptr_t*>(next_end + i);
        __builtin_prefetch(reinterpret_cast<const void*>(soon + d));
      });
      register_vector left[Tokens];
      unrolled<Tokens>([&](auto i)
                           __attribute__((always_inline)) { left[i] = load(x_end[i] + d); });
      unrolled<ranks>([&](auto r) __attribute__((always_inline)) {
        const register_vector right = load(bank_end[r] + d);
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
  /// What one row of y adds up.
  struct row_terms {
    row_factors* terms;
    index count;
  };

  /// What stays of the terms of rows of y but the last `others` of each: column d of row i, times
  /// `factor`, where bit `first` + d of the words from i * stride on is set. `first` is a multiple
  /// of lanes.
  struct kept_columns {
    const std::uint32_t* words;
    index stride, first, others;
    T factor;
  };

  /// What a row of sums is added to: nothing, or what y held, or that plus a bias.
  struct addend {
    bool held = false;
    const T* bias = nullptr;  ///< [sum_cols], only with `held`
  };

  /// Row i of y, columns [0, sum_cols), for i < rows: the sum over the terms t of lists[i] and
  /// r < t.count of t.factors[r] times row t.first + r of the panel, in this order, added to `to`.
  /// Rows of y are fetched before they are needed; while the last ones are computed the first ones
  /// `ahead` columns further.
  [[gnu::noinline]] static void sum_rows(index rows, const row_terms* lists, const T* panel,
                                         index stride, addend to, T* y, index y_stride,
                                         index ahead) {
    sum_all<false>(rows, lists, panel, stride, to, y, y_stride, ahead, {});
  }
  /// The same, of which `kept` stays.
  [[gnu::noinline]] static void sum_kept_rows(index rows, const row_terms* lists, const T* panel,
                                              index stride, addend to, T* y, index y_stride,
                                              index ahead, const kept_columns& kept) {
    sum_all<true>(rows, lists, panel, stride, to, y, y_stride, ahead, kept);
  }

  template <bool Masked>
  [[gnu::always_inline]] static void sum_all(index rows, const row_terms* lists, const T* panel,
                                             index stride, addend to, T* y, index y_stride,
                                             index ahead, kept_columns kept) {
    for (index n = 0; n < rows;) {
      const index some = n + summed <= rows && alike(lists + n) ? summed : 1;
      for (index i = 0; i < some; ++i) {
        // Rows are too far apart for the machine to foresee the next one.
        const bool wraps = n + i + sum_prefetch_rows >= rows;
        const index row = wraps ? (n + i + sum_prefetch_rows) % rows : n + i + sum_prefetch_rows;
        const auto next = reinterpret_cast<std::uintptr_t>(y + row * y_stride) +
                          static_cast<std::uintptr_t>(wraps ? ahead : 0) * sizeof(T);
        unrolled<sum_cols / panel_width<T>>([&](auto line) __attribute__((always_inline)) {
          constexpr auto bytes = static_cast<std::uintptr_t>(line * panel_bytes);
          __builtin_prefetch(reinterpret_cast<const void*>(next + bytes), 1);
        });
      }
      T* const row = y + n * y_stride;
      if (some == summed) {
        sum_some<summed, Masked>(lists + n, panel, stride, to, row, y_stride, kept);
      } else {
        sum_some<1, Masked>(lists + n, panel, stride, to, row, y_stride, kept);
      }
      if constexpr (Masked) kept.words += some * kept.stride;
      n += some;
    }
  }

  /// Whether the terms of `summed` lists have the same counts, one after the other.
  [[gnu::always_inline]] static bool alike(const row_terms* lists) {
    for (index i = 1; i < summed; ++i) {
      if (lists[i].count != lists[0].count) return false;
      for (index t = 0; t < lists[0].count; ++t) {
        if (lists[i].terms[t].count != lists[0].terms[t].count) return false;
      }
    }
    return true;
  }

  /// Rows of y whose lists are alike.
  template <index Rows, bool Masked>
  [[gnu::always_inline]] static void sum_some(const row_terms* lists, const T* panel, index stride,
                                              addend to, T* y, index y_stride,
                                              const kept_columns& kept) {
    register_vector sum[Rows][sum_vectors] = {};
    const auto add_terms = [&](index begin, index end) __attribute__((always_inline)) {
      for (index t = begin; t < end; ++t) {
        const T* factor[Rows];
        const T* from[Rows];
        unrolled<Rows>([&](auto i) __attribute__((always_inline)) {
          factor[i] = lists[i].terms[t].factors;
          from[i] = panel + lists[i].terms[t].first * stride;
        });
        const index count = lists[0].terms[t].count;
        for (index r = 0; r < count; ++r) {
          unrolled<Rows>([&](auto i) __attribute__((always_inline)) {
            const T left = factor[i][r];
            unrolled<sum_vectors>([&](auto j) __attribute__((always_inline)) {
              sum[i][j] += left * *reinterpret_cast<const vector*>(from[i] + j * lanes);
            });
            from[i] += stride;
          });
          if constexpr (Masked) {
            unrolled<Rows>([&](auto i) __attribute__((always_inline)) {
              unrolled<sum_vectors>([&](auto j) __attribute__((always_inline)) {
                keep_in_register(sum[i][j]);
              });
            });
          }
        }
      }
    };
    if constexpr (Masked) {
      const index masked = lists[0].count - kept.others;
      add_terms(0, masked);
      unrolled<Rows>([&](auto i) __attribute__((always_inline)) {
        unrolled<sum_vectors>([&](auto j) __attribute__((always_inline)) {
          const index bit = kept.first + j * lanes;
          const std::uint32_t bits =
              kept.words[i * kept.stride + bit / mask_word_bits] >> bit % mask_word_bits;
          sum[i][j] = kept_lanes<T, Bytes>::of(sum[i][j] * kept.factor, bits);
        });
      });
      add_terms(masked, lists[0].count);
    } else {
      add_terms(0, lists[0].count);
    }
    unrolled<Rows>([&](auto i) __attribute__((always_inline)) {
      unrolled<sum_vectors>([&](auto j) __attribute__((always_inline)) {
        vector& out = *reinterpret_cast<vector*>(y + i * y_stride + j * lanes);
        if (!to.held) {
          out = sum[i][j];
        } else if (to.bias == nullptr) {
          out = out + sum[i][j];
        } else {
          out = (out + *reinterpret_cast<const vector*>(to.bias + j * lanes)) + sum[i][j];
        }
      });
    });
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
        unrolled<outer_cols / panel_width<T>>([&](auto line) __attribute__((always_inline)) {
          __builtin_prefetch(next[i] + d * outer_cols + line * panel_width<T>);
        });
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
