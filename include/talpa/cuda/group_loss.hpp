// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/cuda/loops.hpp>
#include <talpa/cuda/routing_sums.hpp>
#include <talpa/ops/group_loss.hpp>

namespace talpa::kernels {

/// Lane group of a whole warp for rows of any length, with the members that a loss of sums needs:
/// lane l has the elements l, l + 32, ..., as the canonical reduction has them.
template <class Warp>
class long_row {
 public:
  template <class T>
  using value = T;
  struct element {
    index place;
    TALPA_HD std::int32_t expert() const { return static_cast<std::int32_t>(place); }
  };

  TALPA_HD long_row(const Warp& warp, index experts) : warp_(warp), experts_(experts) {}
  TALPA_HD index experts() const { return experts_; }
  template <class T>
  TALPA_HD static T uniform(T c) {
    return c;
  }
  template <class F>
  TALPA_HD void for_each(F f) const {
    warp_.for_each(experts_, [&](index e) { f(element{e}); });
  }
  template <class T>
  TALPA_HD static T load(row_pointer<const T> row, element e, T) {
    return row.data[e.place];
  }
  template <class T>
  TALPA_HD static void store(row_pointer<T> row, element e, T v) {
    row.data[e.place] = v;
  }
  template <class T>
  TALPA_HD void store(row_scalar<T> scalar, T v) const {
    if (warp_.lane() == 0) *scalar.data = v;
  }
  template <class T, class F>
  TALPA_HD void store_row(row_pointer<T> row, F f) const {
    for_each([&](element e) { row.data[e.place] = f(e); });
  }
  template <class T, class F>
  TALPA_HD T sum(F f) const {
    return warp_.template sum<T>(experts_, [&](index e) { return f(element{e}); });
  }

 private:
  const Warp& warp_;
  index experts_;
};

/// Calls f(group, r) for each row, however long.
template <class F>
struct long_row_loop {
  F f;
  index experts;

  template <class Warp>
  TALPA_HD void operator()(const Warp& warp, index r) const {
    f(long_row<Warp>(warp, experts), r);
  }
};

/// A loss over rows that may be longer than a row of experts, `static constexpr bool long_rows =
/// true`; it asks its group for sums and single elements only.
template <class Loss>
concept long_row_loss = requires {
  requires Loss::long_rows;
};

/// *weight = 1 / the number of groups that have a real token, 0 when there is none.
template <class T, class B>
struct group_weight {
  vector_view<index, B> tokens;
  T* weight;

  template <class Warp>
  TALPA_HD void operator()(const Warp& warp, index) const {
    const index live =
        warp.template sum<index>(tokens.size, [&](index g) { return index{tokens[g] > 0}; });
    if (warp.lane() == 0) *weight = live > 0 ? T{1} / static_cast<T>(live) : T{0};
  }
};

/// The value of one group and its derivatives, weighed.
template <class Loss, class T, class B>
struct group_loss_row {
  Loss loss;
  routing_totals<T, B> totals;
  routing_totals_gradient<T, B> derivative;
  matrix_view<T, B> counts;  // [groups, E]
  vector_view<T, B> values;  // [groups]
  const T* weight;           // no data: 1

  template <class G>
  TALPA_HD void operator()(const G& g, index n) const {
    const T factor = weight == nullptr ? T{1} : *weight;
    totals_row<T> in{static_cast<T>(totals.tokens[n]), {}, {}, {}, T{0}};
    totals_derivative_row<T> out;
    if (Loss::uses.counts) {
      const row_pointer<const index> from{totals.counts.row(n), 0};
      g.store_row(row_pointer<T>{counts.row(n), 0},
                  [&](auto e) { return static_cast<T>(g.load(from, e, index{0})); });
      in.counts = {counts.row(n), 0};
    }
    if (Loss::uses.probability) {
      in.probability = {totals.probability.row(n), 0};
      out.probability = {derivative.probability.row(n), 0};
    }
    if (Loss::uses.importance) {
      in.importance = {totals.importance.row(n), 0};
      out.importance = {derivative.importance.row(n), 0};
    }
    if (Loss::uses.affinity) {
      in.affinity = {totals.affinity.row(n), 0};
      out.affinity = {derivative.affinity.row(n), 0};
    }
    if (Loss::uses.squared_logsumexp) in.squared_logsumexp = totals.squared_logsumexp[n];
    if (Loss::uses.row_term) in.row_term = totals.row_term[n];
    const group_value<T> result = loss(g, in, out);
    put(g, values.data + n, math::mul(factor, result.value));
    if (Loss::uses.probability) scale(g, out.probability, factor);
    if (Loss::uses.importance) scale(g, out.importance, factor);
    if (Loss::uses.affinity) scale(g, out.affinity, factor);
    if (Loss::uses.row_term) {
      put(g, derivative.row_term.data + n, math::mul(factor, result.row_term));
    }
    if (Loss::uses.squared_logsumexp) {
      put(g, derivative.squared_logsumexp.data + n, math::mul(factor, result.squared_logsumexp));
    }
  }

 private:
  template <class G>
  TALPA_HD static void put(const G& g, T* to, T value) {
    g.store(row_scalar<T>{to, 0}, value);
  }
  /// Each lane reads what it wrote itself.
  template <class G>
  TALPA_HD static void scale(const G& g, row_pointer<T> row, T factor) {
    const row_pointer<const T> now{row.data, row.stride};
    g.store_row(row, [&](auto e) { return math::mul(factor, g.load(now, e, T{0})); });
  }
};

/// value (+)= the canonical sum of the values of the groups.
template <class T, class B>
struct group_loss_sum {
  vector_view<T, B> values;
  matrix_view<T, B> value;
  bool overwrite;

  TALPA_HD void operator()(index, index) const {
    const T sum =
        values.size > 0 ? canonical_sum_in_place(values.data, values.size, index{1}) : T{0};
    value(0, 0) = overwrite ? sum : value(0, 0) + sum;
  }
};

}  // namespace talpa::kernels

namespace talpa::ops {

template <kernel_backend B>
struct group_loss_impl<B> {
  template <class T, class Loss>
  static void run(context<B>& ctx, const Loss& loss, group_reduction reduction, index experts,
                  const routing_totals<T, B>& totals,
                  const routing_totals_gradient<T, B>& derivative, matrix_view<T, B> value,
                  grad_mode mode) {
    const index groups = totals.tokens.size;
    const typename workspace<B>::scope scope(ctx.scratch);
    const bool mean = reduction == group_reduction::mean;
    const auto weight = ctx.scratch.template take<T>(1);
    const auto counts =
        ctx.scratch.template take<T>(Loss::uses.counts ? groups : index{0}, experts);
    const auto values = ctx.scratch.template take<T>(groups);
    if (mean) {
      kernels::for_each_row(ctx, 1, kernels::group_weight<T, B>{totals.tokens, weight.data});
    }
    if (groups > 0) {
      const kernels::group_loss_row<Loss, T, B> row{loss,   totals, derivative,
                                                    counts, values, mean ? weight.data : nullptr};
      if constexpr (kernels::long_row_loss<Loss>) {
        kernels::for_each_row(
            ctx, groups, kernels::long_row_loop<kernels::group_loss_row<Loss, T, B>>{row, experts});
      } else {
        kernels::for_each_warp_group(ctx, "ops::group_loss", groups, experts, row);
      }
    }
    kernels::for_each_element(
        ctx, 1, 1, kernels::group_loss_sum<T, B>{values, value, mode == grad_mode::overwrite});
  }
};

}  // namespace talpa::ops
