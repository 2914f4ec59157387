// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/half.hpp>
#include <talpa/ops/gemm.hpp>
#include <talpa/testing/simulated.hpp>

namespace talpa::ops {

/// Products of the simulated device, whose real one takes them from a library: plain loops, each
/// sum in the order of K.
template <>
struct gemm_impl<simulated> {
  template <class S, class C>
  static void run(context<simulated>&, sum_type<S> alpha, matrix_view<const S, simulated> a,
                  transpose ta, matrix_view<const S, simulated> b, transpose tb, sum_type<S> beta,
                  matrix_view<C, simulated> c) {
    using sum = sum_type<S>;
    const index k = detail::cols_of(a, ta);
    for (index m = 0; m < c.rows; ++m) {
      for (index n = 0; n < c.cols; ++n) {
        sum total{0};
        for (index i = 0; i < k; ++i) {
          const sum x = static_cast<sum>(ta == transpose::no ? a(m, i) : a(i, m));
          const sum y = static_cast<sum>(tb == transpose::no ? b(i, n) : b(n, i));
          total += x * y;
        }
        const sum before = beta == sum{0} ? sum{0} : beta * static_cast<sum>(c(m, n));
        c(m, n) = static_cast<C>(before + alpha * total);
      }
    }
  }
};

}  // namespace talpa::ops
