// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/row_run.hpp>
#include <talpa/core/view.hpp>
#include <talpa/core/workspace.hpp>
#include <talpa/cpu/context.hpp>
#include <talpa/cpu/parallel.hpp>
#include <talpa/cpu/streamed_tile.hpp>
#include <talpa/cpu/tiled_product.hpp>

#include <algorithm>

namespace talpa::detail {

/// Most slots of a group.
inline constexpr index most_streamed_gradient = 256;

/// Adds a_e^T b_e to the gradient of each group's block of a bank, for groups of at most
/// most_streamed_gradient slots. The gradient is read and written once, by whole rows, while the
/// slots stay in L2.
template <class T, index Bytes = register_bytes>
class streamed_gradients {
 public:
  streamed_gradients(vector_view<const index, cpu> offsets, matrix_view<const T, cpu> a,
                     matrix_view<const T, cpu> b, matrix_view<T, cpu> dbank)
      : offsets_(offsets), a_(a), b_(b), dbank_(dbank) {}

  /// For the groups of a run.
  void run(context<cpu>& ctx, const row_run& run) const {
    const index first = run.first / a_.cols, end = first + run.rows / a_.cols;
    const workspace<cpu>::scope scope(ctx.scratch);
    const index most = std::min(packed_slots, a_.rows), wide = ceil_div(b_.cols, cols) * cols;
    const auto packed = ctx.scratch.take<T>(most * wide);
    const auto buffers = ctx.scratch.take<T>(ctx.threads, rows * (most_streamed_gradient + cols));
    for (index e = first; e < end;) {
      // Groups whose slots fit, one after the other.
      index stop = e;
      for (index taken = 0; stop < end && taken + slots_of(stop) <= most; ++stop) {
        taken += slots_of(stop);
      }
      const auto place = [&](index group) {
        index before = 0;
        for (index g = e; g < group; ++g) before += slots_of(g);
        return packed.data + before * wide;
      };
      const index panels_across = wide / width;
      parallel_for(ctx, (stop - e) * panels_across, [&](index task, int) {
        const index group = e + task / panels_across, slots = slots_of(group);
        const index panel = task % panels_across, col = panel * width;
        if (slots == 0) return;
        pack_panel<width, T>(b_.row_range(offsets_[group], slots), false, col,
                             std::max<index>(0, std::min(width, b_.cols - col)), 0, slots,
                             place(group) + panel * slots * width);
      });
      const index tasks = ceil_div(a_.cols, task_rows);
      parallel_for(ctx, (stop - e) * tasks, [&](index task, int thread) {
        const index group = e + task / tasks, row = task % tasks * task_rows;
        if (slots_of(group) == 0) return;
        form(group, row, place(group), buffers.row(thread),
             dbank_.row_range(run.grad_first + (group - first) * a_.cols + row,
                              std::min(task_rows, a_.cols - row)));
      });
      e = stop;
    }
  }

 private:
  static constexpr index width = panel_width<T>;
  /// Panels side by side: two where one panel is one register.
  static constexpr index panels = Bytes == panel_bytes ? 2 : 1;
  static constexpr index rows = streamed_tile_rows<panels, Bytes>, cols = panels * width;
  /// Slots that are packed at a time, at least those of a group, and rows of one task.
  static constexpr index packed_slots = 2048, task_rows = 8 * rows;
  using tile = streamed_tile<T, panels, rows, Bytes>;

  /// Those that this product is for.
  index slots_of(index group) const {
    const index all = offsets_[group + 1] - offsets_[group];
    return all > most_streamed_gradient ? 0 : all;
  }

  /// c += its part of a_e^T b_e, from column `first` of a on.
  void form(index group, index first, const T* packed, T* block, matrix_view<T, cpu> c) const {
    const index slots = slots_of(group);
    T* const edge = block + rows * most_streamed_gradient;
    for (index i = 0; i < c.rows; i += rows) {
      const index some = std::min(rows, c.rows - i);
      pack_panel<rows, T>(a_.row_range(offsets_[group], slots), false, first + i, some, 0, slots,
                          block);
      for (index j = 0; j < c.cols; j += cols) {
        const T* const right = packed + j * slots;
        if (some == rows && j + cols <= c.cols) {
          tile::template run<false>(slots, block, 0, right, true, c.row(i) + j, c.stride, {});
          continue;
        }
        tile::template run<false>(slots, block, 0, right, false, edge, cols, {});
        for (index r = 0; r < some; ++r) {
          T* const to = c.row(i + r) + j;
          for (index l = 0; l < std::min(cols, c.cols - j); ++l) to[l] += edge[r * cols + l];
        }
      }
    }
  }

  vector_view<const index, cpu> offsets_;
  matrix_view<const T, cpu> a_, b_;
  matrix_view<T, cpu> dbank_;
};

// Not inlined, so that a program may instantiate it in one place.
template <class T>
void streamed_gradient(context<cpu>& ctx, vector_view<const index, cpu> offsets,
                       matrix_view<const T, cpu> a, matrix_view<const T, cpu> b, const row_run& run,
                       matrix_view<T, cpu> dbank);

template <class T>
void streamed_gradient(context<cpu>& ctx, vector_view<const index, cpu> offsets,
                       matrix_view<const T, cpu> a, matrix_view<const T, cpu> b, const row_run& run,
                       matrix_view<T, cpu> dbank) {
  streamed_gradients<T>(offsets, a, b, dbank).run(ctx, run);
}

}  // namespace talpa::detail
