// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/lanes.hpp>
#include <talpa/ops/select.hpp>
#include <talpa/routing/row_softmax.hpp>

#include <limits>

namespace talpa {

/// The nearest probabilities to logits / size with sum 1 (sparsegen; sparsemax for size = 1) among
/// the experts where offered(e) holds: p_e = max(u_e - tau, 0) / size, with tau such that they sum
/// to one. Returns them as an array.
///
/// tau is found by dropping: from S = all that are offered, tau = (sum of u over S - size) / |S|,
/// then S loses every u_e <= tau, until it stays. It rises, so that no dropped expert comes back.
template <class T, class G, class Logits, class Offered>
TALPA_HD auto sparse_projection(const G& g, const Logits& u,
                                const typename G::template value<T>& size, Offered offered) {
  const auto zero = g.uniform(T{0}), one = g.uniform(T{1});
  const auto masked = g.uniform(-std::numeric_limits<T>::infinity());
  const auto top =
      g.template max<T>([&](auto e) { return talpa::select(offered(e), u[e], masked); });
  auto v = g.template elements<T>();  // u - max u, -inf where dropped
  g.for_each([&](auto e) { v[e] = talpa::select(offered(e), u[e] - top, masked); });
  const auto level = [&] {
    const auto inside = [&](auto e) { return v[e] > masked; };
    const auto sum =
        g.template sum<T>([&](auto e) { return talpa::select(inside(e), v[e], zero); });
    const auto count =
        g.template sum<T>([&](auto e) { return talpa::select(inside(e), one, zero); });
    return (sum - size) / count;
  };
  auto tau = level();
  const auto leaves = [&](auto e) {
    const auto inside = v[e] > masked, low = v[e] <= tau;
    return inside & low;
  };
  const auto none = g.uniform(std::int32_t{0});
  while (g.any(g.count(leaves) > none)) {
    g.for_each([&](auto e) { v[e] = talpa::select(leaves(e), masked, v[e]); });
    tau = level();
  }
  g.for_each([&](auto e) {
    const auto inside = v[e] > masked;
    v[e] = talpa::select(inside, (v[e] - tau) / size, zero);
  });
  return v;
}

/// Writes the gates of a row whose mask is S: the projection among S, 0 elsewhere, NaN on S where
/// `invalid`.
template <class G, class T, class Logits, class Condition>
TALPA_HD void weigh_projection(const G& g, const select_row<T>& row, const Logits& u,
                               const typename G::template value<T>& size,
                               const Condition& invalid) {
  const auto nan = g.uniform(std::numeric_limits<T>::quiet_NaN());
  const auto on = g.load_mask(row.recorded());
  const auto p = sparse_projection<T>(g, u, size, on);
  g.store_row(row.gates, [&](auto e) { return talpa::select(invalid & on(e), nan, p[e]); });
}

/// Writes mask and gates of a row by the projection among the experts whose logit is not -inf; all
/// experts, with NaN, for a row or a size that is not a number.
template <class G, class T>
TALPA_HD void select_projection(const G& g, const select_row<T>& row,
                                const typename G::template value<T>& size) {
  const auto infinity = g.uniform(std::numeric_limits<T>::infinity());
  const auto zero = g.uniform(T{0});
  const auto u = row_logits(g, row.logits);
  const auto finite = size < infinity;
  const auto invalid = row_invalid<T>(g, u) | !finite;
  const auto p = sparse_projection<T>(g, u, size, [&](auto e) {
    const auto offered = u[e] > -infinity;
    return offered & !invalid;
  });
  g.store_mask(row.mask, [&](auto e) {
    const auto positive = p[e] > zero;
    return invalid | positive;
  });
  const auto nan = g.uniform(std::numeric_limits<T>::quiet_NaN());
  g.store_row(row.gates, [&](auto e) { return talpa::select(invalid, nan, p[e]); });
}

/// The gates of a mask that is given.
template <class G, class T>
TALPA_HD void replay_projection(const G& g, const select_row<T>& row,
                                const typename G::template value<T>& size) {
  const auto u = row_logits(g, row.logits);
  const auto finite = size < g.uniform(std::numeric_limits<T>::infinity());
  weigh_projection(g, row, u, size, row_invalid<T>(g, u) | !finite);
}

/// Backward of the gates with the support A (gates above 0) constant: du_e = (dg_e - mean_A dg) /
/// size on A, 0 elsewhere. Returns dsize = (mean_A dg - sum_e g_e dg_e) / size.
template <class G, class T>
TALPA_HD typename G::template value<T> projection_backward(
    const G& g, const select_gradient_row<T>& row, const typename G::template value<T>& size) {
  const auto zero = g.uniform(T{0}), one = g.uniform(T{1});
  const auto inside = [&](auto e) {
    const auto off = g.load(row.gates, e, T{0}) <= zero;  // NaN stays, and shows
    return g.load_bit(row.mask, e) & !off;
  };
  const auto dgate = [&](auto e) {
    return talpa::select(inside(e), g.load(row.dgates, e, T{0}), zero);
  };
  const auto count = g.template sum<T>([&](auto e) { return talpa::select(inside(e), one, zero); });
  const auto sum = g.template sum<T>([&](auto e) { return dgate(e); });
  const auto nothing = count == zero;
  const auto mean = talpa::select(nothing, zero, sum / count);
  const auto inner = g.template sum<T>([&](auto e) {
    return talpa::select(inside(e), math::mul(g.load(row.gates, e, T{0}), dgate(e)), zero);
  });
  g.for_each([&](auto e) {
    g.store(row.dlogits, e, talpa::select(inside(e), (dgate(e) - mean) / size, zero));
  });
  return (mean - inner) / size;
}

}  // namespace talpa
