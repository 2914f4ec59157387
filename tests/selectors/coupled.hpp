// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "support/random.hpp"

#include <talpa/cpu/select.hpp>
#include <talpa/routing/routing.hpp>

#include <cstdint>
#include <vector>

// Whole batches through a selector, for the tests of selectors that couple rows.

namespace talpa::support {

/// Which tokens are real, and how long sequences are.
struct batch_shape {
  vector<std::uint8_t, cpu> real;  // [N], or empty
  index sequence_length = 0;

  batch_shape() = default;
  /// All real, one sequence.
  explicit batch_shape(index tokens) : real(tokens) {
    for (index n = 0; n < tokens; ++n) real[n] = 1;
  }
  /// One token in five is padding.
  batch_shape(test_random& random, index tokens, index length)
      : real(tokens), sequence_length(length) {
    for (index n = 0; n < tokens; ++n) real[n] = random.below(5) == 0 ? 0 : 1;
  }
  bool takes_part(index n) const { return real.size() == 0 || real[n] != 0; }
};

template <class T, class Selector>
routing<T, cpu> route(const Selector& selector, const matrix<T, cpu>& logits,
                      const batch_shape& shape = {}, int threads = 1) {
  context<cpu> ctx(threads);
  routing<T, cpu> r(logits.rows(), logits.cols());
  select_inputs<T, cpu> more;
  more.sequence_length = shape.sequence_length;
  ops::select(ctx, selector, logits, shape.real.view(), r.gates.view(), r.mask.view(), more);
  return r;
}

template <class T, class Selector>
matrix<T, cpu> backward_of(const Selector& selector, const matrix<T, cpu>& logits,
                           const routing<T, cpu>& r, const matrix<T, cpu>& dgates) {
  context<cpu> ctx(1);
  matrix<T, cpu> dlogits(logits.rows(), logits.cols());
  ops::select_backward(ctx, selector, logits, r.gates.view(), r.mask.view(), dgates,
                       dlogits.view());
  return dlogits;
}

/// The experts of token n.
template <class T>
std::vector<index> experts_of(const routing<T, cpu>& r, index n) {
  std::vector<index> on;
  for (index e = 0; e < r.gates.cols(); ++e) {
    if (r.view().on(n, e)) on.push_back(e);
  }
  return on;
}

}  // namespace talpa::support
