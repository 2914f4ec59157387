// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/index.hpp>

#include <cstdint>
#include <type_traits>

namespace talpa::detail {

/// A vector of `Bytes` of T and masks of its lanes.
template <class T, index Bytes>
struct kept_lanes {
  static constexpr index lanes = Bytes / static_cast<index>(sizeof(T));
  using word = std::conditional_t<sizeof(T) == 4, std::uint32_t, std::uint64_t>;
  typedef T vector __attribute__((vector_size(Bytes)));
  typedef word words __attribute__((vector_size(Bytes)));

  /// x in the lanes l where bit l is set, zero in the others, be they NaN.
  [[gnu::always_inline]] static vector of(vector x, std::uint32_t bits) {
    words lane = {};
    for (index l = 0; l < lanes; ++l) lane[l] = word{1} << l;
    // By copies: nvcc refuses casts between vectors.
    const auto is_on = (lane & static_cast<word>(bits)) != 0;
    words on, elements;
    static_assert(sizeof(is_on) == Bytes);
    __builtin_memcpy(&on, &is_on, Bytes);
    __builtin_memcpy(&elements, &x, Bytes);
    elements &= on;
    __builtin_memcpy(&x, &elements, Bytes);
    return x;
  }
};

}  // namespace talpa::detail
