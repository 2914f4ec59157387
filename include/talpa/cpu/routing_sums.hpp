// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/cpu/segments.hpp>
#include <talpa/cpu/select.hpp>
#include <talpa/cpu/token_pack.hpp>
#include <talpa/ops/routing_sums.hpp>

#include <algorithm>
#include <cstdint>
#include <type_traits>

namespace talpa::detail {

/// Row 0 of `rows` becomes the canonical sum of its rows, which it uses up: sum_block_rows rows at
/// a time, in order, until one is left.
template <class T>
void sum_rows_in_place(matrix_view<T, cpu> rows) {
  for (index left = rows.rows; left > 1; left = ceil_div(left, sum_block_rows)) {
    for (index first = 0; first < left; first += sum_block_rows) {
      const index last = std::min(first + sum_block_rows, left);
      T* const to = rows.row(first / sum_block_rows);
      if (to != rows.row(first)) std::copy_n(rows.row(first), rows.cols, to);
      for (index r = first + 1; r < last; ++r) {
        const T* const from = rows.row(r);
        for (index c = 0; c < rows.cols; ++c) to[c] += from[c];
      }
    }
  }
}

/// Consecutive values as a pack.
template <int W, class T>
[[gnu::always_inline]] inline pack<T, W> load_pack(const T* x) {
  pack<T, W> p;
  __builtin_memcpy(&p.v, x, sizeof(p.v));
  return p;
}
template <int W, class T>
[[gnu::always_inline]] inline void store_pack(T* x, const pack<T, W>& p) {
  __builtin_memcpy(x, &p.v, sizeof(p.v));
}

/// part(w) for columns from c on, w = Width of them at a time as long as there are so many, then
/// half as many, down to 4; part moves c.
template <int Width, class Part>
[[gnu::always_inline]] inline void in_packs(const index& c, index columns, const Part& part) {
  while (c + Width <= columns) part(std::integral_constant<int, Width>{});
  if constexpr (Width >= 8) in_packs<Width / 2>(c, columns, part);
}

/// sum[c] += rows[i][c] for the rows i with real(i), ascending.
template <class T, class Real>
[[gnu::always_inline]] inline void add_rows(const T* rows, index stride, index count, index columns,
                                            Real real, T* sum) {
  constexpr int width = packed_tokens<T>;
  index c = 0;
  if constexpr (width > 1) {
    in_packs<width>(
        c, columns, [&](auto w) __attribute__((always_inline)) {
          auto total = load_pack<w.value>(sum + c);
          for (index i = 0; i < count; ++i) {
            if (real(i)) total = total + load_pack<w.value>(rows + i * stride + c);
          }
          store_pack(sum + c, total);
          c += w.value;
        });
  }
  for (; c < columns; ++c) {
    for (index i = 0; i < count; ++i) {
      if (real(i)) sum[c] += rows[i * stride + c];
    }
  }
}

/// sum[c] += rows[i][c] for the rows i that have expert c, ascending; Parts registers of `Width`
/// columns, the first of which is bit `first` of its word. What is left out is added as +0, which
/// changes no sum that begins at +0.
template <int Parts, int Width, class T>
void add_chosen_columns(const std::uint32_t* words, index word_stride, int first, const T* rows,
                        index stride, index count, T* sum) {
  pack<T, Width> totals[Parts] = {};
  pack<std::int32_t, Width> bits[Parts] = {};
  for (int p = 0; p < Parts; ++p) {
    totals[p] = load_pack<Width>(sum + p * Width);
    for (int i = 0; i < Width; ++i) {
      bits[p].v[i] = static_cast<std::int32_t>(1u << (first + p * Width + i));
    }
  }
  const auto zero = splat<T, Width>(T{0});
  for (index n = 0; n < count; ++n) {
    const auto word = static_cast<std::int32_t>(words[n * word_stride]);
#pragma GCC unroll 8
    for (int p = 0; p < Parts; ++p) {
      const pack<bool, Width> on{(bits[p].v & word) == bits[p].v};
      totals[p] =
          totals[p] + talpa::select(on, load_pack<Width>(rows + n * stride + p * Width), zero);
    }
  }
  for (int p = 0; p < Parts; ++p) store_pack(sum + p * Width, totals[p]);
}
/// The same for all columns.
template <class T>
void add_chosen(const std::uint32_t* words, index word_stride, const T* rows, index stride,
                index count, index experts, T* sum) {
  constexpr int width = packed_tokens<T>;
  index c = 0;
  if constexpr (width > 1) {
    const auto add = [&](auto parts, auto w) {
      add_chosen_columns<parts.value, w.value>(words + c / mask_word_bits, word_stride,
                                               static_cast<int>(c % mask_word_bits), rows + c,
                                               stride, count, sum + c);
      c += parts.value * w.value;
    };
    // A register of columns waits for each of its sums, four at a time wait together; they lie in
    // one word, as 4 width divides 32 or is taken to.
    constexpr int most = mask_word_bits / width < 4 ? mask_word_bits / width : 4;
    while (c + most * width <= experts) {
      add(std::integral_constant<int, most>{}, std::integral_constant<int, width>{});
    }
    in_packs<width>(c, experts, [&](auto w) { add(std::integral_constant<int, 1>{}, w); });
  }
  for (; c < experts; ++c) {
    for (index n = 0; n < count; ++n) {
      const std::uint32_t word = words[n * word_stride + c / mask_word_bits];
      if (((word >> (c % mask_word_bits)) & 1u) != 0) sum[c] += rows[n * stride + c];
    }
  }
}

}  // namespace talpa::detail

namespace talpa::ops {

template <>
struct routing_sums_impl<cpu> {
  template <class T, class Term>
  static void forward(context<cpu>& ctx, const routed_rows<T, cpu>& in,
                      const routing_totals<T, cpu>& out, grad_mode mode, const Term& term) {
    const index experts = in.experts();
    const block_grid grid(in);
    const columns wanted(out, experts, Term::uses);
    const workspace<cpu>::scope scope(ctx.scratch);
    const matrix_view<T, cpu> sums = ctx.scratch.take<T>(grid.count(), wanted.width);
    const matrix_view<index, cpu> counts = ctx.scratch.take<index>(grid.count(), experts + 1);
    const row_memory<T> memory(ctx, experts, experts);

    detail::parallel_for(ctx, grid.count(), [&](index block, int thread) {
      T* const sum = sums.row(block);
      index* const count = counts.row(block);
      std::fill_n(sum, sums.cols, T{0});
      std::fill_n(count, counts.cols, index{0});
      const index first = grid.first_row(block), rows = grid.rows(block);
      for_each_real_run(in, first, rows, [&](index n, index run) {
        count[experts] += run;
        const std::uint32_t* const words = in.mask.row(n);
        detail::count_experts(words, in.mask.stride, run, experts, count);
        if (wanted.importance >= 0) {
          detail::add_chosen(words, in.mask.stride, in.gates.row(n), in.gates.stride, run, experts,
                             sum + wanted.importance);
        }
      });
      if constexpr (has_term<Term>) {
        memory.for_each_pack(thread, rows, [&](const auto& group, index r, int valid, T* tile) {
          const auto number = term.template forward<T>(group, row_of<Term>(in, first + r),
                                                       row_pointer<T>{tile, experts});
          const auto is_real = [&](index i) { return real(in, first + r + i); };
          if (Term::uses.affinity) {
            detail::add_rows(tile, experts, valid, experts, is_real, sum + wanted.affinity);
          }
          if (Term::uses.number) add_lanes(number, valid, is_real, sum + wanted.row_term);
        });
      }
      if (!wanted.logits()) return;
      const auto logits = in.logits.row_range(first, rows);
      memory.for_each_pack(thread, logits, [&](const auto& group, index r, int valid, T* tile) {
        const auto scalars = detail::softmax_row(group, detail::row_at(in.logits, first + r),
                                                 row_pointer<T>{tile, experts});
        const auto is_real = [&](index i) { return real(in, first + r + i); };
        if (wanted.probability >= 0) {
          detail::add_rows(tile, experts, valid, experts, is_real, sum + wanted.probability);
        }
        if (wanted.squared_logsumexp >= 0) {
          const auto square = math::mul(scalars.logsumexp, scalars.logsumexp);
          add_lanes(square, valid, is_real, sum + wanted.squared_logsumexp);
        }
        if (wanted.entropy >= 0) add_lanes(scalars.entropy, valid, is_real, sum + wanted.entropy);
      });
    });

    detail::parallel_for(ctx, grid.groups, [&](index g, int) {
      detail::sum_rows_in_place(sums.row_range(g * grid.blocks, grid.blocks));
      detail::sum_rows_in_place(counts.row_range(g * grid.blocks, grid.blocks));
      const T* const sum = sums.row(g * grid.blocks);
      const index* const count = counts.row(g * grid.blocks);
      const auto put = [&](auto* to, const auto* from, index size) {
        for (index i = 0; i < size; ++i)
          to[i] = mode == grad_mode::overwrite ? from[i] : to[i] + from[i];
      };
      if (out.tokens.data != nullptr) put(&out.tokens[g], count + experts, 1);
      if (out.counts.data != nullptr) put(out.counts.row(g), count, experts);
      if (wanted.probability >= 0) put(out.probability.row(g), sum + wanted.probability, experts);
      if (wanted.importance >= 0) put(out.importance.row(g), sum + wanted.importance, experts);
      if (wanted.squared_logsumexp >= 0) {
        put(&out.squared_logsumexp[g], sum + wanted.squared_logsumexp, 1);
      }
      if (wanted.entropy >= 0) put(&out.entropy[g], sum + wanted.entropy, 1);
      if (wanted.affinity >= 0) put(out.affinity.row(g), sum + wanted.affinity, experts);
      if (wanted.row_term >= 0) put(&out.row_term[g], sum + wanted.row_term, 1);
    });
  }

  template <class T, class Term>
  static void backward(context<cpu>& ctx, const routed_rows<T, cpu>& in,
                       const routing_totals_gradient<T, cpu>& dout, matrix_view<const T, cpu> scale,
                       matrix_view<T, cpu> dlogits, matrix_view<T, cpu> dgates, grad_mode mode,
                       const Term& term, const routed_rows_gradient<T, cpu>& more) {
    const index experts = in.experts();
    const block_grid grid(in);
    const bool overwrite = mode == grad_mode::overwrite;
    const bool logits_matter =
        dout.probability.data != nullptr || dout.squared_logsumexp.data != nullptr;
    const T factor = scale(0, 0);
    const workspace<cpu>::scope scope(ctx.scratch);
    // A row term writes dlogits, dgates, dcontrol, dclean and ddeviation of a pack one behind the
    // other.
    const bool noise = Term::uses.noise && !in.deviation.empty();
    const index term_columns = (noise ? 4 : 2) * experts + 1;
    const row_memory<T> memory(ctx, experts, has_term<Term> ? term_columns : experts);

    detail::parallel_for(ctx, grid.count(), [&](index block, int thread) {
      const index g = block / grid.blocks;
      const index first = grid.first_row(block), rows = grid.rows(block);
      for (index n = first; n < first + rows; ++n) {
        if (overwrite) {
          std::fill_n(dgates.row(n), experts, T{0});
          std::fill_n(dlogits.row(n), experts, T{0});
          if (!more.dcontrol.empty()) more.dcontrol(n, 0) = T{0};
          if (!more.dclean.empty()) std::fill_n(more.dclean.row(n), experts, T{0});
          if (!more.ddeviation.empty()) std::fill_n(more.ddeviation.row(n), experts, T{0});
        }
        if (dout.importance.data == nullptr || !real(in, n)) continue;
        detail::for_each_expert(in.mask.row(n), experts, [&](index e) {
          dgates(n, e) += math::mul(factor, dout.importance(g, e));
        });
      }
      if constexpr (has_term<Term>) {
        row_term_gradient<T> wanted{{}, T{0}, factor};
        if (Term::uses.affinity) wanted.affinity = {dout.affinity.row(g), 0};
        if (Term::uses.number) wanted.number = dout.row_term[g];
        memory.for_each_pack(thread, rows, [&](const auto& group, index r, int valid, T* tile) {
          T* const gates_tile = tile + valid * experts;
          T* const control_tile = gates_tile + valid * experts;
          T* const clean_tile = control_tile + valid;
          T* const deviation_tile = clean_tile + valid * experts;
          routed_row_gradient<T> to{{tile, experts}, {}, {}};
          if (Term::uses.gates) to.dgates = {gates_tile, experts};
          if (Term::uses.control) to.dcontrol = {control_tile, 1};
          if (noise) to.dclean = {clean_tile, experts};
          if (noise) to.ddeviation = {deviation_tile, experts};
          term.template backward<T>(group, row_of<Term>(in, first + r), wanted, to);
          for (int i = 0; i < valid; ++i) {
            const index n = first + r + i;
            if (!real(in, n)) continue;
            for (index e = 0; e < experts; ++e) {
              dlogits(n, e) += tile[i * experts + e];
              if (Term::uses.gates) dgates(n, e) += gates_tile[i * experts + e];
              if (noise) more.dclean(n, e) += clean_tile[i * experts + e];
              if (noise) more.ddeviation(n, e) += deviation_tile[i * experts + e];
            }
            if (Term::uses.control) more.dcontrol(n, 0) += control_tile[i];
          }
        });
      }
      if (!logits_matter) return;
      detail::totals_gradient_row<T> gradient{{}, T{0}, factor};
      // Stride 0: every token of a pack reads the row of its group.
      if (dout.probability.data != nullptr) gradient.probability = {dout.probability.row(g), 0};
      if (dout.squared_logsumexp.data != nullptr) {
        gradient.squared_logsumexp = dout.squared_logsumexp[g];
      }
      memory.for_each_pack(thread, rows, [&](const auto& group, index r, int valid, T* tile) {
        detail::softmax_row_backward(group, detail::row_at(in.logits, first + r), gradient,
                                     row_pointer<T>{tile, experts});
        for (int i = 0; i < valid; ++i) {
          const index n = first + r + i;
          if (!real(in, n)) continue;
          T* const to = dlogits.row(n);
          for (index e = 0; e < experts; ++e) to[e] += tile[i * experts + e];
        }
      });
    });
  }

 private:
  /// The blocks of canonical sums: `blocks` to a group, at least one, none across two groups.
  struct block_grid {
    template <class T>
    explicit block_grid(const routed_rows<T, cpu>& in)
        : groups(in.groups()),
          group_rows(in.group_rows == 0 ? in.tokens() : in.group_rows),
          blocks(std::max(index{1}, ceil_div(group_rows, detail::sum_block_rows))) {}

    index count() const { return groups * blocks; }
    index first_row(index block) const { return block / blocks * group_rows + inside(block); }
    index rows(index block) const {
      return std::min(detail::sum_block_rows, group_rows - inside(block));
    }

    index groups, group_rows, blocks;

   private:
    /// First row of a block in its group.
    index inside(index block) const { return block % blocks * detail::sum_block_rows; }
  };

  /// Where each wanted sum begins in the row of sums of a block; -1: not wanted.
  struct columns {
    template <class T>
    columns(const routing_totals<T, cpu>& out, index experts, const row_term_uses& term) {
      const auto place = [&](bool is_wanted, index size) {
        if (!is_wanted) return index{-1};
        width += size;
        return width - size;
      };
      probability = place(out.probability.data != nullptr, experts);
      importance = place(out.importance.data != nullptr, experts);
      squared_logsumexp = place(out.squared_logsumexp.data != nullptr, 1);
      entropy = place(out.entropy.data != nullptr, 1);
      affinity = place(term.affinity, experts);
      row_term = place(term.number, 1);
    }
    bool logits() const { return probability >= 0 || squared_logsumexp >= 0 || entropy >= 0; }

    index width = 0;
    index probability, importance, squared_logsumexp, entropy, affinity, row_term;
  };

  template <class Term>
  static constexpr bool has_term = Term::uses.affinity || Term::uses.number;

  template <class Term, class T>
  static routed_row<T> row_of(const routed_rows<T, cpu>& in, index n) {
    routed_row<T> row{
        detail::row_at(in.logits, n), detail::row_at(in.gates, n), detail::row_at(in.mask, n), {}};
    if (Term::uses.control) row.control = detail::scalar_at(in.control, n);
    if (Term::uses.noise) {
      row.clean = detail::row_at(in.clean, n);
      if (!in.deviation.empty()) row.deviation = detail::row_at(in.deviation, n);
    }
    return row;
  }

  /// For each thread the arrays of a lane group and a tile of result rows.
  template <class T>
  class row_memory {
   public:
    row_memory(context<cpu>& ctx, index experts, index tile_columns)
        : experts_(experts),
          packed_(width > 1 && experts <= detail::packed_experts),
          lane_bytes_(lane_scratch::bytes_for(experts, packed_ ? width : 1)),
          lanes_(ctx.scratch.take<std::byte>(static_cast<index>(lane_bytes_) * ctx.threads).data),
          tiles_(ctx.scratch.take<T>(ctx.threads, (packed_ ? width : 1) * tile_columns)) {}

    /// Calls row(group, r, valid, tile) for rows r .. r + valid - 1 until all are done; results go
    /// to the tile [valid, columns] because rows of padding must not be written. It begins by
    /// reading the rows `read` [rows, E], a view without data where it does not.
    template <class Row>
    void for_each_pack(int thread, matrix_view<const T, cpu> read, Row row) const {
      const index rows = read.rows;
      lane_scratch scratch(lanes_ + static_cast<std::size_t>(thread) * lane_bytes_, lane_bytes_);
      T* const tile = tiles_.row(thread);
      for (index r = 0; r < rows; r += packed_ ? width : 1) {
        scratch.reset();
        if constexpr (width > 1) {
          const int valid = static_cast<int>(std::min<index>(width, rows - r));
          const auto next = upcoming_rows::of<width>(read, r + width);
          if (packed_) row(token_pack<width>(experts_, valid, &scratch, next), r, valid, tile);
        }
        if (!packed_) row(serial(experts_, &scratch), r, 1, tile);
      }
    }
    template <class Row>
    void for_each_pack(int thread, index rows, Row row) const {
      for_each_pack(thread, matrix_view<const T, cpu>{nullptr, rows, experts_, 0}, row);
    }

   private:
    static constexpr int width = detail::packed_tokens<T>;
    index experts_;
    bool packed_;
    std::size_t lane_bytes_;
    std::byte* lanes_;
    matrix_view<T, cpu> tiles_;
  };

  template <class T>
  static bool real(const routed_rows<T, cpu>& in, index n) {
    return in.padding_mask.empty() || in.padding_mask[n] != 0;
  }
  /// Calls f(n, count) for the rows n .. n + count - 1 of each run of real tokens.
  template <class T, class F>
  static void for_each_real_run(const routed_rows<T, cpu>& in, index first, index rows, F f) {
    if (in.padding_mask.empty()) {
      if (rows > 0) f(first, rows);
      return;
    }
    const index last = first + rows;
    for (index n = first; n < last;) {
      index end = n;
      while (end < last && real(in, end)) ++end;
      if (end > n) f(n, end - n);
      n = end + 1;
    }
  }
  /// sum += the numbers of the tokens i with real(i), ascending.
  template <class T, class Real>
  static void add_lanes(T x, int, Real real, T* sum) {
    if (real(0)) *sum += x;
  }
  template <class T, int W, class Real>
  static void add_lanes(const pack<T, W>& x, int valid, Real real, T* sum) {
    const auto values = detail::values_of(x);
    for (int i = 0; i < valid; ++i) {
      if (real(i)) *sum += values.v[i];
    }
  }
};

}  // namespace talpa::ops
