// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/view.hpp>

#include <type_traits>

namespace talpa::ops {

template <class B>
struct fill_impl {
  static_assert(detail::always_false<B>,
                "talpa: ops::fill has no implementation for this backend here, include "
                "talpa/cpu/fill.hpp for cpu, talpa/cuda/fill.hpp for gpu "
                "(docs/architecture.md)");
};

/// Sets every element of y to one value.
///
/// Shapes: y any, may be strided; what lies between its rows is left alone.
/// Cost: writes y once. Determinism: exact.
/// Throws: nothing.
template <class B, class T>
void fill(context<B>& ctx, std::type_identity_t<T> value, matrix_view<T, B> y) {
  fill_impl<B>::run(ctx, value, y);
}

}  // namespace talpa::ops
