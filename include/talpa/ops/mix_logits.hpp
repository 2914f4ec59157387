// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/check.hpp>
#include <talpa/core/lanes.hpp>
#include <talpa/core/mode.hpp>
#include <talpa/core/scalar.hpp>
#include <talpa/core/view.hpp>

#include <cstdint>
#include <limits>
#include <type_traits>

namespace talpa {

/// The weights of R routers for each token, as mix_gates makes them.
template <class T, class B>
struct mix_weights {
  matrix_view<T, B> gates;      // [N, R] softmax over the kept main logits, 0 elsewhere
  matrix_view<T, B> log_gates;  // [N, R] their logarithms, -inf elsewhere
};

/// One row of mix_gates: main [R] -> gates, log_gates [R], mask [ceil(R / 32)].
template <class T>
struct mix_gates_row {
  row_pointer<const T> main;
  row_pointer<T> gates;
  row_pointer<T> log_gates;
  row_pointer<std::uint32_t> mask;
};
/// One row of its backward: gates, dlog_gates [R] -> dmain [R].
template <class T>
struct mix_gates_gradient_row {
  row_pointer<const T> gates;
  row_pointer<const T> dlog_gates;
  row_pointer<T> dmain;
};

/// One row of mix_logits; the lane group runs over the E experts.
template <class T>
struct mix_row {
  row_pointer<const T> subs;       // [R E]
  row_pointer<const T> gates;      // [R]
  row_pointer<const T> log_gates;  // [R]
  row_pointer<T> normaliser;       // [R], written by mix::probability
  row_pointer<T> logits;           // [E]
};
/// One row of its backward.
template <class T>
struct mix_gradient_row {
  row_pointer<const T> subs;        // [R E]
  row_pointer<const T> gates;       // [R]
  row_pointer<const T> log_gates;   // [R]
  row_pointer<const T> normaliser;  // [R]
  row_pointer<const T> logits;      // [E]
  row_pointer<const T> dlogits;     // [E]
  row_pointer<T> dsubs;             // [R E]
  row_pointer<T> dlog_gates;        // [R]
};

namespace detail {

/// Element r of a row of R numbers, as the group of the experts reads it.
template <class T>
TALPA_HD row_scalar<T> mix_number(row_pointer<T> row, index r) {
  return {row.data + r, row.stride};
}
/// Router r of a row [R E].
template <class T>
TALPA_HD row_pointer<T> mix_part(row_pointer<T> row, index r, index experts) {
  return {row.data + r * experts, row.stride};
}

/// The m largest of the main logits, ties to the lower index, and the softmax over them.
struct mix_gates_functor {
  index keep;

  template <class G, class T>
  TALPA_HD void operator()(const G& g, const mix_gates_row<T>& row) const {
    constexpr T infinity = std::numeric_limits<T>::infinity();
    const auto minus_infinity = g.uniform(-infinity);
    auto u = g.template elements<T>();
    g.for_each([&](auto r) { u[r] = g.load(row.main, r, -infinity); });
    const auto logit = [&](auto r) { return u[r]; };

    auto last_logit = g.uniform(infinity);
    auto last_router = g.uniform(std::int32_t{-1});
    for (index pick = 0; pick < keep; ++pick) {
      const auto next = g.template arg_max<T>(logit, [&](auto r) {
        const auto offered = u[r] > minus_infinity;
        const auto lower = u[r] < last_logit, equal = u[r] == last_logit;
        const auto later = r.expert() > last_router;
        return offered & (lower | (equal & later));
      });
      const auto found = next.expert > g.uniform(std::int32_t{-1});
      last_logit = talpa::select(found, next.value, last_logit);
      last_router = talpa::select(found, next.expert, last_router);
    }
    const auto kept = [&](auto r) {
      const auto offered = u[r] > minus_infinity;
      const auto higher = u[r] > last_logit, equal = u[r] == last_logit;
      const auto not_later = r.expert() <= last_router;
      return offered & (higher | (equal & not_later));
    };

    const auto zero = g.uniform(T{0});
    const auto top = g.template max<T>(logit);
    const auto unordered = g.count([&](auto r) { return !(u[r] == u[r]); });
    const auto nan = g.uniform(std::numeric_limits<T>::quiet_NaN());
    const auto broken = unordered > g.uniform(std::int32_t{0});
    auto weight = g.template elements<T>();
    g.for_each([&](auto r) { weight[r] = talpa::select(kept(r), math::exp(u[r] - top), zero); });
    const auto counted = g.template sum<T>([&](auto r) { return weight[r]; });
    const auto some = counted > zero;
    const auto none = !some;
    const auto sum = talpa::select(broken | none, nan, counted);
    const auto log_sum = math::log(sum);
    const auto valid = sum == sum, invalid = !valid;
    g.for_each([&](auto r) {
      g.store(row.gates, r, weight[r] / sum);
      const auto chosen = kept(r);
      const auto log_gate = (u[r] - top) - log_sum;
      g.store(row.log_gates, r, talpa::select(chosen | invalid, log_gate, minus_infinity));
    });
    const auto fallback = g.uniform(static_cast<std::int32_t>(keep));
    g.store_mask(row.mask, [&](auto r) {
      const auto chosen = kept(r);
      const auto first = r.expert() < fallback;
      return (valid & chosen) | (invalid & first);
    });
  }
};

struct mix_gates_gradient_functor {
  template <class G, class T>
  TALPA_HD void operator()(const G& g, const mix_gates_gradient_row<T>& row) const {
    const auto total = g.template sum<T>([&](auto r) { return g.load(row.dlog_gates, r, T{0}); });
    g.for_each([&](auto r) {
      g.store(row.dmain, r,
              math::fma(-g.load(row.gates, r, T{0}), total, g.load(row.dlog_gates, r, T{0})));
    });
  }
};

}  // namespace detail

/// What is mixed.
namespace mix {

/// The probabilities: s = sum_r g_r softmax(a_r), logits = ln s, so that softmax(logits) is s.
struct probability {
  template <class G, class T>
  TALPA_HD static void forward(const G& g, index routers, const mix_row<T>& row) {
    constexpr T infinity = std::numeric_limits<T>::infinity();
    const auto minus_infinity = g.uniform(-infinity), zero = g.uniform(T{0});
    // logits_e = best + ln total, grown router by router.
    auto best = g.template elements<T>(), total = g.template elements<T>();
    g.for_each([&](auto e) {
      best[e] = minus_infinity;
      total[e] = zero;
    });
    for (index r = 0; r < routers; ++r) {
      const auto sub = detail::mix_part(row.subs, r, g.experts());
      const auto top = g.template max<T>([&](auto e) { return g.load(sub, e, -infinity); });
      const auto sum =
          g.template sum<T>([&](auto e) { return math::exp(g.load(sub, e, -infinity) - top); });
      const auto normaliser = top + math::log(sum);
      g.store(detail::mix_number(row.normaliser, r), normaliser);
      const auto log_gate = g.load(detail::mix_number(row.log_gates, r));
      g.for_each([&](auto e) {
        const auto t = term<T>(g, g.load(sub, e, -infinity), normaliser, log_gate);
        const auto higher = talpa::select(t > best[e], t, best[e]);
        const auto shift = talpa::select(higher == minus_infinity, zero, higher);
        total[e] = math::fma(total[e], math::exp(best[e] - shift), math::exp(t - shift));
        best[e] = higher;
      });
    }
    g.for_each([&](auto e) {
      const auto shift = talpa::select(best[e] == minus_infinity, zero, best[e]);
      g.store(row.logits, e, shift + math::log(total[e]));
    });
  }

  template <class G, class T>
  TALPA_HD static void backward(const G& g, index routers, const mix_gradient_row<T>& row) {
    constexpr T infinity = std::numeric_limits<T>::infinity();
    const auto minus_infinity = g.uniform(-infinity), zero = g.uniform(T{0});
    auto share = g.template elements<T>();
    for (index r = 0; r < routers; ++r) {
      const auto sub = detail::mix_part(row.subs, r, g.experts());
      const auto out = detail::mix_part(row.dsubs, r, g.experts());
      const auto normaliser = g.load(detail::mix_number(row.normaliser, r));
      const auto log_gate = g.load(detail::mix_number(row.log_gates, r));
      // The part of d logits_e that router r has: g_r p_re / s_e of it.
      g.for_each([&](auto e) {
        const auto joint = g.load(row.logits, e, -infinity);
        const auto t = term<T>(g, g.load(sub, e, -infinity), normaliser, log_gate);
        const auto some = !(joint == minus_infinity);
        const auto part = talpa::select(some, math::exp(t - joint), zero);
        share[e] = talpa::select(some, math::mul(g.load(row.dlogits, e, T{0}), part), zero);
      });
      const auto whole = g.template sum<T>([&](auto e) { return share[e]; });
      g.store(detail::mix_number(row.dlog_gates, r), whole);
      const auto off = log_gate == minus_infinity;
      g.for_each([&](auto e) {
        const auto p = math::exp(g.load(sub, e, -infinity) - normaliser);
        g.store(out, e, talpa::select(off, zero, math::fma(-p, whole, share[e])));
      });
    }
  }

 private:
  /// ln (g_r p_re), -inf for a router that is off whatever it says.
  template <class T, class G, class V>
  TALPA_HD static V term(const G& g, const V& logit, const V& normaliser, const V& log_gate) {
    const auto minus_infinity = g.uniform(-std::numeric_limits<T>::infinity());
    const auto off = log_gate == minus_infinity;
    return talpa::select(off, minus_infinity, (logit - normaliser) + log_gate);
  }
};

/// The logits: logits = sum_r g_r a_r.
struct logit {
  template <class G, class T>
  TALPA_HD static void forward(const G& g, index routers, const mix_row<T>& row) {
    const auto zero = g.uniform(T{0});
    auto total = g.template elements<T>();
    g.for_each([&](auto e) { total[e] = zero; });
    for (index r = 0; r < routers; ++r) {
      const auto sub = detail::mix_part(row.subs, r, g.experts());
      const auto gate = g.load(detail::mix_number(row.gates, r));
      const auto off = gate == zero;
      g.for_each([&](auto e) {
        const auto a = talpa::select(off, zero, g.load(sub, e, T{0}));
        total[e] = math::fma(gate, a, total[e]);
      });
    }
    g.for_each([&](auto e) { g.store(row.logits, e, total[e]); });
  }

  template <class G, class T>
  TALPA_HD static void backward(const G& g, index routers, const mix_gradient_row<T>& row) {
    const auto zero = g.uniform(T{0});
    const auto minus_infinity = g.uniform(-std::numeric_limits<T>::infinity());
    for (index r = 0; r < routers; ++r) {
      const auto sub = detail::mix_part(row.subs, r, g.experts());
      const auto out = detail::mix_part(row.dsubs, r, g.experts());
      const auto gate = g.load(detail::mix_number(row.gates, r));
      const auto off = gate == zero;
      const auto slope = g.template sum<T>([&](auto e) {
        const auto a = g.load(sub, e, T{0});
        const auto masked = a == minus_infinity;
        return talpa::select(off | masked, zero, math::mul(a, g.load(row.dlogits, e, T{0})));
      });
      g.store(detail::mix_number(row.dlog_gates, r),
              talpa::select(off, zero, math::mul(gate, slope)));
      g.for_each([&](auto e) { g.store(out, e, math::mul(gate, g.load(row.dlogits, e, T{0}))); });
    }
  }
};

}  // namespace mix

}  // namespace talpa

namespace talpa::ops {

template <class B>
struct mix_logits_impl {
  static_assert(detail::always_false<B>,
                "talpa: ops::mix_logits has no implementation for this backend here, include "
                "talpa/cpu/mix_logits.hpp for cpu, talpa/cuda/mix_logits.hpp for gpu "
                "(docs/architecture.md)");
};

/// The weights of R routers: g = softmax over the `keep` largest main logits of a token, 0
/// elsewhere, with their logarithms and a mask of those that were kept.
///
/// Shapes: main, gates and log_gates [N, R], mask [N, ceil(R / 32)].
/// Parameters: keep, 1..R; ties go to the lower index.
/// Edges: a row with NaN or +inf, or -inf everywhere, gets NaN.
/// Determinism: same bits on every backend, group and number of threads.
/// Throws: shape_error, value_error.
template <class B, floating T>
void mix_gates(context<B>& ctx, index keep, input<T, B> main, const mix_weights<T, B>& weights,
               output<std::uint32_t, B> mask) {
  check_at_least("ops::mix_gates", "main", main.cols, 1, "columns, one a router");
  check_range("ops::mix_gates", "keep", keep, 1, main.cols, "routers");
  check_shape("ops::mix_gates", "gates", weights.gates, main.rows, main.cols, "shape of main");
  check_shape("ops::mix_gates", "log_gates", weights.log_gates, main.rows, main.cols,
              "shape of main");
  check_shape("ops::mix_gates", "mask", mask, main.rows, mask_words(main.cols),
              "tokens, mask words of the routers");
  mix_logits_impl<B>::gates(ctx, keep, main, weights, mask);
}

/// Gradient of mix_gates from that of the logarithms: dmain_r = c_r - g_r sum_q c_q with c =
/// dlog_gates, which is 0 where a router is off.
template <class B, floating T>
void mix_gates_backward(context<B>& ctx, input<T, B> gates, input<T, B> dlog_gates,
                        matrix_view<T, B> dmain) {
  check_shape("ops::mix_gates_backward", "gates", gates, dmain.rows, dmain.cols, "shape of dmain");
  check_shape("ops::mix_gates_backward", "dlog_gates", dlog_gates, dmain.rows, dmain.cols,
              "shape of dmain");
  mix_logits_impl<B>::gates_backward(ctx, gates, dlog_gates, dmain);
}

/// Mixes the logits of R routers to those of one, as Mix says.
///
/// Forward: mix::probability: logits = ln sum_r g_r softmax(a_r); mix::logit: sum_r g_r a_r. With
/// R = 1 logits = a for both.
/// Shapes: subs [N, R E], router by router; gates and log_gates [N, R]; normaliser [N, R], which
/// receives ln sum_e exp(a_re) with mix::probability; logits [N, E].
/// Edges: a router with gate 0 has no influence, whatever its logits. Of the others: an expert
/// with -inf from all (probability) or from any (logit) gets -inf; NaN or +inf gives NaN or +inf;
/// -inf everywhere in one gives NaN (probability).
/// Cost: two exponentials an element of subs with mix::probability, none with mix::logit.
/// Determinism: same bits on every backend, group and number of threads.
/// Throws: shape_error.
template <class Mix, class B, floating T>
void mix_logits(context<B>& ctx, Mix, input<T, B> subs,
                const std::type_identity_t<mix_weights<T, B>>& weights, output<T, B> normaliser,
                matrix_view<T, B> logits) {
  const index routers = weights.gates.cols;
  check_shape("ops::mix_logits", "gates", weights.gates, logits.rows, routers, "rows of logits");
  check_shape("ops::mix_logits", "log_gates", weights.log_gates, logits.rows, routers,
              "shape of gates");
  check_shape("ops::mix_logits", "subs", subs, logits.rows, routers * logits.cols,
              "tokens, routers times experts");
  check_shape("ops::mix_logits", "normaliser", normaliser, logits.rows, routers, "shape of gates");
  mix_logits_impl<B>::template forward<Mix>(ctx, subs, weights, normaliser, logits);
}

/// Gradient of mix_logits: dsubs [N, R E] and, for mix_gates_backward, dlog_gates [N, R], both
/// overwritten.
///
/// mix::probability: with q_re = g_r p_re / s_e, dlog_gates_r = sum_e q_re dlogits_e and
/// dsubs_re = q_re dlogits_e - p_re dlog_gates_r. mix::logit: dsubs_re = g_r dlogits_e,
/// dlog_gates_r = g_r sum_e a_re dlogits_e.
/// Edges: R = 1 gives dsubs = dlogits, dlog_gates = 0. A logit of -inf gets no gradient from
/// mix::probability and adds nothing to dlog_gates.
/// Throws: shape_error.
template <class Mix, class B, floating T>
void mix_logits_backward(context<B>& ctx, Mix, input<T, B> subs,
                         const std::type_identity_t<mix_weights<T, B>>& weights,
                         input<T, B> normaliser, input<T, B> logits, input<T, B> dlogits,
                         matrix_view<T, B> dsubs, output<T, B> dlog_gates) {
  const index routers = weights.gates.cols;
  check_shape("ops::mix_logits_backward", "subs", subs, logits.rows, routers * logits.cols,
              "tokens, routers times experts");
  check_shape("ops::mix_logits_backward", "gates", weights.gates, logits.rows, routers,
              "rows of logits");
  check_shape("ops::mix_logits_backward", "log_gates", weights.log_gates, logits.rows, routers,
              "shape of gates");
  check_shape("ops::mix_logits_backward", "normaliser", normaliser, logits.rows, routers,
              "shape of gates");
  check_shape("ops::mix_logits_backward", "dlogits", dlogits, logits.rows, logits.cols,
              "shape of logits");
  check_shape("ops::mix_logits_backward", "dsubs", dsubs, logits.rows, subs.cols, "shape of subs");
  check_shape("ops::mix_logits_backward", "dlog_gates", dlog_gates, logits.rows, routers,
              "shape of gates");
  mix_logits_impl<B>::template backward<Mix>(ctx, subs, weights, normaliser, logits, dlogits, dsubs,
                                             dlog_gates);
}

}  // namespace talpa::ops
