// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/transfer.hpp>
#include <talpa/cuda/loops.hpp>
#include <talpa/ops/item.hpp>

namespace talpa::ops {

template <kernel_backend B>
struct item_impl<B> {
  /// Waits until what made x is done, so it is no part of a captured step.
  template <class T>
  static T run(context<B>& ctx, matrix_view<const T, B> x) {
    ctx.synchronise();
    return to_host(x)(0, 0);
  }
};

}  // namespace talpa::ops
