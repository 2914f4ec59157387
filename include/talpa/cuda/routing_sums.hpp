// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/cuda/loops.hpp>
#include <talpa/cuda/select.hpp>
#include <talpa/ops/routing_sums.hpp>

#include <algorithm>
#include <cstdint>

namespace talpa::kernels {

/// The canonical sum of x[0], x[stride], ..., x[(n - 1) stride], n > 0, which it uses up:
/// sum_block_rows of them at a time, in order, until one is left.
template <class T>
TALPA_HD T canonical_sum_in_place(T* x, index n, index stride) {
  for (index left = n; left > 1;
       left = (left + detail::sum_block_rows - 1) / detail::sum_block_rows) {
    for (index first = 0; first < left; first += detail::sum_block_rows) {
      const index last =
          first + detail::sum_block_rows < left ? first + detail::sum_block_rows : left;
      T sum = x[first * stride];
      for (index i = first + 1; i < last; ++i) sum = sum + x[i * stride];
      x[first / detail::sum_block_rows * stride] = sum;
    }
  }
  return x[0];
}

/// The blocks of canonical sums: `blocks` to a group, at least one, none across two groups.
struct sum_blocks {
  index groups, group_rows, blocks;

  template <class T, class B>
  static sum_blocks of(const routed_rows<T, B>& in) {
    const index rows = in.group_rows == 0 ? in.tokens() : in.group_rows;
    return {in.groups(), rows, std::max(index{1}, ceil_div(rows, detail::sum_block_rows))};
  }
  index count() const { return groups * blocks; }
  TALPA_HD index first_row(index block) const {
    return block / blocks * group_rows + inside(block);
  }
  TALPA_HD index rows(index block) const {
    const index left = group_rows - inside(block);
    return left < detail::sum_block_rows ? left : detail::sum_block_rows;
  }
  /// First row of a block in its group.
  TALPA_HD index inside(index block) const { return block % blocks * detail::sum_block_rows; }
};

/// Where each quantity begins, -1 where it is not wanted. In front stand the columns that every
/// token writes into a row of its own: first those that are summed, then a place for the
/// probabilities where only what comes with them is. Sums of gates and counts need no such row.
struct routing_columns {
  index experts;
  index squared_logsumexp = -1, entropy = -1, row_term = -1, affinity = -1, probability = -1;
  index importance = -1, counts = -1;
  index softmax = -1;     // the probabilities in the row of a token; -1: not computed
  index row_sums = 0;     // columns of that row that are summed
  index row_width = 0;    // all of its columns
  index sum_width = 0;    // columns of sums in T
  index count_width = 0;  // columns of counts; column E is the number of tokens

  template <class T, class B>
  static routing_columns of(const routing_totals<T, B>& out, index experts,
                            const row_term_uses& term) {
    routing_columns c{experts};
    const auto place = [&](bool wanted, index size) {
      if (!wanted) return index{-1};
      c.row_sums += size;
      return c.row_sums - size;
    };
    c.squared_logsumexp = place(out.squared_logsumexp.data != nullptr, 1);
    c.entropy = place(out.entropy.data != nullptr, 1);
    c.row_term = place(term.number, 1);
    c.affinity = place(term.affinity, experts);
    c.probability = place(out.probability.data != nullptr, experts);
    c.row_width = c.sum_width = c.row_sums;
    if (c.probability >= 0) {
      c.softmax = c.probability;
    } else if (c.squared_logsumexp >= 0 || c.entropy >= 0) {
      c.softmax = c.row_sums;
      c.row_width += experts;
    }
    if (out.importance.data != nullptr) {
      c.importance = c.sum_width;
      c.sum_width += experts;
    }
    if (out.counts.data != nullptr || out.tokens.data != nullptr) c.count_width = experts + 1;
    return c;
  }

  /// Where column c of the sums goes.
  template <class T, class B>
  TALPA_HD T& target(const routing_totals<T, B>& out, index g, index c) const {
    if (c == squared_logsumexp) return out.squared_logsumexp[g];
    if (c == entropy) return out.entropy[g];
    if (c == row_term) return out.row_term[g];
    if (importance >= 0 && c >= importance) return out.importance(g, c - importance);
    if (probability >= 0 && c >= probability) return out.probability(g, c - probability);
    return out.affinity(g, c - affinity);
  }
};

template <class Term>
inline constexpr bool has_row_term = Term::uses.affinity || Term::uses.number;

template <class T, class B>
TALPA_HD bool is_real(const routed_rows<T, B>& in, index n) {
  return in.padding_mask.empty() || in.padding_mask[n] != 0;
}

template <class Term, class T, class B>
TALPA_HD routed_row<T> routed_row_at(const routed_rows<T, B>& in, index n) {
  routed_row<T> row{row_at(in.logits, n), row_at(in.gates, n), row_at(in.mask, n), {}};
  if (Term::uses.control) row.control = scalar_at(in.control, n);
  if (Term::uses.noise) {
    row.clean = row_at(in.clean, n);
    if (!in.deviation.empty()) row.deviation = row_at(in.deviation, n);
  }
  return row;
}

/// What a token adds to the sums, into its row of `values`.
template <class Term, class T, class B>
struct routing_row_values {
  routed_rows<T, B> in;
  routing_columns at;
  matrix_view<T, B> values;  // [N, row_width]
  Term term;

  template <class G>
  TALPA_HD void operator()(const G& all, index n) const {
    const auto g = all.only(all.works() && is_real(in, n));
    T* const row = values.row(n);
    if constexpr (has_row_term<Term>) {
      const row_pointer<T> affinity{Term::uses.affinity ? row + at.affinity : nullptr, 0};
      const T number = term.template forward<T>(g, routed_row_at<Term>(in, n), affinity);
      if (Term::uses.number) g.store(row_scalar<T>{row + at.row_term, 0}, number);
    }
    if (at.softmax < 0) return;
    const auto scalars =
        detail::softmax_row(g, row_at(in.logits, n), row_pointer<T>{row + at.softmax, 0});
    if (at.squared_logsumexp >= 0) {
      g.store(row_scalar<T>{row + at.squared_logsumexp, 0},
              math::mul(scalars.logsumexp, scalars.logsumexp));
    }
    if (at.entropy >= 0) g.store(row_scalar<T>{row + at.entropy, 0}, scalars.entropy);
  }
};

/// The sum of each column over the real rows of each block, in order from +0.
template <class T, class B>
struct routing_block_sums {
  routed_rows<T, B> in;
  routing_columns at;
  sum_blocks grid;
  matrix_view<T, B> values;      // [N, row_width]
  matrix_view<T, B> sums;        // [blocks, sum_width]
  matrix_view<index, B> counts;  // [blocks, count_width]

  TALPA_HD void operator()(index block, index c) const {
    const index first = grid.first_row(block), last = first + grid.rows(block);
    if (c < at.row_sums) {
      T sum{0};
      for (index n = first; n < last; ++n) {
        if (is_real(in, n)) sum = sum + values(n, c);
      }
      sums(block, c) = sum;
    } else if (c < at.sum_width) {
      const index e = c - at.importance;
      T sum{0};
      for (index n = first; n < last; ++n) {
        if (is_real(in, n) && on(n, e)) sum = sum + in.gates(n, e);
      }
      sums(block, c) = sum;
    } else {
      const index e = c - at.sum_width;
      index count = 0;
      for (index n = first; n < last; ++n) {
        count += is_real(in, n) && (e == at.experts || on(n, e)) ? 1 : 0;
      }
      counts(block, e) = count;
    }
  }
  TALPA_HD bool on(index n, index e) const {
    return ((in.mask(n, e / mask_word_bits) >> (e % mask_word_bits)) & 1u) != 0;
  }
};

/// Where the totals of groups go, and whether they overwrite what is there.
template <class T, class B>
struct routing_target {
  routing_columns at;
  routing_totals<T, B> out;
  bool overwrite;

  /// Column c of the sums of group g.
  TALPA_HD void put_sum(index g, index c, T sum) const { put(at.target(out, g, c), sum); }
  /// The count of expert e; of the tokens for e = E.
  TALPA_HD void put_count(index g, index e, index count) const {
    if (e < at.experts) {
      if (out.counts.data != nullptr) put(out.counts(g, e), count);
    } else if (out.tokens.data != nullptr) {
      put(out.tokens[g], count);
    }
  }

 private:
  template <class U>
  TALPA_HD void put(U& to, U sum) const {
    to = overwrite ? sum : to + sum;
  }
};

/// The totals of each group.
template <class T, class B>
struct routing_group_sums {
  routing_target<T, B> to;
  sum_blocks grid;
  matrix_view<T, B> sums;
  matrix_view<index, B> counts;

  TALPA_HD void operator()(index g, index c) const {
    const index first = g * grid.blocks, e = c - to.at.sum_width;
    if (e < 0) {
      to.put_sum(g, c, canonical_sum_in_place(sums.row(first) + c, grid.blocks, sums.stride));
    } else {
      to.put_count(g, e, canonical_sum_in_place(counts.row(first) + e, grid.blocks, counts.stride));
    }
  }
};

/// The gradients of one token.
template <class Term, class T, class B>
struct routing_sums_backward_row {
  routed_rows<T, B> in;
  routing_totals_gradient<T, B> dout;
  matrix_view<const T, B> scale;
  matrix_view<T, B> dlogits, dgates;
  routed_rows_gradient<T, B> more;
  matrix_view<T, B> tiles;  // [N, columns] a row of results for each token
  index group_rows;
  bool overwrite;
  Term term;

  template <class G>
  TALPA_HD void operator()(const G& all, index n) const {
    if (overwrite) {
      clear(all, dgates, n);
      clear(all, dlogits, n);
      if (!more.dcontrol.empty()) all.store(scalar_at(more.dcontrol, n), T{0});
      if (!more.dclean.empty()) clear(all, more.dclean, n);
      if (!more.ddeviation.empty()) clear(all, more.ddeviation, n);
    }
    const auto g = all.only(all.works() && is_real(in, n));
    const index group = n / group_rows, experts = in.experts();
    const T factor = scale(0, 0);
    if (dout.importance.data != nullptr) {
      const auto on = g.load_mask(row_at(in.mask, n));
      const row_pointer<T> to = row_at(dgates, n);
      const row_pointer<const T> wanted{dout.importance.row(group), 0};
      g.for_each([&](auto e) {
        if (!on(e)) return;
        g.store(to, e, g.load(constant(to), e, T{0}) + math::mul(factor, g.load(wanted, e, T{0})));
      });
    }
    if constexpr (has_row_term<Term>) {
      const bool noise = Term::uses.noise && !in.deviation.empty();
      T* const tile = tiles.row(n);
      const row_pointer<T> control{tile, 0}, logits{tile + 1, 0}, gates{tile + 1 + experts, 0},
          clean{tile + 1 + 2 * experts, 0}, deviation{tile + 1 + 3 * experts, 0};
      row_term_gradient<T> wanted{{}, T{0}, factor};
      if (Term::uses.affinity) wanted.affinity = {dout.affinity.row(group), 0};
      if (Term::uses.number) wanted.number = dout.row_term[group];
      routed_row_gradient<T> to{logits, {}, {}};
      if (Term::uses.gates) to.dgates = gates;
      if (Term::uses.control) to.dcontrol = {control.data, 0};
      if (noise) to.dclean = clean;
      if (noise) to.ddeviation = deviation;
      term.template backward<T>(g, routed_row_at<Term>(in, n), wanted, to);
      add(g, dlogits, n, logits);
      if (Term::uses.gates) add(g, dgates, n, gates);
      if (noise) add(g, more.dclean, n, clean);
      if (noise) add(g, more.ddeviation, n, deviation);
      if (Term::uses.control) {
        // The lane that holds expert 0 writes what a row has once.
        g.for_each([&](auto e) {
          if (e.expert() == 0 && g.works())
            more.dcontrol(n, 0) = more.dcontrol(n, 0) + control.data[0];
        });
      }
    }
    if (dout.probability.data == nullptr && dout.squared_logsumexp.data == nullptr) return;
    detail::totals_gradient_row<T> gradient{{}, T{0}, factor};
    if (dout.probability.data != nullptr) gradient.probability = {dout.probability.row(group), 0};
    if (dout.squared_logsumexp.data != nullptr) {
      gradient.squared_logsumexp = dout.squared_logsumexp[group];
    }
    const row_pointer<T> result{tiles.row(n) + 1, 0};
    detail::softmax_row_backward(g, row_at(in.logits, n), gradient, result);
    add(g, dlogits, n, result);
  }

 private:
  TALPA_HD static row_pointer<const T> constant(row_pointer<T> row) {
    return {row.data, row.stride};
  }
  template <class G>
  TALPA_HD static void clear(const G& g, matrix_view<T, B> rows, index n) {
    g.store_row(row_at(rows, n), [&](auto) { return T{0}; });
  }
  /// Each lane reads what it wrote itself.
  template <class G>
  TALPA_HD static void add(const G& g, matrix_view<T, B> rows, index n, row_pointer<T> more) {
    const row_pointer<T> to = row_at(rows, n);
    g.store_row(to, [&](auto e) {
      return g.load(constant(to), e, T{0}) + g.load(constant(more), e, T{0});
    });
  }
};

}  // namespace talpa::kernels

namespace talpa::ops {

template <kernel_backend B>
struct routing_sums_impl<B> {
  template <class T, class Term>
  static void forward(context<B>& ctx, const routed_rows<T, B>& in, const routing_totals<T, B>& out,
                      grad_mode mode, const Term& term) {
    const auto at = kernels::routing_columns::of(out, in.experts(), Term::uses);
    const auto grid = kernels::sum_blocks::of(in);
    const typename workspace<B>::scope scope(ctx.scratch);
    const auto values = ctx.scratch.template take<T>(in.tokens(), at.row_width);
    const auto sums = ctx.scratch.template take<T>(grid.count(), at.sum_width);
    const auto counts = ctx.scratch.template take<index>(grid.count(), at.count_width);
    if (at.row_width > 0) {
      kernels::for_each_group(ctx, "ops::routing_sums", in.tokens(), in.experts(),
                              kernels::routing_row_values<Term, T, B>{in, at, values, term});
    }
    const index columns = at.sum_width + at.count_width;
    kernels::for_each_element(
        ctx, grid.count(), columns,
        kernels::routing_block_sums<T, B>{in, at, grid, values, sums, counts});
    kernels::for_each_element(ctx, grid.groups, columns,
                              kernels::routing_group_sums<T, B>{
                                  {at, out, mode == grad_mode::overwrite}, grid, sums, counts});
  }

  template <class T, class Term>
  static void backward(context<B>& ctx, const routed_rows<T, B>& in,
                       const routing_totals_gradient<T, B>& dout, matrix_view<const T, B> scale,
                       matrix_view<T, B> dlogits, matrix_view<T, B> dgates, grad_mode mode,
                       const Term& term, const routed_rows_gradient<T, B>& more) {
    const bool noise = Term::uses.noise && !in.deviation.empty();
    const index arrays = !kernels::has_row_term<Term> ? 1 : noise ? 4 : 2;
    const typename workspace<B>::scope scope(ctx.scratch);
    const auto tiles = ctx.scratch.template take<T>(in.tokens(), 1 + arrays * in.experts());
    kernels::for_each_group(
        ctx, "ops::routing_sums_backward", in.tokens(), in.experts(),
        kernels::routing_sums_backward_row<Term, T, B>{
            in, dout, scale, dlogits, dgates, more, tiles,
            in.group_rows == 0 ? in.tokens() : in.group_rows, mode == grad_mode::overwrite, term});
  }
};

}  // namespace talpa::ops
