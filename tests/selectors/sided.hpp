// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "support/random.hpp"

#include <talpa/cpu/select.hpp>
#include <talpa/routing/routing.hpp>
#include <talpa/scorers/linear_scorer.hpp>

#include <initializer_list>
#include <string>

// Whole batches through selectors that read a number a token or an expert beside the logits.

namespace talpa::support {

/// What a selector said of a batch, and the gradients for given cotangents.
template <class T>
struct sided_result {
  routing<T, cpu> r;
  matrix<T, cpu> dlogits;   // [N, E]
  matrix<T, cpu> dcontrol;  // [N, 1], or nothing

  bool on(index n, index e) const { return r.view().on(n, e); }
  index count(index n) const {
    index k = 0;
    for (index e = 0; e < r.gates.cols(); ++e) k += on(n, e) ? 1 : 0;
    return k;
  }
};

template <class T, class Selector>
sided_result<T> run_sided(const Selector& selector, const matrix<T, cpu>& logits,
                          const matrix<T, cpu>& dgates, const matrix<T, cpu>& control = {},
                          const matrix<T, cpu>& bias = {}) {
  context<cpu> ctx(2);
  sided_result<T> out{routing<T, cpu>(logits.rows(), logits.cols()),
                      matrix<T, cpu>(logits.rows(), logits.cols()),
                      matrix<T, cpu>(control.rows(), control.cols())};
  select_inputs<T, cpu> more;
  more.control = control.view();
  more.bias = bias.view();
  ops::select(ctx, selector, logits, {}, out.r.gates.view(), out.r.mask.view(), more);
  ops::select_backward(ctx, selector, logits, out.r.gates.view(), out.r.mask.view(), dgates,
                       out.dlogits.view(), more, out.dcontrol.view());
  return out;
}

template <class T>
matrix<T, cpu> row_matrix(std::initializer_list<double> values) {
  matrix<T, cpu> m(1, static_cast<index>(values.size()));
  index e = 0;
  for (const double v : values) m(0, e++) = static_cast<T>(v);
  return m;
}

/// The text of the value_error that validate throws; empty if it throws none.
template <class Selector>
std::string refusal(const Selector& selector, index experts) {
  try {
    selector.validate(experts);
  } catch (const value_error& error) {
    return error.what();
  }
  return {};
}

}  // namespace talpa::support
