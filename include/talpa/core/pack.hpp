// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/config.hpp>
#include <talpa/core/math.hpp>
#include <talpa/core/registers.hpp>

#include <concepts>
#include <cstdint>
#include <type_traits>

namespace talpa {

namespace detail {

/// Whether W values of type T are held in one vector register. Wider packs, which no kernel uses,
/// are arrays: g++ takes vectors beyond the registers apart, value by value.
template <class T, int W>
inline constexpr bool in_register =
    std::is_arithmetic_v<T>&& W > 1 &&
    (W & (W - 1)) == 0 && W* static_cast<int>(sizeof(T)) <= pack_bytes;

template <class T, int W, bool = in_register<T, W>>
struct pack_storage {
  typedef T type[W];
};
template <class T, int W>
struct pack_storage<T, W, true> {
  typedef T type __attribute__((vector_size(W * sizeof(T))));
};

}  // namespace detail

/// W values side by side: of W tokens (token_pack) or of W lanes (sim).
template <class T, int W>
struct pack {
  typename detail::pack_storage<T, W>::type v;
};

/// W conditions in the width of a float, all bits set where one holds and none where not, so that
/// comparing, combining and choosing stay in vector registers.
template <int W>
struct pack<bool, W> {
  typename detail::pack_storage<std::int32_t, W>::type v;
};

namespace detail {

/// The values of a pack as an array, which loops over them index. Both compilers define reading the
/// other member. A copy by memcpy would do, but g++ moves it in halves of a register, and reading
/// what two narrower stores have just written stalls.
template <class T, int W>
union pack_values {
  typename pack_storage<T, W>::type whole;
  T v[W];
};
template <class T, int W>
[[gnu::always_inline]] inline pack_values<T, W> values_of(const pack<T, W>& p) {
  pack_values<T, W> a;
  if constexpr (in_register<T, W>) {
    a.whole = p.v;
  } else {
    __builtin_memcpy(a.v, p.v, sizeof(a.v));
  }
  return a;
}

/// The pack with these values; conditions are held as integers.
template <class T, class Stored, int W>
[[gnu::always_inline]] inline pack<T, W> pack_of(const pack_values<Stored, W>& a) {
  pack<T, W> p;
  if constexpr (in_register<Stored, W>) {
    p.v = a.whole;
  } else {
    __builtin_memcpy(p.v, a.v, sizeof(a.v));
  }
  return p;
}

template <class T, int W, class F>
[[gnu::always_inline]] inline pack<T, W> make_pack(F f) {
  using stored = std::conditional_t<std::same_as<T, bool>, std::int32_t, T>;
  pack_values<stored, W> r;
  for_lanes<W>([&](int i) __attribute__((always_inline)) {
    if constexpr (std::same_as<T, bool>) {
      r.v[i] = -static_cast<std::int32_t>(f(i));
    } else {
      r.v[i] = f(i);
    }
  });
  return pack_of<T>(r);
}

/// The same value everywhere.
template <class T, int W>
[[gnu::always_inline]] inline pack<T, W> splat(T c) {
  if constexpr (std::same_as<T, bool> && in_register<std::int32_t, W>) {
    return {splat<std::int32_t, W>(-static_cast<std::int32_t>(c)).v};
  } else if constexpr (!std::same_as<T, bool> && in_register<T, W>) {
    return {c - typename pack_storage<T, W>::type{}};  // and -0 stays -0
  } else {
    return make_pack<T, W>([&](int) { return c; });
  }
}

/// A condition from what comparing two vectors of any width gives.
template <int W, class Comparison>
[[gnu::always_inline]] inline pack<bool, W> condition(Comparison c) {
  if constexpr (sizeof(c) == W * sizeof(std::int32_t)) {
    return {(typename pack_storage<std::int32_t, W>::type)c};
  } else {
    return {__builtin_convertvector(c, typename pack_storage<std::int32_t, W>::type)};
  }
}

}  // namespace detail

// Element-wise arithmetic. There is no operator*: see math::mul.
template <class T, int W>
[[gnu::always_inline]] inline pack<T, W> operator+(const pack<T, W>& a, const pack<T, W>& b) {
  if constexpr (detail::in_register<T, W>) {
    return {a.v + b.v};
  } else {
    return detail::make_pack<T, W>([&](int i) { return a.v[i] + b.v[i]; });
  }
}
template <class T, int W>
[[gnu::always_inline]] inline pack<T, W> operator-(const pack<T, W>& a, const pack<T, W>& b) {
  if constexpr (detail::in_register<T, W>) {
    return {a.v - b.v};
  } else {
    return detail::make_pack<T, W>([&](int i) { return a.v[i] - b.v[i]; });
  }
}
template <class T, int W>
[[gnu::always_inline]] inline pack<T, W> operator-(const pack<T, W>& a) {
  if constexpr (detail::in_register<T, W>) {
    return {-a.v};
  } else {
    return detail::make_pack<T, W>([&](int i) { return -a.v[i]; });
  }
}
template <class T, int W>
[[gnu::always_inline]] inline pack<T, W> operator/(const pack<T, W>& a, const pack<T, W>& b) {
  if constexpr (detail::in_register<T, W>) {
    return {a.v / b.v};
  } else {
    return detail::make_pack<T, W>([&](int i) { return a.v[i] / b.v[i]; });
  }
}
template <class T, int W>
[[gnu::always_inline]] inline pack<bool, W> operator<(const pack<T, W>& a, const pack<T, W>& b) {
  if constexpr (detail::in_register<T, W>) {
    return detail::condition<W>(a.v < b.v);
  } else {
    return detail::make_pack<bool, W>([&](int i) { return a.v[i] < b.v[i]; });
  }
}
template <class T, int W>
[[gnu::always_inline]] inline pack<bool, W> operator>(const pack<T, W>& a, const pack<T, W>& b) {
  return b < a;
}
template <class T, int W>
[[gnu::always_inline]] inline pack<bool, W> operator<=(const pack<T, W>& a, const pack<T, W>& b) {
  if constexpr (detail::in_register<T, W>) {
    return detail::condition<W>(a.v <= b.v);
  } else {
    return detail::make_pack<bool, W>([&](int i) { return a.v[i] <= b.v[i]; });
  }
}
template <class T, int W>
[[gnu::always_inline]] inline pack<bool, W> operator>=(const pack<T, W>& a, const pack<T, W>& b) {
  return b <= a;
}
template <class T, int W>
[[gnu::always_inline]] inline pack<bool, W> operator==(const pack<T, W>& a, const pack<T, W>& b) {
  if constexpr (detail::in_register<T, W>) {
    return detail::condition<W>(a.v == b.v);
  } else {
    return detail::make_pack<bool, W>([&](int i) { return a.v[i] == b.v[i]; });
  }
}
template <int W>
[[gnu::always_inline]] inline pack<bool, W> operator&(const pack<bool, W>& a,
                                                      const pack<bool, W>& b) {
  if constexpr (detail::in_register<std::int32_t, W>) {
    return {a.v & b.v};
  } else {
    return detail::make_pack<bool, W>([&](int i) { return (a.v[i] & b.v[i]) != 0; });
  }
}
template <int W>
[[gnu::always_inline]] inline pack<bool, W> operator|(const pack<bool, W>& a,
                                                      const pack<bool, W>& b) {
  if constexpr (detail::in_register<std::int32_t, W>) {
    return {a.v | b.v};
  } else {
    return detail::make_pack<bool, W>([&](int i) { return (a.v[i] | b.v[i]) != 0; });
  }
}
template <int W>
[[gnu::always_inline]] inline pack<bool, W> operator!(const pack<bool, W>& a) {
  if constexpr (detail::in_register<std::int32_t, W>) {
    return {~a.v};
  } else {
    return detail::make_pack<bool, W>([&](int i) { return a.v[i] == 0; });
  }
}

/// condition ? a : b, without a branch.
template <class T>
TALPA_HD inline T select(bool condition, T a, T b) {
  return condition ? a : b;
}
template <class T, int W>
[[gnu::always_inline]] inline pack<T, W> select(const pack<bool, W>& condition, const pack<T, W>& a,
                                                const pack<T, W>& b) {
  if constexpr (!detail::in_register<T, W> || !detail::in_register<std::int32_t, W>) {
    return detail::make_pack<T, W>([&](int i) { return condition.v[i] != 0 ? a.v[i] : b.v[i]; });
  } else if constexpr (sizeof(T) == sizeof(std::int32_t)) {
    return {condition.v ? a.v : b.v};
  } else {
    using wide = std::conditional_t<sizeof(T) == 8, std::int64_t, std::int16_t>;
    return {__builtin_convertvector(condition.v, typename detail::pack_storage<wide, W>::type)
                ? a.v
                : b.v};
  }
}
template <int W>
[[gnu::always_inline]] inline pack<bool, W> select(const pack<bool, W>& condition,
                                                   const pack<bool, W>& a, const pack<bool, W>& b) {
  const auto otherwise = !condition;
  return (condition & a) | (otherwise & b);
}

namespace detail {

/// The larger and the smaller of two values; one instruction each where a target has it.
template <class Value>
[[gnu::always_inline]] TALPA_HD inline Value larger(const Value& a, const Value& b) {
  return talpa::select(a > b, a, b);
}
template <class Value>
[[gnu::always_inline]] TALPA_HD inline Value smaller(const Value& a, const Value& b) {
  return talpa::select(a < b, a, b);
}
template <class T, int W>
requires in_register<T, W>
[[gnu::always_inline]] inline pack<T, W> larger(const pack<T, W>& a, const pack<T, W>& b) {
  return {a.v > b.v ? a.v : b.v};
}
template <class T, int W>
requires in_register<T, W>
[[gnu::always_inline]] inline pack<T, W> smaller(const pack<T, W>& a, const pack<T, W>& b) {
  return {a.v < b.v ? a.v : b.v};
}

/// N packs in place, f(x) for an array x of the i-th value of each.
template <class T, int W, int N, class F>
[[gnu::always_inline]] inline void change_packs(pack<T, W> (&a)[N], F f) {
  pack_values<T, W> v[N];
#pragma GCC unroll 8
  for (int k = 0; k < N; ++k) v[k] = values_of(a[k]);
  for_lanes<W>([&](int i) __attribute__((always_inline)) {
    T x[N];
#pragma GCC unroll 8
    for (int k = 0; k < N; ++k) x[k] = v[k].v[i];
    f(x);
#pragma GCC unroll 8
    for (int k = 0; k < N; ++k) v[k].v[i] = x[k];
  });
#pragma GCC unroll 8
  for (int k = 0; k < N; ++k) a[k] = pack_of<T>(v[k]);
}

}  // namespace detail

namespace math {
template <class T, int W>
[[gnu::always_inline]] inline pack<T, W> fma(const pack<T, W>& a, const pack<T, W>& b,
                                             const pack<T, W>& c) {
  const auto x = talpa::detail::values_of(a), y = talpa::detail::values_of(b),
             z = talpa::detail::values_of(c);
  return talpa::detail::make_pack<T, W>([&](int i) __attribute__((always_inline)) {
    return math::fma(x.v[i], y.v[i], z.v[i]);
  });
}
template <class T, int W>
[[gnu::always_inline]] inline pack<T, W> mul(const pack<T, W>& a, const pack<T, W>& b) {
  const auto x = talpa::detail::values_of(a), y = talpa::detail::values_of(b);
  return talpa::detail::make_pack<T, W>([&](int i) __attribute__((always_inline)) {
    return math::mul(x.v[i], y.v[i]);
  });
}
template <class T, int W>
[[gnu::always_inline]] inline pack<T, W> exp(const pack<T, W>& a) {
  const auto x = talpa::detail::values_of(a);
  return talpa::detail::make_pack<T, W>([&](int i) __attribute__((always_inline)) {
    return math::exp(x.v[i]);
  });
}
template <class T, int W, int N>
[[gnu::always_inline]] inline void exp_nonpositive(pack<T, W> (&a)[N]) {
  talpa::detail::change_packs(
      a, [](T(&x)[N]) __attribute__((always_inline)) { detail::exp_nonpositive(x); });
}
template <class T, int W>
[[gnu::always_inline]] inline pack<T, W> exp_nonpositive(const pack<T, W>& a) {
  pack<T, W> x[1] = {a};
  math::exp_nonpositive(x);
  return x[0];
}
template <class T, int W>
[[gnu::always_inline]] inline pack<T, W> log(const pack<T, W>& a) {
  const auto x = talpa::detail::values_of(a);
  return talpa::detail::make_pack<T, W>([&](int i) __attribute__((always_inline)) {
    return math::log(x.v[i]);
  });
}
template <class T, int W>
[[gnu::always_inline]] inline pack<T, W> expm1(const pack<T, W>& a) {
  const auto x = talpa::detail::values_of(a);
  return talpa::detail::make_pack<T, W>([&](int i) __attribute__((always_inline)) {
    return math::expm1(x.v[i]);
  });
}
template <class T, int W, int N>
[[gnu::always_inline]] inline void expm1_nonpositive(pack<T, W> (&a)[N]) {
  talpa::detail::change_packs(
      a, [](T(&x)[N]) __attribute__((always_inline)) { detail::expm1_nonpositive(x); });
}
template <class T, int W>
[[gnu::always_inline]] inline pack<T, W> expm1_nonpositive(const pack<T, W>& a) {
  pack<T, W> x[1] = {a};
  math::expm1_nonpositive(x);
  return x[0];
}
template <class T, int W>
[[gnu::always_inline]] inline pack<T, W> log1p(const pack<T, W>& a) {
  const auto x = talpa::detail::values_of(a);
  return talpa::detail::make_pack<T, W>([&](int i) __attribute__((always_inline)) {
    return math::log1p(x.v[i]);
  });
}
template <class T, int W>
[[gnu::always_inline]] inline pack<T, W> sigmoid(const pack<T, W>& a) {
  const auto x = talpa::detail::values_of(a);
  return talpa::detail::make_pack<T, W>([&](int i) __attribute__((always_inline)) {
    return math::sigmoid(x.v[i]);
  });
}
template <class T, int W>
[[gnu::always_inline]] inline pack<T, W> sigmoid_derivative(const pack<T, W>& a) {
  const auto x = talpa::detail::values_of(a);
  return talpa::detail::make_pack<T, W>([&](int i) __attribute__((always_inline)) {
    return math::sigmoid_derivative(x.v[i]);
  });
}
template <class T, int W>
[[gnu::always_inline]] inline pack<T, W> softplus(const pack<T, W>& a) {
  const auto x = talpa::detail::values_of(a);
  return talpa::detail::make_pack<T, W>([&](int i) __attribute__((always_inline)) {
    return math::softplus(x.v[i]);
  });
}
template <class T, int W>
[[gnu::always_inline]] inline pack<T, W> normal_cdf(const pack<T, W>& a) {
  return talpa::detail::make_pack<T, W>([&](int i) { return math::normal_cdf(a.v[i]); });
}
template <class T, int W>
[[gnu::always_inline]] inline pack<T, W> normal_density(const pack<T, W>& a) {
  return talpa::detail::make_pack<T, W>([&](int i) { return math::normal_density(a.v[i]); });
}
}  // namespace math

}  // namespace talpa
