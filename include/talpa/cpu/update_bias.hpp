// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/cpu/context.hpp>
#include <talpa/ops/update_bias.hpp>

namespace talpa::ops {

template <>
struct update_bias_impl<cpu> {
  template <class T>
  static void run(context<cpu>&, matrix_view<const index, cpu> counts, double rate,
                  matrix_view<T, cpu> bias) {
    index total = 0;
    for (index e = 0; e < counts.cols; ++e) total += counts(0, e);
    for (index e = 0; e < counts.cols; ++e) {
      bias(0, e) = detail::moved_bias(bias(0, e), counts(0, e), total, counts.cols, rate);
    }
  }
};

}  // namespace talpa::ops
