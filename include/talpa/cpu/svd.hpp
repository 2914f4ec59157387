// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/cpu/context.hpp>
#include <talpa/cpu/parallel.hpp>
#include <talpa/ops/jacobi_svd.hpp>
#include <talpa/ops/svd.hpp>

namespace talpa::ops {

template <>
struct svd_impl<cpu> {
  template <class T>
  static void run(context<cpu>& ctx, matrix_view<const T, cpu> w, matrix_view<T, cpu> u,
                  matrix_view<T, cpu> s, matrix_view<T, cpu> v) {
    const auto parallel = [&](index tasks, const auto& task) {
      detail::parallel_for(ctx, tasks, [&](index i, int) { task(i); });
    };
    detail::jacobi::svd<T>(ctx.scratch, parallel, w, u, s, v);
  }
};

}  // namespace talpa::ops
