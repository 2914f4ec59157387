// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/check.hpp>
#include <talpa/core/scalar.hpp>
#include <talpa/core/view.hpp>

#include <type_traits>

namespace talpa::ops {

template <class B>
struct item_impl {
  static_assert(detail::always_false<B>,
                "talpa: ops::item has no implementation for this backend here, include "
                "talpa/cpu/item.hpp for cpu, talpa/cuda/item.hpp for gpu "
                "(docs/architecture.md)");
};

/// Brings one number to the host: a loss to print, a norm to compare.
///
/// Shapes: x [1, 1].
/// Cost: on a device this waits for everything queued before it. Determinism: exact.
/// Throws: shape_error when x is not [1, 1].
template <class B, class T>
std::remove_const_t<T> item(context<B>& ctx, matrix_view<T, B> x) {
  check_shape("ops::item", "x", x, 1, 1, "one number");
  return item_impl<B>::run(ctx, matrix_view<const std::remove_const_t<T>, B>(x));
}

}  // namespace talpa::ops
