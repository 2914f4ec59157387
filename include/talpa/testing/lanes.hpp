// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/lanes.hpp>
#include <talpa/core/matrix.hpp>
#include <talpa/ops/select.hpp>
#include <talpa/routing/routing.hpp>

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

// Runs selectors on one chosen lane group, whatever the backend would choose.

namespace talpa::testing {

namespace detail {

template <class T>
row_pointer<T> row_at(const matrix_view<T, cpu>& m, index row) {
  return {m.row(row), m.stride};
}

template <class T>
row_scalar<T> scalar_at(const matrix_view<T, cpu>& column, index row) {
  return {column.data == nullptr ? nullptr : column.row(row), column.stride};
}

}  // namespace detail

/// What select_backward writes.
template <class T>
struct selection_gradient {
  matrix<T, cpu> dlogits;   // [N, E]
  matrix<T, cpu> dcontrol;  // [N, 1], empty without a control
};

/// Calls row(group, first, rows) for every row, or pack of up to G::tokens rows, of [N, E].
template <class G, class Row>
void for_each_row_on(index tokens, index experts, Row row) {
  const std::size_t bytes = lane_scratch::bytes_for(experts, G::tokens);
  std::vector<std::byte> storage(bytes);
  lane_scratch scratch(storage.data(), bytes);
  for (index first = 0; first < tokens; first += G::tokens) {
    scratch.reset();
    const index rest = tokens - first;
    const int rows = static_cast<int>(rest < G::tokens ? rest : G::tokens);
    if constexpr (G::tokens > 1) {
      row(G(experts, rows, &scratch), first, rows);
    } else {
      row(G(experts, &scratch), first, rows);
    }
  }
}

/// The routing that `selector` makes of `logits` [N, E] on group G.
template <class G, class T, class Selector>
routing<T, cpu> select_on(const Selector& selector, const matrix<T, cpu>& logits,
                          const select_inputs<T, cpu>& more = {}) {
  routing<T, cpu> r(logits.rows(), logits.cols());
  for_each_row_on<G>(logits.rows(), logits.cols(), [&](const auto& group, index first, int) {
    selector.select(
        group,
        select_row<T>{detail::row_at(logits.view(), first), detail::row_at(r.gates.view(), first),
                      detail::row_at(r.mask.view(), first), row_pointer<const T>{more.bias.data, 0},
                      detail::scalar_at(more.control, first)});
  });
  return r;
}

/// The gates [N, E] for a recorded mask on group G.
template <class G, class T, class Selector>
matrix<T, cpu> replay_on(const Selector& selector, const matrix<T, cpu>& logits,
                         matrix<std::uint32_t, cpu> mask, const select_inputs<T, cpu>& more = {}) {
  matrix<T, cpu> gates(logits.rows(), logits.cols());
  for_each_row_on<G>(logits.rows(), logits.cols(), [&](const auto& group, index first, int) {
    selector.replay(
        group,
        select_row<T>{detail::row_at(logits.view(), first), detail::row_at(gates.view(), first),
                      detail::row_at(mask.view(), first), row_pointer<const T>{more.bias.data, 0},
                      detail::scalar_at(more.control, first)});
  });
  return gates;
}

/// Gradients of logits [N, E] and control [N, 1] on group G; zero for a token without a set bit, as
/// ops::select_backward has it.
template <class G, class T, class Selector>
selection_gradient<T> select_backward_on(const Selector& selector, const matrix<T, cpu>& logits,
                                         const routing<T, cpu>& r, const matrix<T, cpu>& dgates,
                                         const select_inputs<T, cpu>& more = {}) {
  matrix<T, cpu> dlogits(logits.rows(), logits.cols());
  matrix<T, cpu> dcontrol(more.control.rows, 1);
  for_each_row_on<G>(logits.rows(), logits.cols(), [&](const auto& group, index first, int rows) {
    selector.select_backward(
        group,
        select_gradient_row<T>{
            detail::row_at(logits.view(), first), detail::row_at(r.gates.view(), first),
            detail::row_at(r.mask.view(), first), detail::row_at(dgates.view(), first),
            detail::row_at(dlogits.view(), first), row_pointer<const T>{more.bias.data, 0},
            detail::scalar_at(more.control, first), detail::scalar_at(dcontrol.view(), first)});
    for (index n = first; n < first + rows; ++n) {
      std::uint32_t any = 0;
      for (index w = 0; w < r.mask.cols(); ++w) any |= r.mask(n, w);
      for (index e = 0; any == 0 && e < logits.cols(); ++e) dlogits(n, e) = T{0};
      if (any == 0 && !dcontrol.view().empty()) dcontrol(n, 0) = T{0};
    }
  });
  return {std::move(dlogits), std::move(dcontrol)};
}

}  // namespace talpa::testing
