// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/cpu/context.hpp>
#include <talpa/ops/item.hpp>

namespace talpa::ops {

template <>
struct item_impl<cpu> {
  template <class T>
  static T run(context<cpu>&, matrix_view<const T, cpu> x) {
    return x(0, 0);
  }
};

}  // namespace talpa::ops
