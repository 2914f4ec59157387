// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/check.hpp>
#include <talpa/core/lanes.hpp>
#include <talpa/core/mode.hpp>
#include <talpa/core/scalar.hpp>

#include <cstdint>
#include <limits>
#include <string>

namespace talpa {

/// What routing_sums reads: a routing with its logits, and how its tokens fall into groups of
/// consecutive rows (the sequences of a batch, or all of it).
template <class T, backend B>
struct routed_rows {
  matrix_view<const T, B> logits;                     // [N, E]
  matrix_view<const T, B> gates;                      // [N, E]
  matrix_view<const std::uint32_t, B> mask;           // [N, ceil(E / 32)]
  vector_view<const std::uint8_t, B> padding_mask{};  // [N], 0 for padding; empty: no padding
  index group_rows = 0;  ///< tokens of a group, a divisor of N; 0: all tokens are one group
  matrix_view<const T, B> control{};    // [N, 1], empty without one
  matrix_view<const T, B> clean{};      // [N, E] logits before noise, empty without one
  matrix_view<const T, B> deviation{};  // [N, E] of the noise, empty where none was drawn

  TALPA_HD index tokens() const { return logits.rows; }
  TALPA_HD index experts() const { return logits.cols; }
  TALPA_HD index groups() const { return group_rows == 0 ? 1 : tokens() / group_rows; }
};

/// Sums over the real tokens of each group. A member without data is not wanted.
template <class T, backend B>
struct routing_totals {
  vector_view<index, B> tokens{};         // [G] number of real tokens
  matrix_view<index, B> counts{};         // [G, E] tokens for which expert e is on
  matrix_view<T, B> probability{};        // [G, E] sum of softmax(logits)_e
  matrix_view<T, B> importance{};         // [G, E] sum of gates_e
  vector_view<T, B> squared_logsumexp{};  // [G] sum of (ln sum_e exp(logits_e))^2
  vector_view<T, B> entropy{};            // [G] sum of the Shannon entropy of softmax(logits), nats
  matrix_view<T, B> affinity{};           // [G, E] sum of the array of a row term
  vector_view<T, B> row_term{};           // [G] sum of the number of a row term
};

/// Totals that an op which routes leaves beside the routing.
template <class T, backend B>
struct wanted_totals {
  routing_totals<T, B> out;
  grad_mode mode = grad_mode::overwrite;  ///< whether `out` is overwritten or added to
  index group_rows = 0;                   ///< as in routed_rows
};

/// Gradient with respect to a routing_totals. A member without data stands for zeros.
template <class T, backend B>
struct routing_totals_gradient {
  matrix_view<T, B> probability{};        // [G, E]
  matrix_view<T, B> importance{};         // [G, E]
  vector_view<T, B> squared_logsumexp{};  // [G]
  matrix_view<T, B> affinity{};           // [G, E]
  vector_view<T, B> row_term{};           // [G]
};

/// Where a row term puts the gradients of what a routing has beside logits and gates. A member
/// without data is not there.
template <class T, backend B>
struct routed_rows_gradient {
  matrix_view<T, B> dcontrol{};    // [N, 1]
  matrix_view<T, B> dclean{};      // [N, E]
  matrix_view<T, B> ddeviation{};  // [N, E]
};

/// What a row term makes of a row and what it reads.
struct row_term_uses {
  bool affinity = false;  ///< an array over the experts
  bool number = false;    ///< a number
  bool gates = false;     ///< writes dgates
  bool control = false;   ///< reads control and writes dcontrol
  bool noise = false;     ///< reads clean and deviation; writes dclean and ddeviation
};

/// A row of a routing as a row term reads it.
template <class T>
struct routed_row {
  row_pointer<const T> logits;            // [E]
  row_pointer<const T> gates;             // [E]
  row_pointer<const std::uint32_t> mask;  // [ceil(E / 32)]
  row_scalar<const T> control;            // no data unless the term reads it
  row_pointer<const T> clean{};           // [E], likewise
  row_pointer<const T> deviation{};       // [E], likewise, and no data where no noise was drawn
};

/// Where a row term writes its gradient; members that it does not write have no data.
template <class T>
struct routed_row_gradient {
  row_pointer<T> dlogits;  // [E]
  row_pointer<T> dgates;   // [E]
  row_scalar<T> dcontrol;
  row_pointer<T> dclean{};      // [E], no data either where no noise was drawn
  row_pointer<T> ddeviation{};  // [E], likewise
};

/// Gradient of one group's sums as the row term of each of its rows sees it.
template <class T>
struct row_term_gradient {
  row_pointer<const T> affinity;  // [E]
  T number;
  T scale;
};

/// The row term of losses that have none. A row term is an aggregate with `uses` and, over a lane
/// group G, two functions of one row:
///
///   template <class T, class G> TALPA_HD typename G::template value<T>
///   forward(const G&, const routed_row<T>&, row_pointer<T> affinity) const
///     writes the array a if `uses` says so, and returns the number t;
///   template <class T, class G> TALPA_HD void
///   backward(const G&, const routed_row<T>&, const row_term_gradient<T>& d,
///            const routed_row_gradient<T>& out) const
///     writes the gradient of d.scale (sum_e d.affinity_e a_e + d.number t): dlogits always, the
///     others as `uses` says.
struct no_row_term {
  static constexpr row_term_uses uses{};
};

namespace detail {

/// Rows in one block of a canonical column sum.
inline constexpr index sum_block_rows = 128;

/// What stands for an expert that is not there; at namespace scope because nvcc takes the functions
/// of numeric_limits for host code.
template <class T>
inline constexpr T masked_logit = -std::numeric_limits<T>::infinity();

/// Two numbers that every row of logits has, per lane group.
template <class V>
struct row_scalars {
  V logsumexp;
  V entropy;
};

/// Writes p = softmax(u) of a row and returns ln sum_e exp(u_e) and -sum_e p_e ln p_e, with
/// 0 ln 0 = 0. NaN, +inf, or -inf everywhere make all of them NaN.
template <class T, class G>
TALPA_HD row_scalars<typename G::template value<T>> softmax_row(const G& g,
                                                                row_pointer<const T> logits,
                                                                row_pointer<T> probability) {
  const auto u = g.load_row(logits, masked_logit<T>);
  const auto top = g.template max<T>([&](auto e) { return u[e]; });
  auto weight = g.template elements<T>();
  const auto sum = g.template sum_of<T>(
      exp_nonpositive_of{}, [&](auto e) { return u[e] - top; },
      [&](auto e, const auto& x) { return weight[e] = x; });
  auto p = g.template elements<T>();
  g.for_each([&](auto e) { p[e] = weight[e] / sum; });
  const auto log_sum = math::log(sum);
  const auto zero = g.uniform(T{0});
  // -ln p_e = ln sum - (u_e - top); the mean of the second term is taken over p.
  const auto mean = g.template sum<T>(
      [&](auto e) { return talpa::select(weight[e] > zero, math::mul(p[e], u[e] - top), zero); });
  g.store_row(probability, [&](auto e) { return p[e]; });
  return {top + log_sum, log_sum - mean};
}

/// Gradient of one group's totals as its rows see it.
template <class T>
struct totals_gradient_row {
  row_pointer<const T> probability;  // [E]; no data: zeros
  T squared_logsumexp;
  T scale;
};

/// Writes dlogits of a row: du_e = scale p_e (dP_e - sum_j p_j dP_j + 2 z dZ), z = ln sum exp u.
template <class T, class G>
TALPA_HD void softmax_row_backward(const G& g, row_pointer<const T> logits,
                                   const totals_gradient_row<T>& gradient, row_pointer<T> dlogits) {
  const auto u = g.load_row(logits, masked_logit<T>);
  const auto top = g.template max<T>([&](auto e) { return u[e]; });
  auto p = g.template elements<T>();
  const auto sum = g.template sum_of<T>(
      exp_nonpositive_of{}, [&](auto e) { return u[e] - top; },
      [&](auto e, const auto& x) { return p[e] = x; });
  g.for_each([&](auto e) { p[e] = p[e] / sum; });
  auto wanted = g.template elements<T>();
  if (gradient.probability.data != nullptr) {
    g.for_each([&](auto e) { wanted[e] = g.load(gradient.probability, e, T{0}); });
  } else {
    g.for_each([&](auto e) { wanted[e] = g.uniform(T{0}); });
  }
  const auto mean = g.template sum<T>([&](auto e) { return math::mul(p[e], wanted[e]); });
  const auto logsumexp = math::mul(g.uniform(2 * gradient.squared_logsumexp), top + math::log(sum));
  const auto scale = g.uniform(gradient.scale);
  g.store_row(dlogits, [&](auto e) {
    return math::mul(scale, math::mul(p[e], (wanted[e] - mean) + logsumexp));
  });
}

inline void check_group_rows(const char* function, index group_rows, index tokens) {
  if (group_rows < 0 || (group_rows > 0 && tokens % group_rows != 0)) {
    throw_value(function, "group_rows", std::to_string(group_rows),
                concat("a divisor of ", std::to_string(tokens), " = tokens, or 0"));
  }
}

template <class T, class B>
void check_routed_rows(const char* function, const routed_rows<T, B>& in) {
  const index n = in.tokens(), e = in.experts();
  check_at_least(function, "experts", e, 1, "columns of logits");
  check_shape(function, "gates", in.gates, n, e, "shape of logits");
  check_shape(function, "mask", in.mask, n, mask_words(e), "tokens, mask words of the experts");
  if (!in.padding_mask.empty()) {
    check_size(function, "padding_mask", in.padding_mask, n, "one flag a token");
  }
  check_group_rows(function, in.group_rows, n);
}

/// A row term that reads control must be given one.
template <class Term, class T, class B>
void check_row_term(const char* function, const char* argument, const matrix_view<T, B>& control,
                    index tokens) {
  if (Term::uses.control || !control.empty()) {
    check_shape(function, argument, control, tokens, 1, "one number a token");
  }
}

/// A row term that reads noise must be given clean logits; with a deviation, also room for both
/// gradients in backward.
template <class Term, class T, class B>
void check_row_noise(const char* function, const routed_rows<T, B>& in) {
  const index n = in.tokens(), e = in.experts();
  if (Term::uses.noise) check_shape(function, "clean", in.clean, n, e, "shape of logits");
  if (!in.deviation.empty()) {
    check_shape(function, "deviation", in.deviation, n, e, "shape of logits");
  }
}
template <class Term, class T, class B>
void check_row_noise_gradient(const char* function, const routed_rows<T, B>& in,
                              const routed_rows_gradient<T, B>& more) {
  const bool wanted = Term::uses.noise && !in.deviation.empty();
  const auto check = [&](const char* argument, const matrix_view<T, B>& view) {
    if (wanted || !view.empty()) {
      check_shape(function, argument, view, in.tokens(), in.experts(), "shape of logits");
    }
  };
  check("dclean", more.dclean);
  check("ddeviation", more.ddeviation);
}

template <class T, class B>
void check_totals_matrix(const char* function, const char* argument, const matrix_view<T, B>& view,
                         index groups, index experts) {
  if (view.data != nullptr) {
    check_shape(function, argument, view, groups, experts, "groups, experts");
  }
}
template <class T, class B>
void check_totals_vector(const char* function, const char* argument, const vector_view<T, B>& view,
                         index groups) {
  if (view.data != nullptr) check_size(function, argument, view, groups, "groups");
}
/// What can be wanted without a row term.
template <class T, class B>
void check_totals(const char* function, const routing_totals<T, B>& out, index groups,
                  index experts) {
  check_totals_vector(function, "tokens", out.tokens, groups);
  check_totals_matrix(function, "counts", out.counts, groups, experts);
  check_totals_matrix(function, "probability", out.probability, groups, experts);
  check_totals_matrix(function, "importance", out.importance, groups, experts);
  check_totals_vector(function, "squared_logsumexp", out.squared_logsumexp, groups);
  check_totals_vector(function, "entropy", out.entropy, groups);
}
template <class T, class B>
void check_wanted(const char* function, const wanted_totals<T, B>& totals, index tokens,
                  index experts) {
  check_group_rows(function, totals.group_rows, tokens);
  const index groups = totals.group_rows == 0 ? 1 : tokens / totals.group_rows;
  check_totals(function, totals.out, groups, experts);
}

}  // namespace detail

}  // namespace talpa

namespace talpa::ops {

template <class B>
struct routing_sums_impl {
  static_assert(detail::always_false<B>,
                "talpa: ops::routing_sums has no implementation for this backend here, include "
                "talpa/cpu/routing_sums.hpp for cpu, talpa/cuda/routing_sums.hpp for gpu "
                "(docs/architecture.md)");
};

/// Adds up over tokens what balance losses and statistics are made of, in one pass over a routing.
///
/// Forward, for each group and each wanted member of `out`, over the group's real tokens n:
/// tokens = sum 1, counts_e = sum m_ne, probability_e = sum p_ne, importance_e = sum m_ne g_ne,
/// squared_logsumexp = sum z_n^2, entropy = sum H_n, with p_n = softmax(u_n),
/// z_n = ln sum_e exp u_ne, H_n = -sum_e p_ne ln p_ne and 0 ln 0 = 0.
/// With a row term (see no_row_term) also affinity_e = sum a_ne and row_term = sum t_n.
/// `mode` says whether `out` is overwritten or added to (more layers or batches).
/// Backward: see routing_sums_backward; counts have no gradient.
/// Shapes: logits, gates [N, E], mask [N, ceil(E / 32)], padding_mask [N] or empty; members of
/// out [G] or [G, E] with G = N / group_rows groups.
/// Edges: padding enters nothing, not even as NaN; a logit of -inf has p = 0; NaN, +inf, or -inf
/// everywhere in the logits of a real token make probability, squared_logsumexp and entropy of its
/// group NaN; a group without real tokens, or N == 0, gives zeros.
/// Cost: N E exponentials when a quantity of the logits is wanted; the row term's own beside.
/// Determinism: same bits on every backend, group and number of threads. The rows of each block of
/// 128 rows of a group are added in order to +0, then the results of 128 blocks at a time likewise.
/// Throws: shape_error; value_error when group_rows does not divide N.
template <class B, floating T, class Term = no_row_term>
void routing_sums(context<B>& ctx, const std::type_identity_t<routed_rows<T, B>>& in,
                  const routing_totals<T, B>& out, grad_mode mode, const Term& term = {}) {
  constexpr const char* function = "ops::routing_sums";
  detail::check_routed_rows<T, B>(function, in);
  const index groups = in.groups(), experts = in.experts();
  detail::check_totals(function, out, groups, experts);
  if constexpr (Term::uses.affinity) {
    check_shape(function, "affinity", out.affinity, groups, experts, "groups, experts");
  }
  if constexpr (Term::uses.number) check_size(function, "row_term", out.row_term, groups, "groups");
  detail::check_row_term<Term>(function, "control", in.control, in.tokens());
  detail::check_row_noise<Term>(function, in);
  if (mode == grad_mode::ignore) return;
  routing_sums_impl<B>::forward(ctx, in, out, mode, term);
}

/// Backward of routing_sums.
///
/// With s = scale[0, 0] and the gradient of the token's group, for real tokens:
/// dlogits_ne (+)= s p_ne (dprobability_e - sum_j p_nj dprobability_j + 2 z_n dsquared_logsumexp),
/// dgates_ne (+)= s dimportance_e where m_ne is set; a row term adds what its backward says.
/// Shapes: scale [1, 1], dlogits, dgates [N, E]; of `more` dcontrol [N, 1] for a row term that
/// reads control, dclean and ddeviation [N, E] for one that reads noise where some was drawn; the
/// others as in routing_sums.
/// Edges: overwrite leaves zero for padding and where nothing flows; accumulate leaves those alone.
/// Cost: N E exponentials when a gradient of the logits is there; nothing is saved, p is recomputed
/// with the same bits.
/// Determinism: same bits on every backend, group and number of threads.
/// Throws: as routing_sums.
template <class B, floating T, class Term = no_row_term>
void routing_sums_backward(context<B>& ctx, const std::type_identity_t<routed_rows<T, B>>& in,
                           const std::type_identity_t<routing_totals_gradient<T, B>>& dout,
                           input<T, B> scale, matrix_view<T, B> dlogits, output<T, B> dgates,
                           grad_mode mode, const Term& term = {},
                           const std::type_identity_t<routed_rows_gradient<T, B>>& more = {}) {
  constexpr const char* function = "ops::routing_sums_backward";
  detail::check_routed_rows<T, B>(function, in);
  const index groups = in.groups(), experts = in.experts();
  detail::check_totals_matrix(function, "dprobability", dout.probability, groups, experts);
  detail::check_totals_matrix(function, "dimportance", dout.importance, groups, experts);
  detail::check_totals_vector(function, "dsquared_logsumexp", dout.squared_logsumexp, groups);
  check_shape(function, "scale", scale, 1, 1, "one number");
  check_shape(function, "dlogits", dlogits, in.tokens(), experts, "shape of logits");
  check_shape(function, "dgates", dgates, in.tokens(), experts, "shape of logits");
  if constexpr (Term::uses.affinity) {
    check_shape(function, "daffinity", dout.affinity, groups, experts, "groups, experts");
  }
  if constexpr (Term::uses.number) {
    check_size(function, "drow_term", dout.row_term, groups, "groups");
  }
  detail::check_row_term<Term>(function, "control", in.control, in.tokens());
  detail::check_row_term<Term>(function, "dcontrol", more.dcontrol, in.tokens());
  detail::check_row_noise<Term>(function, in);
  detail::check_row_noise_gradient<Term>(function, in, more);
  if (mode == grad_mode::ignore) return;
  routing_sums_impl<B>::backward(ctx, in, dout, scale, dlogits, dgates, mode, term, more);
}

}  // namespace talpa::ops
