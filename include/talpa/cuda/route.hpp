// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/cuda/routing_sums.hpp>
#include <talpa/cuda/select.hpp>
#include <talpa/ops/route.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>

namespace talpa::kernels {

/// Threads of a block that routes the rows of one block of canonical sums.
inline constexpr int totals_threads = 256;

/// sum + x[0] + x[stride] + ..., n numbers in order, with many loads under way.
template <class T, class U>
TALPA_HD T add_in_order(T sum, const U* x, index n, index stride) {
  constexpr int loads = 16;
  index i = 0;
  for (; i + loads <= n; i += loads) {
    U next[loads];
    TALPA_UNROLL
    for (int l = 0; l < loads; ++l) next[l] = x[(i + l) * stride];
    TALPA_UNROLL
    for (int l = 0; l < loads; ++l) sum = sum + static_cast<T>(next[l]);
  }
  for (; i < n; ++i) sum = sum + static_cast<T>(x[i * stride]);
  return sum;
}

/// Shared memory of a block: what each row of a round adds, then the sums so far.
template <class T>
struct round_tile {
  int rows = 0, experts = 0, words = 0, sum_width = 0, count_width = 0;

  std::size_t bytes() const {
    return sizeof(T) * static_cast<std::size_t>(rows * (2 * experts + 2) + sum_width) +
           sizeof(std::uint32_t) * static_cast<std::size_t>(rows * (words + 1) + count_width);
  }
  /// [rows, E]; +0 for padding.
  TALPA_HD T* probability(T* shared) const { return shared; }
  /// [rows, E]; +0 for an expert that is off.
  TALPA_HD T* gates(T* shared) const { return shared + rows * experts; }
  /// [rows]; +0 for padding.
  TALPA_HD T* squared_logsumexp(T* shared) const { return shared + 2 * rows * experts; }
  TALPA_HD T* entropy(T* shared) const { return squared_logsumexp(shared) + rows; }
  /// [sum_width]
  TALPA_HD T* sums(T* shared) const { return entropy(shared) + rows; }
  /// [rows, words + 1]: the mask, and 1 in the last word for a real token.
  TALPA_HD std::uint32_t* bits(T* shared) const {
    return reinterpret_cast<std::uint32_t*>(sums(shared) + sum_width);
  }
  /// [count_width]
  TALPA_HD std::uint32_t* counts(T* shared) const { return bits(shared) + rows * (words + 1); }
};

/// Blocks of canonical sums in chunks of sum_block_rows, whose sums are the next level; none across
/// two groups. Sets of neighbouring chunks have an arrival counter each.
struct sum_chunks {
  sum_blocks grid;
  index chunks;  // of a group
  index a_set;   // chunks
  index sets;    // below arrival_counters

  static sum_chunks of(const sum_blocks& grid) {
    const index chunks = ceil_div(grid.blocks, detail::sum_block_rows);
    const index most = detail::arrival_counters - 1;
    const index a_set = std::max(index{1}, ceil_div(grid.groups * chunks, most));
    return {grid, chunks, a_set, ceil_div(grid.groups * chunks, a_set)};
  }
  TALPA_HD index count() const { return grid.groups * chunks; }
  TALPA_HD index chunk(index block) const {
    return block / grid.blocks * chunks + block % grid.blocks / detail::sum_block_rows;
  }
  TALPA_HD index first_block(index chunk) const {
    return chunk / chunks * grid.blocks + chunk % chunks * detail::sum_block_rows;
  }
};

/// The sums over the rows of a block, which its threads leave in shared memory as they route them,
/// and the totals of all blocks. What does not enter a sum is added as +0, which changes no sum
/// that begins at +0.
template <class T, class B>
struct block_totals {
  matrix_view<const T, B> logits, gates;
  matrix_view<const std::uint32_t, B> mask;
  vector_view<const std::uint8_t, B> padding_mask;
  routing_target<T, B> to;
  sum_chunks split;
  round_tile<T> tile;
  matrix_view<T, B> sums;               // [blocks, sum_width]
  matrix_view<std::uint8_t, B> counts;  // [blocks, count_width]: a block has 128 rows at most
  matrix_view<T, B> chunk_sums;         // [chunks, sum_width]
  matrix_view<index, B> chunk_counts;   // [chunks, count_width]
  std::uint32_t* arrivals;

  template <class Block>
  TALPA_HD void begin(const Block& block) const {
    T* const shared = block.template shared<T>();
    for (int c = block.thread(); c < tile.sum_width; c += Block::threads()) {
      tile.sums(shared)[c] = T{0};
    }
    for (int e = block.thread(); e < tile.count_width; e += Block::threads()) {
      tile.counts(shared)[e] = 0;
    }
  }

  /// What token n, which this group has routed, adds: row r of the tile.
  template <class G>
  TALPA_HD void leave_row(const G& all, index n, int r, T* shared) const {
    const bool real = padding_mask.empty() || padding_mask[n] != 0;
    const auto on = all.load_mask(row_at(mask, n));
    if (to.at.importance >= 0) {
      const auto gate = all.load_row(row_at(gates, n), T{0});
      all.store_row(row_pointer<T>{tile.gates(shared) + r * tile.experts, 0},
                    [&](auto e) { return on(e) ? gate[e] : T{0}; });
    }
    if (tile.count_width > 0) {
      std::uint32_t* const bits = tile.bits(shared) + r * (tile.words + 1);
      all.store_mask(row_pointer<std::uint32_t>{bits, 0}, on);
      all.store(row_scalar<std::uint32_t>{bits + tile.words, 0}, real ? 1u : 0u);
    }
    if (to.at.softmax < 0) return;
    const row_pointer<T> probability{tile.probability(shared) + r * tile.experts, 0};
    const row_scalar<T> square{tile.squared_logsumexp(shared) + r, 0};
    const row_scalar<T> entropy{tile.entropy(shared) + r, 0};
    const auto g = all.only(all.works() && real);
    const auto scalars = detail::softmax_row(g, row_at(logits, n), probability);
    g.store(square, math::mul(scalars.logsumexp, scalars.logsumexp));
    g.store(entropy, scalars.entropy);
    const auto rest = all.only(all.works() && !real);
    rest.store_row(probability, [&](auto) { return T{0}; });
    rest.store(square, T{0});
    rest.store(entropy, T{0});
  }

  /// Adds the first `rows` of the tile; a thread has columns of its own.
  template <class Block>
  TALPA_HD void add_rows(const Block& block, int rows) const {
    T* const shared = block.template shared<T>();
    for (int c = block.thread(); c < tile.sum_width + tile.count_width; c += Block::threads()) {
      if (c < tile.sum_width) {
        T& sum = tile.sums(shared)[c];
        int stride = 1;
        const T* const x = column(shared, c, stride);
        sum = add_in_order(sum, x, rows, stride);
      } else {
        const int e = c - tile.sum_width;
        const int word = e < tile.experts ? e / 32 : tile.words;
        const int bit = e < tile.experts ? e % 32 : 0;
        std::uint32_t count = 0;
        const std::uint32_t* const bits = tile.bits(shared) + word;
        for (int r = 0; r < rows; ++r) count += bits[r * (tile.words + 1)] >> bit & 1u;
        tile.counts(shared)[e] += count;
      }
    }
  }

  /// Hands in the sums of this block. The last block of a set adds up its chunks, the last of these
  /// what is left.
  template <class Block>
  TALPA_HD void finish(const Block& block) const {
    T* const shared = block.template shared<T>();
    const index own = block.index();
    for (int c = block.thread(); c < tile.sum_width; c += Block::threads()) {
      sums(own, c) = tile.sums(shared)[c];
    }
    for (int e = block.thread(); e < tile.count_width; e += Block::threads()) {
      counts(own, e) = static_cast<std::uint8_t>(tile.counts(shared)[e]);
    }
    const index set = split.chunk(own) / split.a_set, first = set * split.a_set;
    const index last = first + split.a_set < split.count() ? first + split.a_set : split.count();
    const index blocks = split.first_block(last) - split.first_block(first);
    if (!block.last_of(static_cast<std::uint32_t>(blocks), arrivals + set)) return;
    const int columns = tile.sum_width + tile.count_width;
    for (index i = block.thread(); i < (last - first) * columns; i += Block::threads()) {
      add_chunk(first + i / columns, static_cast<int>(i % columns));
    }
    if (split.chunks == 1) return;
    const auto sets = static_cast<std::uint32_t>(split.sets);
    if (!block.last_of(sets, arrivals + split.sets)) return;
    for (index i = block.thread(); i < split.grid.groups * columns; i += Block::threads()) {
      const index g = i / columns, c = i % columns, row = g * split.chunks;
      if (c < tile.sum_width) {
        T* const x = chunk_sums.row(row) + c;
        to.put_sum(g, c, canonical_sum_in_place(x, split.chunks, chunk_sums.stride));
      } else {
        const index e = c - tile.sum_width;
        index* const x = chunk_counts.row(row) + e;
        to.put_count(g, e, canonical_sum_in_place(x, split.chunks, chunk_counts.stride));
      }
    }
  }

 private:
  /// Column c of the sums in the tile, `stride` from row to row.
  TALPA_HD const T* column(T* shared, int c, int& stride) const {
    if (c == to.at.squared_logsumexp) return tile.squared_logsumexp(shared);
    if (c == to.at.entropy) return tile.entropy(shared);
    stride = tile.experts;
    if (to.at.importance >= 0 && c >= to.at.importance) {
      return tile.gates(shared) + (c - to.at.importance);
    }
    return tile.probability(shared) + (c - to.at.probability);
  }
  TALPA_HD void add_chunk(index chunk, int c) const {
    const index first = split.first_block(chunk), n = split.first_block(chunk + 1) - first;
    if (c < tile.sum_width) {
      const T sum = add_in_order(T{0}, sums.row(first) + c, n, sums.stride);
      if (split.chunks == 1) {
        to.put_sum(chunk, c, sum);
      } else {
        chunk_sums(chunk, c) = sum;
      }
    } else {
      const int e = c - tile.sum_width;
      const index count = add_in_order(index{0}, counts.row(first) + e, n, counts.stride);
      if (split.chunks == 1) {
        to.put_count(chunk, e, count);
      } else {
        chunk_counts(chunk, e) = count;
      }
    }
  }
};

/// What a block does with rows that are routed, beside adding them up.
struct no_more_of_rows {
  template <class Block>
  TALPA_HD void operator()(const Block&, index, index) const {}
};

/// Routes the rows of one block of canonical sums, one lane group a row, as many at a time as the
/// threads serve.
template <int W, int Slots, class Row, class T, class B, class More>
struct route_body {
  Row row;
  block_totals<T, B> totals;
  More more;

  template <class Block>
  TALPA_HD void operator()(Block& block) const {
    constexpr int groups = Block::threads() / W;
    const warp_tile<W, Slots, Block> group(block, totals.tile.experts);
    const sum_blocks& grid = totals.split.grid;
    const index start = grid.first_row(block.index());
    const int rows = static_cast<int>(grid.rows(block.index())), own = block.thread() / W;
    totals.begin(block);
    for (int first = 0; first < rows; first += groups) {
      const int here = rows - first < groups ? rows - first : groups;
      // A whole warp, for its collectives.
      if (block.thread() / 32 * (32 / W) < here) {
        const auto g = group.only(own < here);
        const index n = start + first + (own < here ? own : here - 1);
        row(g, n);
        totals.leave_row(g, n, own, block.template shared<T>());
      }
      block.sync();
      totals.add_rows(block, here);
      more(block, start + first, start + first + here);
      block.sync();
    }
    totals.finish(block);
  }
};

/// Launches a route_body: row(n) makes gates and mask of token n, more(first, last) what else of
/// some rows.
template <class T, class B, class Row, class More>
void route_rows(context<B>& ctx, const char* function, const routed_rows<T, B>& in,
                const wanted_totals<T, B>& totals, const Row& row, const More& more) {
  const index experts = in.experts();
  const auto at = routing_columns::of(totals.out, experts, no_row_term::uses);
  const auto split = sum_chunks::of(sum_blocks::of(in));
  const index blocks = split.grid.count(), chunks = split.chunks == 1 ? 0 : split.count();
  const typename workspace<B>::scope scope(ctx.scratch);
  block_totals<T, B> sums{in.logits,
                          in.gates,
                          in.mask,
                          in.padding_mask,
                          {at, totals.out, totals.mode == grad_mode::overwrite},
                          split,
                          {},
                          ctx.scratch.template take<T>(blocks, at.sum_width),
                          ctx.scratch.template take<std::uint8_t>(blocks, at.count_width),
                          ctx.scratch.template take<T>(chunks, at.sum_width),
                          ctx.scratch.template take<index>(chunks, at.count_width),
                          ctx.arrivals()};
  with_group(function, experts, [&](auto width, auto slots) {
    constexpr int w = decltype(width)::value, s = decltype(slots)::value;
    sums.tile = {totals_threads / w, static_cast<int>(experts),
                 static_cast<int>(mask_words(experts)), static_cast<int>(at.sum_width),
                 static_cast<int>(at.count_width)};
    detail::launch<totals_threads>(ctx, blocks, sums.tile.bytes(),
                                   route_body<w, s, Row, T, B, More>{row, sums, more});
  });
}

}  // namespace talpa::kernels

namespace talpa::ops {

template <kernel_backend B>
struct route_impl<B> {
  template <class T, class Selector>
  static void route(context<B>& ctx, const Selector& selector, matrix_view<const T, B> logits,
                    vector_view<const std::uint8_t, B> padding_mask, matrix_view<T, B> gates,
                    matrix_view<std::uint32_t, B> mask, const wanted_totals<T, B>& totals,
                    const select_inputs<T, B>& more) {
    kernels::route_rows<T>(ctx, Selector::name,
                           {logits, gates, mask, padding_mask, totals.group_rows}, totals,
                           kernels::select_one_row<coupled_selector<Selector>, Selector, T, B>{
                               selector, logits, padding_mask, gates, mask, more},
                           kernels::no_more_of_rows{});
  }
};

}  // namespace talpa::ops
