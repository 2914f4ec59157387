// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/transfer.hpp>
#include <talpa/core/workspace.hpp>
#include <talpa/cuda/loops.hpp>
#include <talpa/ops/jacobi_svd.hpp>
#include <talpa/ops/svd.hpp>

namespace talpa::ops {

/// By one thread of the host, for which the device waits: one rotation after the other is no work
/// for a device, and a training begins with it once. The bits of the CPU.
template <kernel_backend B>
struct svd_impl<B> {
  template <class T>
  static void run(context<B>&, matrix_view<const T, B> w, matrix_view<T, B> u, matrix_view<T, B> s,
                  matrix_view<T, B> v) {
    const matrix<T, cpu> from = to_host(w);
    matrix<T, cpu> left(u.rows, u.cols), values(s.rows, s.cols), right(v.rows, v.cols);
    workspace<cpu> memory;
    const auto in_turn = [](index tasks, const auto& task) {
      for (index i = 0; i < tasks; ++i) task(i);
    };
    detail::jacobi::svd<T>(memory, in_turn, from.view(), left.view(), values.view(), right.view());
    to_device<T, B>(left.view(), u);
    to_device<T, B>(values.view(), s);
    to_device<T, B>(right.view(), v);
  }
};

}  // namespace talpa::ops
