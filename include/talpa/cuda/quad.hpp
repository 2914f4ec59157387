// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/config.hpp>
#include <talpa/core/view.hpp>

#include <cstdint>

namespace talpa::kernels {

/// Four neighbouring numbers, one access to memory.
template <class T>
struct alignas(4 * sizeof(T)) quad {
  T v[4];
};
template <class T>
TALPA_HD quad<T> load_quad(const T* p) {
  return *reinterpret_cast<const quad<T>*>(p);
}
template <class T>
TALPA_HD void store_quad(T* p, const quad<T>& q) {
  *reinterpret_cast<quad<T>*>(p) = q;
}

/// Width neighbours, 1 or 4, in the type that sums are formed in.
template <class Sum, int Width>
struct neighbours {
  Sum v[Width];
};
template <class Sum, int Width, class T>
TALPA_HD neighbours<Sum, Width> load_wide(const T* p) {
  neighbours<Sum, Width> x;
  if constexpr (Width == 4) {
    const quad<T> q = load_quad(p);
    TALPA_UNROLL
    for (int i = 0; i < 4; ++i) x.v[i] = static_cast<Sum>(q.v[i]);
  } else {
    x.v[0] = static_cast<Sum>(*p);
  }
  return x;
}
template <class Sum, int Width, class T>
TALPA_HD void store_wide(T* p, const neighbours<Sum, Width>& x) {
  if constexpr (Width == 4) {
    quad<T> q;
    TALPA_UNROLL
    for (int i = 0; i < 4; ++i) q.v[i] = static_cast<T>(x.v[i]);
    store_quad(p, q);
  } else {
    *p = static_cast<T>(x.v[0]);
  }
}

/// Whether every fourth number of every row of a view begins a quad.
template <class T, class B>
bool holds_quads(const matrix_view<T, B>& m) {
  return reinterpret_cast<std::uintptr_t>(m.data) % (4 * sizeof(T)) == 0 && m.stride % 4 == 0;
}

}  // namespace talpa::kernels
