// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/half.hpp>
#include <talpa/core/view.hpp>
#include <talpa/cuda/kernel.hpp>
#include <talpa/cuda/quad.hpp>
#include <talpa/cuda/tile_operand.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>

namespace talpa::kernels {

/// `depth` terms of Size rows of a left operand, or columns of a right one, in shared memory: lines
/// of chunks of 8 neighbours, 16 bytes. With Along a line is a row with its terms; without it is a
/// term with all rows. The order of the chunks in a line depends on the line so that eight lines of
/// a block of fragments lie in different banks.
template <class S, int Size, bool Along>
struct operand_slab {
  static constexpr int depth = 32;
  static constexpr int line_chunks = (Along ? depth : Size) / 8;
  static constexpr int lines = Along ? Size : depth;
  static constexpr int size = Size * depth;  // numbers
  static_assert(line_chunks == 4 || line_chunks % 8 == 0);

  /// Where a chunk begins.
  TALPA_HD static int place(int line, int chunk) {
    return 8 * (line * line_chunks + (chunk ^ (line_chunks == 4 ? line / 2 % 4 : line % 8)));
  }

  /// Where this lane's line begins for the fragments of rows `outer` .. outer + 15 and terms `term`
  /// .. term + 15, words in the order of a left or a right operand of multiply_add.
  template <bool Right>
  TALPA_HD static int line_of(int lane, int outer, int term) {
    // Of the four blocks of 8 x 8 numbers: the second rows, the second terms.
    const int rows = Right ? lane / 16 : lane / 8 % 2, terms = Right ? lane / 8 % 2 : lane / 16;
    if constexpr (Along) {
      return place(outer + 8 * rows + lane % 8, term / 8 + terms);
    } else {
      return place(term + 8 * terms + lane % 8, outer / 8 + rows);
    }
  }
};

/// The fragments that a warp takes of a slab: Count blocks of 16 rows of an operand, from the first
/// on.
template <class S, int Size, bool Along, bool Right, int Count>
class fragment_reader {
  using slab_type = operand_slab<S, Size, Along>;
  static constexpr int steps = slab_type::depth / 16;
  // Sixteen lines further on the chunks of a line have the same order.
  static constexpr int sixteen_lines = 16 * slab_type::line_chunks * 8;

 public:
  TALPA_HD fragment_reader(int lane, int first) {
    TALPA_UNROLL
    for (int i = 0; i < (Along ? steps : Count); ++i) {
      lines_[i] = slab_type::template line_of<Right>(lane, Along ? first : first + 16 * i,
                                                     Along ? 16 * i : 0);
    }
  }
  template <class Block>
  TALPA_HD void load(const Block& block, const S* slab, int step,
                     std::uint32_t (&to)[Count][4]) const {
    TALPA_UNROLL
    for (int i = 0; i < Count; ++i) {
      const int line = Along ? lines_[step] + i * sixteen_lines : lines_[i] + step * sixteen_lines;
      block.template load_fragments<!Along>(to[i], slab + line);
    }
  }

 private:
  int lines_[Along ? steps : Count];
};

/// What a thread copies of an operand, slab after slab from the first term on: the chunks of one
/// column of a slab, `apart` lines from each other.
template <class S, int Size, bool Along, int Threads>
class slab_reader {
  using slab_type = operand_slab<S, Size, Along>;
  static constexpr int depth = slab_type::depth;
  static constexpr int apart = Threads / slab_type::line_chunks;
  static constexpr int count = slab_type::lines / apart;
  // So the order of the chunks in a line is the same for all of them.
  static_assert(slab_type::lines % apart == 0 && apart % 8 == 0);

 public:
  TALPA_HD slab_reader(const tile_operand<S>& o, index inner, int thread)
      : data_(o.data),
        rows_(o.rows),
        step_(static_cast<int>(Along ? o.outer_step : o.inner_step)),
        left_(static_cast<int>(inner)),
        line_(thread / slab_type::line_chunks),
        chunk_(thread % slab_type::line_chunks),
        place_(slab_type::place(line_, chunk_)) {
    const int outer = o.outer < Size ? static_cast<int>(o.outer) : Size;
    aligned_ = step_ % 8 == 0 && reinterpret_cast<std::uintptr_t>(data_) % 16 == 0;
    across_ = 8;
    if constexpr (!Along) {
      across_ = outer - 8 * chunk_;
      if (across_ <= 0) {
        chunk_ = 0;
        across_ = outer < 8 ? outer : 8;
      }
    }
    data_ += 8 * chunk_;
    whole_ = aligned_ && across_ >= 8;
    TALPA_UNROLL
    for (int i = 0; i < count; ++i) {
      // Sums of rows that do not exist go nowhere, so that any numbers do for their terms.
      const int line = line_ + i * apart, end = Along ? outer : left_;
      from_[i] = bytes_of(data_ + (line < end ? o.row(line) * step_ : 0));
    }
    if constexpr (!Along) find_rows();
  }

  /// Copies the next slab; zeros for terms that do not exist.
  template <class Block>
  TALPA_HD void copy(const Block& block, S* slab) {
    S* const to = slab + place_;
    if (whole_ && left_ >= depth) {
      TALPA_UNROLL
      for (int i = 0; i < count; ++i) block.copy_async(to + i * place_step, from_[i] + offset_);
    } else {
      TALPA_UNROLL
      for (int i = 0; i < count; ++i) copy_some(block, to + i * place_step, i);
    }
    left_ -= depth;
    if (Along || rows_ == nullptr) {
      offset_ += static_cast<index>(sizeof(S)) * (Along ? depth : index{depth} * step_);
    } else {
      TALPA_UNROLL
      for (int i = 0; i < count; ++i) from_[i] = bytes_of(data_ + index{next_[i]} * step_);
      find_rows();
    }
  }

 private:
  static constexpr int place_step = apart * slab_type::line_chunks * 8;

  TALPA_HD static const std::byte* bytes_of(const S* p) {
    return reinterpret_cast<const std::byte*>(p);
  }
  /// Where the terms stand that follow the next slab's: asked a slab before they count.
  TALPA_HD void find_rows() {
    const int last = left_ - depth - 1;
    if (rows_ == nullptr || last < 0) return;
    rows_ += depth;
    TALPA_UNROLL
    for (int i = 0; i < count; ++i) {
      const int line = line_ + i * apart;
      next_[i] = rows_[line < last ? line : last];
    }
  }
  template <class Block>
  TALPA_HD void copy_some(const Block& block, S* to, int i) const {
    const int numbers = Along ? left_ - 8 * chunk_ : line_ + i * apart < left_ ? across_ : 0;
    if (aligned_ && numbers >= 8) {
      block.copy_async(to, from_[i] + offset_);
    } else {
      const S* const from = reinterpret_cast<const S*>(from_[i] + offset_);
      for (int j = 0; j < 8; ++j) to[j] = j < numbers ? from[j] : static_cast<S>(0.0f);
    }
  }

  const S* data_;
  const std::int32_t* rows_;
  int step_;  // from row to row
  int left_;  // terms
  int line_, chunk_, place_;
  int across_;  // numbers from the chunk's first on, with rows beside each other
  bool aligned_, whole_;
  // One offset for all of them: an address that a copy still reads is not overwritten.
  const std::byte* from_[count];
  index offset_ = 0;
  std::int32_t next_[count] = {};
};

/// A tile [M, N] of a product on tensor cores, with sums in float, by a block of four warps. Slabs
/// of the operands travel to shared memory while earlier ones are multiplied; the sums go out
/// through shared memory, so that neighbours leave together. AlongA, AlongB: whether the terms of a
/// row of a, of a column of b, are neighbours, else rows or columns are.
template <half_storage S, int M, int N, bool AlongA, bool AlongB>
struct tensor_tile {
  static constexpr int threads = 128, m = M, n = N;

  static constexpr std::size_t shared_bytes() {
    return std::max(sizeof(S) * stages * stage_size, sizeof(float) * M * sum_stride);
  }

  /// put(m, n, sum over k < inner of a(m, k) b(n, k)) for m < M, n < N inside both operands, or
  /// put.four(m, n, sums) for columns n .. n + 3. All threads of the block call it together.
  template <class Block, class Put>
  TALPA_HD static void run(Block& block, const tile_operand<S>& a, const tile_operand<S>& b,
                           index inner, const Put& put) {
    S* const slabs = block.template shared<S>();
    const int thread = block.thread(), lane = thread % 32;
    const int row = thread / 32 / warp_columns * warp_m,
              column = thread / 32 % warp_columns * warp_n;
    const int count = static_cast<int>((inner + depth - 1) / depth);
    slab_reader<S, M, AlongA, threads> of_a(a, inner, thread);
    slab_reader<S, N, AlongB, threads> of_b(b, inner, thread);
    const fragment_reader<S, M, AlongA, false, warp_m / 16> rows(lane, row);
    const fragment_reader<S, N, AlongB, true, warp_n / 16> columns(lane, column);
    const auto place_of = [&](int slab) { return slabs + slab % stages * stage_size; };
    float sums[warp_m / 16][warp_n / 8][4] = {};
    TALPA_UNROLL
    for (int slab = 0; slab < stages - 1; ++slab) {
      if (slab < count) {
        of_a.copy(block, place_of(slab));
        of_b.copy(block, place_of(slab) + slab_a::size);
      }
      block.commit_copies();
    }
    for (int slab = 0; slab < count; ++slab) {
      block.template wait_copies<stages - 2>();
      block.sync();  // this slab is there for all, and nobody reads the one before
      const S* const here = place_of(slab);
      if (slab + stages - 1 < count) {
        S* const later = place_of(slab + stages - 1);
        of_a.copy(block, later);
        of_b.copy(block, later + slab_a::size);
      }
      block.commit_copies();
      TALPA_UNROLL
      for (int step = 0; step < depth / 16; ++step) {
        std::uint32_t x[warp_m / 16][4], y[warp_n / 16][4];
        rows.load(block, here, step, x);
        columns.load(block, here + slab_a::size, step, y);
        block.template multiply_add<S>(sums, x, y);
      }
    }
    block.sync();                                       // the slabs have served
    float* const out = block.template shared<float>();  // [M, N]
    TALPA_UNROLL
    for (int i = 0; i < warp_m / 16; ++i) {
      TALPA_UNROLL
      for (int j = 0; j < warp_n / 8; ++j) {
        float* const to =
            out + (row + 16 * i + lane / 4) * sum_stride + column + 8 * j + lane % 4 * 2;
        to[0] = sums[i][j][0];
        to[1] = sums[i][j][1];
        to[8 * sum_stride] = sums[i][j][2];
        to[8 * sum_stride + 1] = sums[i][j][3];
      }
    }
    block.sync();
    for (int i = thread; i < M * (N / 4); i += threads) {
      const int to_m = i / (N / 4), to_n = i % (N / 4) * 4;
      if (to_m >= a.outer) break;
      const quad<float> four = load_quad(out + to_m * sum_stride + to_n);
      if (to_n + 3 < b.outer) {
        put.four(to_m, to_n, four);
      } else {
        TALPA_UNROLL
        for (int j = 0; j < 4; ++j) {
          if (to_n + j < b.outer) put(to_m, to_n + j, four.v[j]);
        }
      }
    }
  }

 private:
  using slab_a = operand_slab<S, M, AlongA>;
  using slab_b = operand_slab<S, N, AlongB>;
  static constexpr int depth = slab_a::depth, stages = 4, stage_size = slab_a::size + slab_b::size;
  // A warp takes a square where both sides are long.
  static constexpr int warp_columns = N >= 64 ? 2 : 1, warp_n = N / warp_columns,
                       warp_m = M * warp_columns * 32 / threads;
  static_assert(warp_m % 16 == 0 && warp_n % 16 == 0);
  // Eight more a row: the four rows of a half warp lie in different banks.
  static constexpr int sum_stride = N + 8;
};

}  // namespace talpa::kernels
