// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace talpa::detail {

/// Where place j of a row comes from in one step of transposing C rows of C values: x takes from y
/// what lies D to the left of its place, y from x what lies D to the right.
template <int D, int C>
struct x_source {
  constexpr int operator()(int j) const { return (j & D) != 0 ? C + j - D : j; }
};
template <int D, int C>
struct y_source {
  constexpr int operator()(int j) const { return (j & D) != 0 ? C + j : j + D; }
};
/// The values of a and b that m names. Written out, since nvcc loses the dots of a pack here.
template <int C, class V, class M>
[[gnu::always_inline]] inline V shuffled(const V& a, const V& b, M) {
  constexpr M m;
  if constexpr (C == 4) {
    return __builtin_shufflevector(a, b, m(0), m(1), m(2), m(3));
  } else if constexpr (C == 8) {
    return __builtin_shufflevector(a, b, m(0), m(1), m(2), m(3), m(4), m(5), m(6), m(7));
  } else {
    static_assert(C == 16);
    return __builtin_shufflevector(a, b, m(0), m(1), m(2), m(3), m(4), m(5), m(6), m(7), m(8), m(9),
                                   m(10), m(11), m(12), m(13), m(14), m(15));
  }
}
template <int D, int C, class V>
[[gnu::always_inline]] inline void transpose_from(V (&r)[C]) {
#pragma GCC unroll 16
  for (int i = 0; i < C; ++i) {
    if ((i & D) != 0) continue;
    const V x = r[i], y = r[i + D];
    r[i] = shuffled<C>(x, y, x_source<D, C>{});
    r[i + D] = shuffled<C>(x, y, y_source<D, C>{});
  }
  if constexpr (D > 1) transpose_from<D / 2, C>(r);
}
/// r[i][j] becomes r[j][i].
template <int C, class V>
[[gnu::always_inline]] inline void transpose_rows(V (&r)[C]) {
  transpose_from<C / 2, C>(r);
}

}  // namespace talpa::detail
