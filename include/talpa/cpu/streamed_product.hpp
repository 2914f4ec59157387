// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/view.hpp>
#include <talpa/core/workspace.hpp>
#include <talpa/cpu/context.hpp>
#include <talpa/cpu/indexed_tile.hpp>
#include <talpa/cpu/parallel.hpp>
#include <talpa/cpu/row_products.hpp>
#include <talpa/cpu/streamed_tile.hpp>
#include <talpa/cpu/tiled_product.hpp>
#include <talpa/cpu/transpose_rows.hpp>
#include <talpa/ops/gemm.hpp>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <type_traits>

// Products of segments of slots with blocks of a bank. A block has few slots, so it is the bank
// that goes past: each piece of it is read from memory once, while the products before it are
// computed, and meets the slots of its group, which are packed and stay in L2. What is computed is
// therefore c^T = op(block) a^T.

namespace talpa::detail {

/// Fewest rows and columns of a block for which it pays, and elements: smaller ones stay in L2 by
/// themselves.
inline constexpr index streamed_side = 64, streamed_size = index{1} << 16;
/// Most slots of a group that a piece of the bank meets in one task, and that are packed at a time.
inline constexpr index streamed_chunk = 256, streamed_wave = 2048;
/// Outputs of one task and bytes of K that it sums up at a time, where outputs are rows of the bank
/// and where they are columns. Columns of a piece of the bank lie far apart: it has fewer rows.
inline constexpr index streamed_row_outputs = 128, streamed_row_depth = 2048;
inline constexpr index streamed_col_outputs = 512, streamed_col_depth = 512;
/// Up to as many slots of a group whole rows of the bank are read once, in loops bound by memory,
/// and outputs of one task where they are columns.
inline constexpr index few_by_rows = 8, few_by_cols = 48, few_col_outputs = 1024;

inline bool streaming_pays(index rows, index cols) {
  return std::min(rows, cols) >= streamed_side && rows * cols >= streamed_size;
}
/// Most slots of a group. With more rows for each row of the bank the time that it takes to read
/// the bank hardly counts, and products one after the other pack less.
inline index most_streamed(transpose tb) {
  return tb == transpose::yes ? 384 : std::numeric_limits<index>::max();
}

/// Elements of rows that lie side by side, at least `size`: an odd number of lines, so that they
/// share no set of a cache.
template <class T>
index spread_stride(index size) {
  return (ceil_div(size, panel_width<T>) | 1) * panel_width<T>;
}

/// to[s][i] = from[i][s], or to[s][i] += from[i][s] if `add`.
template <class T>
void put_turned(matrix_view<const T, cpu> from, matrix_view<T, cpu> to, bool add) {
  constexpr index side = packed_side;
  for (index s = 0; s < to.rows; s += side) {
    const index some = std::min(side, to.rows - s);
    index i = 0;
    if constexpr (side * static_cast<index>(sizeof(T)) <= pack_bytes) {
      typedef T vector __attribute__((vector_size(side * sizeof(T))));
      for (; some == side && i + side <= to.cols; i += side) {
        vector block[side];
        for (index l = 0; l < side; ++l) {
          __builtin_memcpy(&block[l], &from(i + l, s), sizeof(vector));
        }
        transpose_rows<side>(block);
        for (index l = 0; l < side; ++l) {
          if (add) {
            vector before;
            __builtin_memcpy(&before, &to(s + l, i), sizeof(vector));
            block[l] = before + block[l];
          }
          __builtin_memcpy(&to(s + l, i), &block[l], sizeof(vector));
        }
      }
    }
    for (; i < to.cols; ++i) {
      for (index l = s; l < s + some; ++l) to(l, i) = add ? to(l, i) + from(i, l) : from(i, l);
    }
  }
}

/// to[i] += factor from[i] for i < count. Not inlined: multiply-adds may be made of it in one place
/// and not in another, and every caller is to get the same bits.
template <class T>
[[gnu::noinline]] void add_scaled(index count, T factor, const T* from, T* to) {
  for (index i = 0; i < count; ++i) to[i] += factor * from[i];
}

/// c_s = a_s op(block of its group), or c_s += it if `add`, for the slots of groups that have at
/// most most_streamed(tb).
template <class T, index Bytes = register_bytes>
class streamed_products {
 public:
  streamed_products(vector_view<const index, cpu> offsets, matrix_view<const T, cpu> a,
                    matrix_view<const T, cpu> bank, index rows, transpose tb, matrix_view<T, cpu> c,
                    bool add)
      : offsets_(offsets),
        a_(a),
        bank_(bank),
        rows_(rows),
        by_rows_(tb == transpose::yes),
        most_slots_(most_streamed(tb)),
        c_(c),
        add_(add),
        depth_(piece(
            a.cols,
            (by_rows_ ? streamed_row_depth : streamed_col_depth) / static_cast<index>(sizeof(T)),
            2)),
        // By rows in whole tiles: what is missing of the last one is computed all the same.
        outputs_(std::min(
            by_rows_ ? piece(c.cols, streamed_row_outputs, streamed_tile_rows<most_panels, Bytes>)
                     : streamed_col_outputs,
            c.cols)),
        packed_row_(spread_stride<T>(a.cols)) {}

  void run(context<cpu>& ctx) const {
    const index groups = offsets_.size - 1;
    const workspace<cpu>::scope scope(ctx.scratch);
    // By the shape alone: what a step takes must not depend on its routing.
    const index most = std::min(streamed_wave, a_.rows + groups * (width - 1));
    const auto packed = ctx.scratch.take<T>(most * packed_row_);
    const auto buffers = ctx.scratch.take<T>(ctx.threads, buffer_size());
    chunk chunks[streamed_wave / width];
    for (index group = 0, done = 0; group < groups;) {
      index count = 0, taken = 0;
      while (group < groups) {
        const index all = slots_of(group);
        const index some = std::min(piece(all, streamed_chunk, width), all - done);
        const index room = ceil_div(some, width) * width;
        if (taken + room > most) break;
        if (some > 0) {
          chunks[count++] = {group, offsets_[group] + done, some,
                             packed.data + taken * packed_row_};
        }
        taken += room;
        done += some;
        if (done < all) continue;
        ++group;
        done = 0;
      }
      parallel_for(ctx, count, [&](index i, int) { pack(chunks[i]); });
      const index tasks = ceil_div(c_.cols, outputs_);
      parallel_for(ctx, count * tasks, [&](index task, int thread) {
        form(chunks[task / tasks], task % tasks * outputs_, buffers.row(thread));
      });
    }
  }

 private:
  static constexpr index width = panel_width<T>;
  /// Panels side by side: two where one panel is one register.
  static constexpr index most_panels = Bytes == panel_bytes ? 2 : 1;
  static constexpr index most_rows = streamed_tile_rows<1, Bytes>;
  using few_loops = streamed_rows<T, Bytes>;

  /// Some slots of a group, packed: as rows where few of them meet rows, else as panels for each
  /// piece of K.
  struct chunk {
    index group, first, count;
    T* packed;
  };

  /// Slots that this product is for.
  index slots_of(index group) const {
    const index all = offsets_[group + 1] - offsets_[group];
    return all <= most_slots_ ? all : 0;
  }
  bool few(const chunk& some) const { return some.count <= (by_rows_ ? few_by_rows : few_by_cols); }

  /// A block of c^T and one of the bank, or sums of whole rows.
  index buffer_size() const {
    const index of_tiles = (outputs_ + most_rows) * spread_stride<T>(streamed_chunk) +
                           most_rows * spread_stride<T>(depth_);
    return std::max(of_tiles, by_rows_ ? 0 : few_by_cols * spread_stride<T>(few_col_outputs));
  }

  void pack(const chunk& some) const {
    const auto slots = a_.row_range(some.first, some.count);
    if (by_rows_ && few(some)) {
      const index rows = ceil_div(some.count, few_loops::inner_slots) * few_loops::inner_slots;
      for (index s = 0; s < rows; ++s) {
        T* const to = some.packed + s * packed_row_;
        if (s < some.count) {
          std::copy_n(slots.row(s), a_.cols, to);
        } else {
          std::fill_n(to, a_.cols, T{0});
        }
      }
      return;
    }
    const index panels = ceil_div(some.count, width);
    for (index k = 0; k < a_.cols; k += depth_) {
      const index depth = std::min(depth_, a_.cols - k);
      T* to = some.packed + k * panels * width;
      for (index p = 0; p < panels; ++p, to += depth * width) {
        pack_panel<width, T>(slots, true, p * width, std::min(width, some.count - p * width), k,
                             depth, to);
      }
    }
  }

  /// Outputs of the slots of a chunk, from `first` on: those of one task.
  void form(const chunk& some, index first, T* buffer) const {
    if (few(some)) {
      if (by_rows_) {
        few_inner(some, first);
      } else if (first % few_col_outputs == 0) {
        few_sums(some, first, buffer);
      }
      return;
    }
    const index outputs = std::min(outputs_, c_.cols - first);
    const index stride = spread_stride<T>(ceil_div(some.count, width) * width);
    T* const block = buffer + (outputs + most_rows) * stride;
    const auto meet = [&](auto panels) {
      if (by_rows_) {
        meet_rows<panels>(some, first, outputs, block, buffer, stride);
      } else {
        meet_cols<panels>(some, first, outputs, block, buffer, stride);
      }
    };
    if (some.count <= width) {
      meet(std::integral_constant<index, 1>{});
    } else {
      meet(std::integral_constant<index, most_panels>{});
    }
    put_turned<T>({buffer, outputs, some.count, stride},
                  c_.row_range(some.first, some.count).col_range(first, outputs), add_);
  }

  void few_inner(const chunk& some, index first) const {
    constexpr index rows = few_loops::inner_rows, slots = few_loops::inner_slots;
    const index end = std::min(first + outputs_, c_.cols);
    const index whole = a_.cols / few_loops::lanes * few_loops::lanes;
    alignas(host_alignment) T lanes[rows][slots][few_loops::lanes];
    for (index i = first; i < end; i += rows) {
      // What is missing of the last rows is made of those before it, and dropped.
      const index at = std::min(i, c_.cols - rows);
      const T* const bank = bank_.row(some.group * rows_ + at);
      for (index s = 0; s < some.count; s += slots) {
        const T* const x = some.packed + s * packed_row_;
        few_loops::inner(whole, bank, bank_.stride, x, packed_row_, lanes);
        for (index r = i - at; r < std::min(rows, end - at); ++r) {
          for (index j = 0; j < std::min(slots, some.count - s); ++j) {
            const T sum = add_inner<T>(indexed_tile<T, Bytes>::total(lanes[r][j]),
                                       bank + r * bank_.stride + whole, x + j * packed_row_ + whole,
                                       a_.cols - whole);
            T& to = c_(some.first + s + j, at + r);
            to = add_ ? to + sum : sum;
          }
        }
      }
    }
  }

  void few_sums(const chunk& some, index first, T* sums) const {
    constexpr index rows = few_loops::sum_rows;
    const index outputs = std::min(few_col_outputs, c_.cols - first);
    const index stride = spread_stride<T>(few_col_outputs), panels = ceil_div(some.count, width);
    // The last sums of a panel may be of more slots than there are.
    std::fill_n(sums, std::min(panels * width, few_by_cols) * stride, T{0});
    for (index k = 0; k < a_.cols; k += depth_) {
      const index depth = std::min(depth_, a_.cols - k);
      for (index r = 0; r < depth; r += rows) {
        const auto bank = bank_.row_range(some.group * rows_ + k + r, std::min(rows, depth - r))
                              .col_range(first, outputs);
        for (index p = 0; p < panels; ++p) {
          add_rows(bank, std::min(width, some.count - p * width),
                   some.packed + (k * panels + p * depth + r) * width, sums + p * width * stride,
                   stride);
        }
      }
    }
    for (index s = 0; s < some.count; ++s) {
      T* const to = c_.row(some.first + s) + first;
      const T* const sum = sums + s * stride;
      for (index i = 0; i < outputs; ++i) to[i] = add_ ? to[i] + sum[i] : sum[i];
    }
  }

  /// sums[s] += the rows of `bank` times factors[row][s] for s < slots <= width; what the sums of
  /// further ones are nobody asks.
  static void add_rows(matrix_view<const T, cpu> bank, index slots, const T* factors, T* sums,
                       index stride) {
    const index whole =
        bank.rows == few_loops::sum_rows ? bank.cols / few_loops::lanes * few_loops::lanes : 0;
    const auto add = [&](auto count) {
      few_loops::template sum<count>(whole, bank.data, bank.stride, factors, sums, stride);
    };
    if (slots == 1) {
      add(std::integral_constant<index, 1>{});
    } else if (slots <= width / 4) {
      add(std::integral_constant<index, width / 4>{});
    } else if (slots <= width / 2) {
      add(std::integral_constant<index, width / 2>{});
    } else {
      add(std::integral_constant<index, width>{});
    }
    if (whole == bank.cols) return;
    for (index s = 0; s < slots; ++s) {
      for (index r = 0; r < bank.rows; ++r) {
        add_scaled<T>(bank.cols - whole, factors[r * width + s], bank.row(r) + whole,
                      sums + s * stride + whole);
      }
    }
  }

  template <index Panels>
  void meet_rows(const chunk& some, index first, index outputs, T* block, T* out,
                 index stride) const {
    constexpr index rows = streamed_tile_rows<Panels, Bytes>;
    const index block_stride = spread_stride<T>(depth_);
    for (index i = 0; i < outputs; i += rows) {
      const index count = std::min(rows, outputs - i);
      const T* const from = bank_.row(some.group * rows_ + first + i);
      for (index k = 0; k < a_.cols; k += depth_) {
        const index depth = std::min(depth_, a_.cols - k);
        for (index r = 0; r < rows; ++r) {
          T* const to = block + r * block_stride;
          if (r < count) {
            std::copy_n(from + r * bank_.stride + k, depth, to);
          } else {
            std::fill_n(to, depth, T{0});
          }
        }
        const index next = k + depth < a_.cols ? k + depth : rows * bank_.stride;
        tiles<Panels, true>(some, k, depth, block, block_stride, out + i * stride, stride,
                            address(from, next), rows);
      }
    }
  }

  template <index Panels>
  void meet_cols(const chunk& some, index first, index outputs, T* block, T* out,
                 index stride) const {
    constexpr index rows = streamed_tile_rows<Panels, Bytes>;
    // How far ahead columns are fetched: those of the next block would come too late.
    constexpr index ahead = 3 * rows;
    for (index k = 0; k < a_.cols; k += depth_) {
      const index depth = std::min(depth_, a_.cols - k);
      const auto bank = bank_.row_range(some.group * rows_ + k, depth).col_range(first, outputs);
      for (index i = 0; i < outputs; i += rows) {
        pack_panel<rows, T>(bank, false, i, outputs - i, 0, depth, block);
        const index next = i + ahead;
        tiles<Panels, false>(
            some, k, depth, block, 0, out + i * stride, stride,
            address(bank.data, next < outputs ? next : depth * bank.stride + next - outputs),
            width);
      }
    }
  }

  static std::uintptr_t address(const T* from, index elements) {
    return reinterpret_cast<std::uintptr_t>(from) +
           static_cast<std::uintptr_t>(elements) * sizeof(T);
  }

  /// c^T of all panels and one block of the bank, while `lines` rows from `next` on are fetched.
  template <index Panels, bool ByRows>
  void tiles(const chunk& some, index k, index depth, const T* block, index block_stride, T* out,
             index stride, std::uintptr_t next, index lines) const {
    constexpr index rows = streamed_tile_rows<Panels, Bytes>;
    const index panels = ceil_div(some.count, width);
    const index turns = ceil_div(panels, Panels), share = ceil_div(lines, turns);
    const index bytes = bank_.stride * static_cast<index>(sizeof(T));
    for (index j = 0; j < turns; ++j) {
      // Each turn fetches its share of the rows, of columns its share of `width` rows at a time.
      const fetched_lines soon{next + static_cast<std::uintptr_t>(j * share * bytes),
                               std::min(share, lines - j * share), bytes,
                               ByRows ? panel_bytes : width * bytes};
      const T* const right = some.packed + (k * panels + j * Panels * depth) * width;
      T* const to = out + j * Panels * width;
      if ((j + 1) * Panels <= panels) {
        streamed_tile<T, Panels, rows, Bytes>::template run<ByRows>(depth, block, block_stride,
                                                                    right, k > 0, to, stride, soon);
      } else {
        streamed_tile<T, 1, rows, Bytes>::template run<ByRows>(depth, block, block_stride, right,
                                                               k > 0, to, stride, soon);
      }
    }
  }

  vector_view<const index, cpu> offsets_;
  matrix_view<const T, cpu> a_, bank_;
  index rows_;
  bool by_rows_;
  index most_slots_;
  matrix_view<T, cpu> c_;
  bool add_;
  index depth_, outputs_, packed_row_;
};

// Not inlined, so that a program may instantiate it in one place.
template <class T>
void streamed_product(context<cpu>& ctx, vector_view<const index, cpu> offsets,
                      matrix_view<const T, cpu> a, matrix_view<const T, cpu> bank, index rows,
                      transpose tb, matrix_view<T, cpu> c, bool add);

template <class T>
void streamed_product(context<cpu>& ctx, vector_view<const index, cpu> offsets,
                      matrix_view<const T, cpu> a, matrix_view<const T, cpu> bank, index rows,
                      transpose tb, matrix_view<T, cpu> c, bool add) {
  streamed_products<T>(offsets, a, bank, rows, tb, c, add).run(ctx);
}

}  // namespace talpa::detail
