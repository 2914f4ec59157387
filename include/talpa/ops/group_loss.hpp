// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/ops/routing_sums.hpp>

namespace talpa {

/// Which totals a group loss reads.
struct used_totals {
  bool counts = false;
  bool probability = false;
  bool importance = false;
  bool squared_logsumexp = false;
  bool affinity = false;  ///< array of the loss's row term
  bool row_term = false;  ///< number of the loss's row term
};

/// The totals of one group as a group loss reads them. What it did not ask for has no data.
template <class T>
struct totals_row {
  T tokens;                          // real tokens
  row_pointer<const T> counts;       // [E]
  row_pointer<const T> probability;  // [E]
  row_pointer<const T> importance;   // [E]
  T squared_logsumexp;
  row_pointer<const T> affinity{};  // [E]
  T row_term{};
};

/// Where a group loss writes the derivative of its value by each total it asked for.
template <class T>
struct totals_derivative_row {
  row_pointer<T> probability;  // [E]
  row_pointer<T> importance;   // [E]
  row_pointer<T> affinity{};   // [E]
};

/// What a group loss returns: its value, and the derivatives by squared_logsumexp and row_term.
template <class V>
struct group_value {
  V value;
  V squared_logsumexp;
  V row_term{};
};

/// How the values of groups make one number: their sum, or their mean over groups that have a real
/// token (0 when none has).
enum class group_reduction { sum, mean };

}  // namespace talpa

namespace talpa::ops {

template <class B>
struct group_loss_impl {
  static_assert(detail::always_false<B>,
                "talpa: ops::group_loss has no implementation for this backend here, include "
                "talpa/cpu/group_loss.hpp for cpu, talpa/cuda/group_loss.hpp for gpu "
                "(docs/architecture.md)");
};

/// Evaluates a function of the totals of each group, with its derivatives.
///
/// Forward: value (+)= sum over groups of loss(totals of the group), or their mean as `reduction`
/// says; `mode` tells whether value is overwritten or added to. `derivative` receives d value / d
/// total (overwritten) for routing_sums_backward.
/// Loss: an aggregate with `static constexpr used_totals uses` and, over a lane group G,
/// `template <class G, class T> TALPA_HD group_value<V> operator()(const G&, const totals_row<T>&,
/// const totals_derivative_row<T>&) const` with V = G::value<T>.
/// Shapes: totals [G], [G, E]; derivative likewise; value [1, 1].
/// Edges: no groups, or none with a real token: what the loss gives for zeros, 0 for a mean.
/// Cost: reads each total it asks for once, writes its derivative; nothing of it grows with tokens.
/// Determinism: same bits on every backend and number of threads.
/// Throws: shape_error.
template <class B, class Loss, floating T>
void group_loss(context<B>& ctx, const Loss& loss, group_reduction reduction,
                const routing_totals<T, B>& totals, const routing_totals_gradient<T, B>& derivative,
                output<T, B> value, grad_mode mode) {
  constexpr const char* function = "ops::group_loss";
  const index groups = totals.tokens.size;
  check_shape(function, "value", value, 1, 1, "one number");
  const index experts = Loss::uses.counts        ? totals.counts.cols
                        : Loss::uses.probability ? totals.probability.cols
                        : Loss::uses.affinity    ? totals.affinity.cols
                        : Loss::uses.importance  ? totals.importance.cols
                                                 : 1;  // numbers alone: a row of any length
  const auto check_rows = [&](bool used, const char* argument, const auto& view) {
    if (used) check_shape(function, argument, view, groups, experts, "groups, experts");
  };
  const auto check_numbers = [&](bool used, const char* argument, const auto& view) {
    if (used) check_size(function, argument, view, groups, "groups");
  };
  check_rows(Loss::uses.counts, "counts", totals.counts);
  check_rows(Loss::uses.probability, "probability", totals.probability);
  check_rows(Loss::uses.importance, "importance", totals.importance);
  check_numbers(Loss::uses.squared_logsumexp, "squared_logsumexp", totals.squared_logsumexp);
  check_rows(Loss::uses.affinity, "affinity", totals.affinity);
  check_numbers(Loss::uses.row_term, "row_term", totals.row_term);
  check_rows(Loss::uses.affinity, "daffinity", derivative.affinity);
  check_numbers(Loss::uses.row_term, "drow_term", derivative.row_term);
  check_rows(Loss::uses.probability, "dprobability", derivative.probability);
  check_rows(Loss::uses.importance, "dimportance", derivative.importance);
  check_numbers(Loss::uses.squared_logsumexp, "dsquared_logsumexp", derivative.squared_logsumexp);
  if (mode == grad_mode::ignore) return;
  group_loss_impl<B>::template run<T>(ctx, loss, reduction, experts, totals, derivative, value,
                                      mode);
}

}  // namespace talpa::ops
