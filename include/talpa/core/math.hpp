// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/config.hpp>

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <limits>

/// Scalar functions with the same bits everywhere.
///
/// Every function is built from IEEE 754 addition, multiplication, division, square root and fused
/// multiply-add, plus integer operations on the bit patterns; none calls a mathematical library. So
/// a result has the same bits on every IEEE machine, with every compiler and optimisation level,
/// with and without a hardware fma, in a scalar call, in a vectorised loop and on a CUDA device.
/// Only the sign and payload of a NaN are left open.
///
/// That holds for round-to-nearest arithmetic with subnormal numbers, the default everywhere. Flags
/// that give it up (-ffast-math and its parts, -Ofast, nvcc's -use_fast_math, -ftz=true,
/// -prec-div=false, -prec-sqrt=false) void both the bits and the bounds. Contraction of
/// multiplications into additions (gcc's default, clang's -ffp-contract=fast, nvcc's -fmad=true) is
/// harmless: in this file no inexact product meets an addition except through fma() or mul().
///
/// The functions have no data-dependent branch, and are inlined always, so a plain loop that calls
/// them vectorises. Without a hardware fma (x86-64 code built without -mfma or -march=native) each
/// fma is a library call.
///
/// Bounds: one ulp of an exact value y is the spacing of T around it, 2^(e - 23) or 2^(e - 52) for
/// 2^e <= |y| < 2^(e + 1), not below the smallest subnormal; eps is the epsilon of T. The bounds
/// come from an error analysis that holds for both types. "Seen" is the largest error met, over all
/// 2^32 arguments of float and 10^8 random ones of double.
namespace talpa::math {

static_assert(std::numeric_limits<float>::is_iec559 && std::numeric_limits<double>::is_iec559,
              "talpa: float and double must be the IEEE 754 binary32 and binary64 formats");
static_assert(FLT_EVAL_METHOD == 0,
              "talpa: float and double expressions must be evaluated in their own type "
              "(on 32-bit x86: -msse2 -mfpmath=sse)");

/// Computes a * b + c with one rounding (IEEE 754 fusedMultiplyAdd).
[[gnu::always_inline]] TALPA_HD inline float fma(float a, float b, float c) {
  return std::fma(a, b, c);
}
[[gnu::always_inline]] TALPA_HD inline double fma(double a, double b, double c) {
  return std::fma(a, b, c);
}

/// Computes the correctly rounded square root; NaN below zero.
[[gnu::always_inline]] TALPA_HD inline float sqrt(float x) { return std::sqrt(x); }
[[gnu::always_inline]] TALPA_HD inline double sqrt(double x) { return std::sqrt(x); }

namespace detail {

// Per type: the layout of the format, where the functions saturate, and constants. The members are
// initialised at namespace scope because numeric_limits' functions are host code for nvcc.
template <class T>
struct format;

template <>
struct format<float> {
  using bits = std::uint32_t;
  static constexpr int mantissa = 23;
  static constexpr bits bias = 127;
  static constexpr bits sign = 0x80000000u;
  static constexpr int two_to_sign = 30;          // moves bit 1 to the sign
  static constexpr bits root_half = 0x3f3504f3u;  // sqrt(1/2)

  static constexpr float infinity = std::numeric_limits<float>::infinity();
  static constexpr float nan = std::numeric_limits<float>::quiet_NaN();
  static constexpr float min_normal = std::numeric_limits<float>::min();

  // x + shift, for |x| <= 2^22, leaves round(x) in the low bits of the pattern of the sum.
  static constexpr float shift = 12582912.0f;   // 1.5 * 2^23
  static constexpr float counter = 8388608.0f;  // 2^23: adding an integer below 2^23 is exact

  // e^exp_max overflows; 2 |x| e^x rounds to zero for x <= exp_min, and 2^(k / 2) stays normal for
  // the k = round(x / ln 2) between them.
  static constexpr float exp_max = 89.0f;
  static constexpr float exp_min = -120.0f;
  static constexpr float expm1_min = -17.4f;  // e^expm1_min < 2^-25, half an ulp below one
  static constexpr bits exp_lift = 64;  // 2^(k + exp_lift) is normal for the k of exp_min .. 0
  static constexpr float gelu_range = 12.0f;  // |u(gelu_range)| > -exp_min, u as in gelu_tanh
  // normal_range^2 / 2 < -exp_min, and e^(-normal_range^2 / 2) rounds to zero
  static constexpr float normal_range = 15.25f;
  static constexpr float normal_centre = 4.0f;  // see normal_tail

  // ln_two_high has 16 bits, so its product with an integer below 2^8 is exact;
  // ln 2 - ln_two_high - ln_two_low is 2^-44.
  static constexpr float log2_e = 1.44269504f;
  static constexpr float ln_two_high = 0.693145752f;
  static constexpr float ln_two_low = 1.42860677e-6f;

  static constexpr float subnormal_scale = 16777216.0f;  // 2^24
  static constexpr float subnormal_exponent = 24.0f;

  static constexpr float half_pi_high = 1.57079637f;
  static constexpr float half_pi_low = -4.37113883e-8f;
};

template <>
struct format<double> {
  using bits = std::uint64_t;
  static constexpr int mantissa = 52;
  static constexpr bits bias = 1023;
  static constexpr bits sign = 0x8000000000000000u;
  static constexpr int two_to_sign = 62;
  static constexpr bits root_half = 0x3fe6a09e667f3bcdu;

  static constexpr double infinity = std::numeric_limits<double>::infinity();
  static constexpr double nan = std::numeric_limits<double>::quiet_NaN();
  static constexpr double min_normal = std::numeric_limits<double>::min();

  static constexpr double shift = 6755399441055744.0;    // 1.5 * 2^52
  static constexpr double counter = 4503599627370496.0;  // 2^52

  static constexpr double exp_max = 710.0;
  static constexpr double exp_min = -760.0;
  static constexpr double expm1_min = -37.45;  // e^expm1_min < 2^-54
  static constexpr bits exp_lift = 512;
  static constexpr double gelu_range = 24.0;
  static constexpr double normal_range = 38.875;
  static constexpr double normal_centre = 6.0;

  // ln_two_high has 42 bits, for integers below 2^11; the remainder is 2^-102.
  static constexpr double log2_e = 1.4426950408889634;
  static constexpr double ln_two_high = 0.69314718055989033;
  static constexpr double ln_two_low = 5.4979230187083712e-14;

  static constexpr double subnormal_scale = 18014398509481984.0;  // 2^54
  static constexpr double subnormal_exponent = 54.0;

  static constexpr double half_pi_high = 1.5707963267948966;
  static constexpr double half_pi_low = 6.123233995736766e-17;
};

// The builtin behind std::bit_cast, which is host code for nvcc.
[[gnu::always_inline]] TALPA_HD inline std::uint32_t to_bits(float x) {
  return __builtin_bit_cast(std::uint32_t, x);
}
[[gnu::always_inline]] TALPA_HD inline std::uint64_t to_bits(double x) {
  return __builtin_bit_cast(std::uint64_t, x);
}
[[gnu::always_inline]] TALPA_HD inline float from_bits(std::uint32_t x) {
  return __builtin_bit_cast(float, x);
}
[[gnu::always_inline]] TALPA_HD inline double from_bits(std::uint64_t x) {
  return __builtin_bit_cast(double, x);
}

template <class T>
[[gnu::always_inline]] TALPA_HD inline T absolute(T x) {
  return from_bits(to_bits(x) & ~format<T>::sign);
}

// yes where condition, else no, by masks: written with ?:, the arithmetic behind an arm may end up
// under a branch, and gcc does not turn a branch around arithmetic that may trap into a blend.
template <class T>
[[gnu::always_inline]] TALPA_HD inline T select(bool condition, T yes, T no) {
  using bits = typename format<T>::bits;
  const bits mask = bits(0) - bits(condition);
  return from_bits((to_bits(yes) & mask) | (to_bits(no) & ~mask));
}

// A zero with the sign of a * b, computed so that no compiler can know its value: a constant -0.0
// would do for the arithmetic, but LLVM turns fma(a, b, -0.0) back into a product and then, under
// -ffp-contract=fast, contracts that.
template <class T>
[[gnu::always_inline]] TALPA_HD inline T mul(T a, T b) {
  const T zero = from_bits((to_bits(a) ^ to_bits(b)) & format<T>::sign);
  return math::fma(a, b, zero);
}

// (e^r - 1 - r) / r^2 for |r| <= ln 2 / 2 (1 + 1e-4), the first coefficient held at 1/2, the others
// a Remez fit of the error of e^r relative to e^r, rounded to T. Degree 5, error 2^-30.8.
[[gnu::always_inline]] TALPA_HD inline float exp_tail(float r) {
  float p = 0.000173658409f;
  p = math::fma(p, r, 0.00139332656f);
  p = math::fma(p, r, 0.00833781622f);
  p = math::fma(p, r, 0.0416664816f);
  p = math::fma(p, r, 0.166666478f);
  return math::fma(p, r, 0.5f);
}

// The same with degree 10, error 2^-60.3.
[[gnu::always_inline]] TALPA_HD inline double exp_tail(double r) {
  double p = 2.1014288533674274e-9;
  p = math::fma(p, r, 2.5115291224289216e-8);
  p = math::fma(p, r, 2.7556978807316046e-7);
  p = math::fma(p, r, 2.7557225272179943e-6);
  p = math::fma(p, r, 2.4801587629893992e-5);
  p = math::fma(p, r, 0.00019841269906227248);
  p = math::fma(p, r, 0.001388888888875712);
  p = math::fma(p, r, 0.0083333333333129676);
  p = math::fma(p, r, 0.041666666666666845);
  p = math::fma(p, r, 0.16666666666666688);
  return math::fma(p, r, 0.5);
}

// (log((1 + s) / (1 - s)) - 2 s) / s as a polynomial in z = s^2 without constant term, for
// |s| <= (sqrt 2 - 1) / (sqrt 2 + 1): a Remez fit, rounded to T. Degree 3 in z; error relative to
// the logarithm 2^-30.0.
[[gnu::always_inline]] TALPA_HD inline float log_tail(float z) {
  float p = 0.298717558f;
  p = math::fma(p, z, 0.399775416f);
  p = math::fma(p, z, 0.666667759f);
  return p * z;
}

// The same with degree 7, error 2^-58.9.
[[gnu::always_inline]] TALPA_HD inline double log_tail(double z) {
  double p = 0.14795984421251104;
  p = math::fma(p, z, 0.15314047203392583);
  p = math::fma(p, z, 0.1818356445210122);
  p = math::fma(p, z, 0.2222219857086303);
  p = math::fma(p, z, 0.28571428742409044);
  p = math::fma(p, z, 0.39999999999414587);
  p = math::fma(p, z, 0.6666666666666734);
  return p * z;
}

// (sin(pi r / 2) / r - pi / 2) / z in z = r^2 for |r| <= 1/2: a Remez fit of the error relative to
// the sine, rounded to T. Degree 2, error 2^-27.1.
[[gnu::always_inline]] TALPA_HD inline float sin_tail(float z) {
  float p = -0.0046048332f;
  p = math::fma(p, z, 0.0796814114f);
  return math::fma(p, z, -0.645963609f);
}

// The same with degree 6, error 2^-57.3.
[[gnu::always_inline]] TALPA_HD inline double sin_tail(double z) {
  double p = -6.6280182191145182e-10;
  p = math::fma(p, z, 5.6919316527013957e-8);
  p = math::fma(p, z, -3.5988427318960739e-6);
  p = math::fma(p, z, 0.00016044118472959703);
  p = math::fma(p, z, -0.0046817541353151391);
  p = math::fma(p, z, 0.079692626246166937);
  return math::fma(p, z, -0.64596409750624628);
}

// (cos(pi r / 2) - 1) / z likewise. Degree 3, error 2^-26.4.
[[gnu::always_inline]] TALPA_HD inline float cos_tail(float z) {
  float p = 0.000903766428f;
  p = math::fma(p, z, -0.0208601654f);
  p = math::fma(p, z, 0.253669232f);
  return math::fma(p, z, -1.23370051f);
}

// The same with degree 6, error 2^-55.2.
[[gnu::always_inline]] TALPA_HD inline double cos_tail(double z) {
  double p = -6.3212014049106087e-9;
  p = math::fma(p, z, 4.710609663809565e-7);
  p = math::fma(p, z, -2.5202036788108296e-5);
  p = math::fma(p, z, 0.00091926027419103823);
  p = math::fma(p, z, -0.020863480763312566);
  p = math::fma(p, z, 0.25366950790104681);
  return math::fma(p, z, -1.2337005501361697);
}

// e^x = 2^k (1 + high + low): high is x - k ln_two_high, exactly, |low| < 0.08; first and second
// are powers of two, normal numbers, whose product is 2^k.
template <class T>
struct exp_parts {
  T high;
  T low;
  T first;
  T second;
  T inverse_second;
};

// The same with k + shift in the place of the powers.
template <class T>
struct exp_reduced {
  T high;
  T low;
  T shifted;
};

// For exp_min <= x <= exp_max. NaN comes out as NaN in high and low.
template <class T>
[[gnu::always_inline]] TALPA_HD inline exp_reduced<T> reduce_exp(T x) {
  using F = format<T>;
  const T shifted = math::fma(x, F::log2_e, F::shift);
  const T k = shifted - F::shift;
  const T high = math::fma(k, -F::ln_two_high, x);
  const T carry = k * -F::ln_two_low;
  const T r = math::fma(k, -F::ln_two_low, high);
  return {high, math::fma(r * r, exp_tail(r), carry), shifted};
}
template <class T>
[[gnu::always_inline]] TALPA_HD inline exp_parts<T> split_exp(T x) {
  using F = format<T>;
  using bits = typename F::bits;
  const exp_reduced<T> e = reduce_exp(x);
  // Biased exponents; unsigned, because AVX2 has no arithmetic shift of 64-bit integers.
  const bits sum = to_bits(e.shifted) - to_bits(F::shift) + 2 * F::bias;
  const bits first = sum >> 1;
  const bits second = sum - first;
  return {e.high, e.low, from_bits(first << F::mantissa), from_bits(second << F::mantissa),
          from_bits((2 * F::bias - second) << F::mantissa)};
}

// e^x = value * scale, where scale is a power of two and value a normal number.
template <class T>
struct scaled {
  T value;
  T scale;
};

template <class T>
[[gnu::always_inline]] TALPA_HD inline scaled<T> exp_scaled(T x) {
  using F = format<T>;
  T bounded = select(x > F::exp_max, F::exp_max, x);
  bounded = select(bounded < F::exp_min, F::exp_min, bounded);
  const exp_parts<T> p = split_exp(bounded);
  return {math::fma(p.first, p.high + p.low, p.first), p.second};
}

// e / (1 + e)^2
template <class T>
[[gnu::always_inline]] TALPA_HD inline T bell(scaled<T> e) {
  const T power = e.value * e.scale;
  return power / math::fma(power, math::fma(e.value, e.scale, T(2)), T(1));
}

template <class T>
[[gnu::always_inline]] TALPA_HD inline T exp(T x) {
  const scaled<T> e = exp_scaled(x);
  return math::fma(e.value, e.scale, T(0));  // mul: both are positive
}

// exp for x <= 0: 2^k is scaled by one power of two, so that it stays normal, and back. The
// significand is rounded as there, and the result where it is subnormal. Of N numbers in lock-step:
// one chain of operations waits for itself, several side by side keep the units busy.
template <class T, int N>
[[gnu::always_inline]] TALPA_HD inline void exp_nonpositive(T (&x)[N]) {
  using F = format<T>;
  exp_reduced<T> e[N];
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) e[i] = reduce_exp(select(x[i] < F::exp_min, F::exp_min, x[i]));
  const T back = from_bits((F::bias - F::exp_lift) << F::mantissa);
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) {
    // The pattern of shift, moved as far, is zero: what is left is k.
    const T power = from_bits((to_bits(e[i].shifted) << F::mantissa) +
                              ((F::bias + F::exp_lift) << F::mantissa));
    const T value = math::fma(power, e[i].high + e[i].low, power);
    x[i] = math::fma(value, back, T(0));  // mul: both are positive
  }
}

// The same where 2^k and the result are normal.
template <class T>
[[gnu::always_inline]] TALPA_HD inline T exp_normal(T x) {
  using F = format<T>;
  const exp_reduced<T> e = reduce_exp(x);
  const T power = from_bits((to_bits(e.shifted) << F::mantissa) + (F::bias << F::mantissa));
  return math::fma(power, e.high + e.low, power);
}

// With a = first, b = 1 / second: second * ((a - b) + a high + a low), the first two terms summed
// with their rounding errors.
template <class T>
[[gnu::always_inline]] TALPA_HD inline T expm1(T x) {
  using F = format<T>;
  T bounded = select(x > F::exp_max, F::exp_max, x);
  bounded = select(bounded < F::expm1_min, F::expm1_min, bounded);
  const exp_parts<T> p = split_exp(bounded);
  const T difference = p.first - p.inverse_second;
  const T lost = (p.first - difference) - p.inverse_second;
  const T sum = math::fma(p.first, p.high, difference);
  const T error = math::fma(p.first, p.high, difference - sum) + lost;
  const T y = mul(sum + math::fma(p.first, p.low, error), p.second);
  return select(x == T(0), x, y);
}

// 2^k - 1 + 2^k p with p = e^r - 1 and one rounding; for k <= 0 the difference is exact or -1. Of N
// numbers in lock-step.
template <class T, int N>
[[gnu::always_inline]] TALPA_HD inline void expm1_nonpositive(T (&x)[N]) {
  using F = format<T>;
  T shifted[N], r[N];
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) {
    const T bounded = select(x[i] < F::expm1_min, F::expm1_min, x[i]);
    shifted[i] = math::fma(bounded, F::log2_e, F::shift);
    const T k = shifted[i] - F::shift;
    r[i] = math::fma(k, -F::ln_two_low, math::fma(k, -F::ln_two_high, bounded));
  }
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) {
    const T p = math::fma(r[i] * r[i], exp_tail(r[i]), r[i]);
    const T power = from_bits((to_bits(shifted[i]) - to_bits(F::shift) + F::bias) << F::mantissa);
    x[i] = math::fma(power, p, power - T(1));
  }
}

// log(u) - k0 ln 2 + correction for a positive normal u. With u = 2^k m, sqrt(1/2) <= m < sqrt 2,
// f = m - 1 and s = f / (2 + f):
//   log u = k ln 2 + f - f^2 / 2 + s (f^2 / 2 + log_tail(s^2)),
// where k ln_two_high is exact and the error of adding f to it is kept.
template <class T>
[[gnu::always_inline]] TALPA_HD inline T log_normal(T u, T k0, T correction) {
  using F = format<T>;
  using bits = typename F::bits;
  const bits pattern = to_bits(u) + ((F::bias << F::mantissa) - F::root_half);
  const bits fraction = pattern & ((bits(1) << F::mantissa) - 1);
  const T f = from_bits(fraction + F::root_half) - T(1);
  const T biased = from_bits(to_bits(F::counter) | (pattern >> F::mantissa));
  const T k = biased - (F::counter + (T(F::bias) + k0));

  const T s = f / (T(2) + f);
  const T half_f = T(0.5) * f;
  const T bracket = math::fma(half_f, f, log_tail(s * s));
  const T sum = math::fma(k, F::ln_two_high, f);
  const T error = f - math::fma(-k, F::ln_two_high, sum);
  const T small = math::fma(k, F::ln_two_low, error + correction);
  return sum + math::fma(-half_f, f, math::fma(s, bracket, small));
}

template <class T>
[[gnu::always_inline]] TALPA_HD inline T log(T x) {
  using F = format<T>;
  const bool subnormal = x < F::min_normal;
  const T scale = select(subnormal, F::subnormal_scale, T(1));
  const T k0 = select(subnormal, F::subnormal_exponent, T(0));
  T y = log_normal(x * scale, k0, T(0));
  y = select(x == F::infinity, x, y);
  y = select(x == T(0), -F::infinity, y);
  return select(x >= T(0), y, F::nan);
}

template <class T>
[[gnu::always_inline]] TALPA_HD inline T log1p(T x) {
  using F = format<T>;
  const T u = T(1) + x;
  const T x_part = u - T(1);
  const T c = (T(1) - (u - x_part)) + (x - x_part);  // 1 + x - u, exactly (Knuth's two-sum)
  T y = log_normal(u, T(0), c / u);                  // log(u + c) = log u + c / u up to (c / u)^2
  y = select(x == F::infinity, x, y);
  y = select(x == T(0), x, y);
  y = select(x == T(-1), -F::infinity, y);
  return select(x >= T(-1), y, F::nan);
}

template <class T>
[[gnu::always_inline]] TALPA_HD inline T tanh(T x) {
  using F = format<T>;
  const T t = detail::expm1(T(-2) * absolute(x));
  const T y = t / (T(2) + t);
  return from_bits((to_bits(y) & ~F::sign) | (to_bits(x) & F::sign));
}

template <class T>
[[gnu::always_inline]] TALPA_HD inline T tanh_derivative(T x) {
  return T(4) * bell(exp_scaled(T(-2) * absolute(x)));
}

template <class T>
[[gnu::always_inline]] TALPA_HD inline T sigmoid(T x) {
  const scaled<T> e = exp_scaled(-absolute(x));
  const T d = math::fma(e.value, e.scale, T(1));
  return select(x < T(0), e.value * e.scale, T(1)) / d;
}

template <class T>
[[gnu::always_inline]] TALPA_HD inline T sigmoid_derivative(T x) {
  return bell(exp_scaled(-absolute(x)));
}

template <class T>
[[gnu::always_inline]] TALPA_HD inline T silu(T x) {
  using F = format<T>;
  const T bounded = select(x < F::exp_min, F::exp_min, x);
  const scaled<T> e = exp_scaled(-absolute(bounded));
  const T d = math::fma(e.value, e.scale, T(1));
  return select(x < T(0), bounded * e.value * e.scale, x) / d;
}

template <class T>
[[gnu::always_inline]] TALPA_HD inline T silu_derivative(T x) {
  using F = format<T>;
  T bounded = select(x < F::exp_min, F::exp_min, x);
  bounded = select(bounded > -F::exp_min, -F::exp_min, bounded);
  const scaled<T> e = exp_scaled(-absolute(bounded));
  const T d = math::fma(e.value, e.scale, T(1));
  const T gate = select(x < T(0), e.value * e.scale, T(1)) / d;
  return math::fma(bounded, bell(e), gate);
}

// 2 sqrt(2 / pi) and 0.044715 times that.
inline constexpr double gelu_linear = 1.5957691216057308;
inline constexpr double gelu_cubic = 0.071354816272600253;

template <class T>
[[gnu::always_inline]] TALPA_HD inline T gelu_tanh(T x) {
  using F = format<T>;
  const T bounded = select(x < -F::gelu_range, -F::gelu_range, x);
  const T u = bounded * math::fma(T(gelu_cubic), bounded * bounded, T(gelu_linear));
  const scaled<T> e = exp_scaled(-absolute(u));
  const T d = math::fma(e.value, e.scale, T(1));
  return select(x < T(0), bounded * e.value * e.scale, x) / d;
}

template <class T>
[[gnu::always_inline]] TALPA_HD inline T gelu_tanh_derivative(T x) {
  using F = format<T>;
  T bounded = select(x < -F::gelu_range, -F::gelu_range, x);
  bounded = select(bounded > F::gelu_range, F::gelu_range, bounded);
  const T square = bounded * bounded;
  const T u = bounded * math::fma(T(gelu_cubic), square, T(gelu_linear));
  const T du = math::fma(T(3 * gelu_cubic), square, T(gelu_linear));
  const scaled<T> e = exp_scaled(-absolute(u));
  const T d = math::fma(e.value, e.scale, T(1));
  const T gate = select(x < T(0), e.value * e.scale, T(1)) / d;
  return math::fma(bounded * du, bell(e), gate);
}

// With w = a / (a + c), c = normal_centre, and q = 2 w - 1: (r(a) - 1/2) / w for
// r(a) = (1 + 5/4 a) Phi(-a) e^(a^2 / 2), which lies between 0.498 and 0.57 for all a >= 0.
// Interpolated at the Chebyshev nodes of 0 <= a <= normal_range and rounded to T. Degree 9, error
// relative to r 2^-26.5.
[[gnu::always_inline]] TALPA_HD inline float normal_tail_shape(float q) {
  float p = -0.000156267226f;
  p = math::fma(p, q, 9.11333482e-5f);
  p = math::fma(p, q, 0.00174315588f);
  p = math::fma(p, q, -0.00286888937f);
  p = math::fma(p, q, -0.00991622638f);
  p = math::fma(p, q, 0.0590240732f);
  p = math::fma(p, q, -0.154943705f);
  p = math::fma(p, q, 0.262296349f);
  p = math::fma(p, q, -0.289487481f);
  return math::fma(p, q, 0.132927701f);
}

// The same with degree 21, error 2^-55.4.
[[gnu::always_inline]] TALPA_HD inline double normal_tail_shape(double q) {
  double p = 3.3047532366820021e-9;
  p = math::fma(p, q, 1.7181971096464678e-9);
  p = math::fma(p, q, -4.2579307585128973e-8);
  p = math::fma(p, q, 7.0729533166523005e-11);
  p = math::fma(p, q, 3.4666927337464381e-7);
  p = math::fma(p, q, -3.8403240652472301e-7);
  p = math::fma(p, q, -2.1771353364320323e-6);
  p = math::fma(p, q, 6.9976272466440513e-6);
  p = math::fma(p, q, 3.7987771252499038e-6);
  p = math::fma(p, q, -7.2425792187975712e-5);
  p = math::fma(p, q, 0.00017716613837880801);
  p = math::fma(p, q, 0.00011537094942167663);
  p = math::fma(p, q, -0.0023780436703012692);
  p = math::fma(p, q, 0.010223908561455561);
  p = math::fma(p, q, -0.029582421184834611);
  p = math::fma(p, q, 0.067122799530451763);
  p = math::fma(p, q, -0.12603283706341153);
  p = math::fma(p, q, 0.20004127463360777);
  p = math::fma(p, q, -0.26880664428175988);
  p = math::fma(p, q, 0.29882619723235776);
  p = math::fma(p, q, -0.25221338255151354);
  return math::fma(p, q, 0.10124834351559642);
}

// e^(-x^2 / 2) = value * scale for |x| <= normal_range; the square carries its rounding error.
template <class T>
[[gnu::always_inline]] TALPA_HD inline scaled<T> bell_curve(T x) {
  const T half = T(0.5) * x;
  const T square = half * x;
  const T lost = math::fma(half, x, -square);
  const exp_parts<T> p = split_exp(-square);
  const T value = math::fma(p.first, p.high + p.low, p.first);
  return {math::fma(-lost, value, value), p.second};
}

// Phi(-a) for a >= 0.
template <class T>
[[gnu::always_inline]] TALPA_HD inline T normal_tail(T a) {
  using F = format<T>;
  const T bounded = select(a > F::normal_range, F::normal_range, a);
  const scaled<T> e = bell_curve(bounded);
  const T w = bounded / (bounded + F::normal_centre);
  const T shape = math::fma(w, normal_tail_shape(math::fma(T(2), w, T(-1))), T(0.5));
  return mul(e.value * (shape / math::fma(T(1.25), bounded, T(1))), e.scale);
}

template <class T>
[[gnu::always_inline]] TALPA_HD inline T normal_cdf(T x) {
  const T tail = normal_tail(absolute(x));
  return select(x > T(0), T(1) - tail, tail);
}

inline constexpr double inverse_root_two_pi = 0.3989422804014327;

template <class T>
[[gnu::always_inline]] TALPA_HD inline T normal_density(T x) {
  using F = format<T>;
  const T a = absolute(x);
  const scaled<T> e = bell_curve(select(a > F::normal_range, F::normal_range, a));
  return mul(e.value * T(inverse_root_two_pi), e.scale);
}

template <class T>
[[gnu::always_inline]] TALPA_HD inline T softplus(T x) {
  return select(x > T(0), x, T(0)) + detail::log1p(detail::exp(-absolute(x)));
}

template <class T>
[[gnu::always_inline]] TALPA_HD inline T relu(T x) {
  return select(x < T(0), T(0), x);
}

template <class T>
[[gnu::always_inline]] TALPA_HD inline T relu_derivative(T x) {
  return select(x == x, select(x > T(0), T(1), T(0)), x);
}

}  // namespace detail

/// Computes the rounded product a * b in a form that no compiler contracts into a following
/// addition.
///
/// Use it where an inexact product becomes a term of a plain + or -, or is returned to callers who
/// may add to it; elsewhere a * b has the same bits. The zero that is added carries the sign of the
/// product, so signed zeros come out right too.
/// Cost: one fma and two integer operations.
[[gnu::always_inline]] TALPA_HD inline float mul(float a, float b) { return detail::mul(a, b); }
[[gnu::always_inline]] TALPA_HD inline double mul(double a, double b) { return detail::mul(a, b); }

/// Computes e^x.
///
/// exp(0) = 1, exp(-inf) = 0, exp(inf) = inf, exp(NaN) = NaN; inf above the logarithm of the
/// largest number; subnormal results are rounded as such, and below them there is zero.
/// Error: at most 1 ulp; seen 0.85.
/// Method: x = k ln 2 + r with ln 2 in two parts (Cody and Waite, Software Manual for the
/// Elementary Functions, 1980), e^r = 1 + (r + r^2 P(r)), and 2^k as a product of two powers of
/// two.
[[gnu::always_inline]] TALPA_HD inline float exp(float x) { return detail::exp(x); }
[[gnu::always_inline]] TALPA_HD inline double exp(double x) { return detail::exp(x); }

/// Computes e^x for x <= 0 in fewer instructions than exp, with the same bits.
///
/// 1 for +-0, 0 for -inf, NaN for NaN; nothing is said of x > 0.
[[gnu::always_inline]] TALPA_HD inline float exp_nonpositive(float x) {
  float y[1] = {x};
  detail::exp_nonpositive(y);
  return y[0];
}
[[gnu::always_inline]] TALPA_HD inline double exp_nonpositive(double x) {
  double y[1] = {x};
  detail::exp_nonpositive(y);
  return y[0];
}

/// Computes e^x for x in [-80, 0] in fewer instructions than exp_nonpositive, with the same bits;
/// nothing is said of other x.
[[gnu::always_inline]] TALPA_HD inline float exp_normal(float x) { return detail::exp_normal(x); }
[[gnu::always_inline]] TALPA_HD inline double exp_normal(double x) { return detail::exp_normal(x); }

/// Computes e^x - 1 without cancellation.
///
/// expm1(+-0) = +-0, expm1(-inf) = -1, expm1(inf) = inf, expm1(NaN) = NaN.
/// Error: at most 1.25 ulp; seen 1.07.
[[gnu::always_inline]] TALPA_HD inline float expm1(float x) { return detail::expm1(x); }
[[gnu::always_inline]] TALPA_HD inline double expm1(double x) { return detail::expm1(x); }

/// Computes e^x - 1 for x <= 0 in half the instructions of expm1.
///
/// 0 for +-0, -1 for -inf, NaN for NaN; nothing is said of x > 0.
/// Error: at most 1.25 ulp; seen 1.14.
[[gnu::always_inline]] TALPA_HD inline float expm1_nonpositive(float x) {
  float y[1] = {x};
  detail::expm1_nonpositive(y);
  return y[0];
}
[[gnu::always_inline]] TALPA_HD inline double expm1_nonpositive(double x) {
  double y[1] = {x};
  detail::expm1_nonpositive(y);
  return y[0];
}

/// Computes the natural logarithm, also of subnormal numbers.
///
/// log(1) = 0, log(+-0) = -inf, log(inf) = inf; NaN below zero and for NaN.
/// Error: at most 0.8 ulp; seen 0.74.
/// Method: x = 2^k m with sqrt(1/2) <= m < sqrt 2, and log m as a polynomial in the square of
/// f / (2 + f), f = m - 1, in the arrangement of fdlibm (Sun Microsystems, 1993) with coefficients
/// of our own; the leading terms are summed with their rounding error.
[[gnu::always_inline]] TALPA_HD inline float log(float x) { return detail::log(x); }
[[gnu::always_inline]] TALPA_HD inline double log(double x) { return detail::log(x); }

/// Computes log(1 + x) without cancellation.
///
/// log1p(+-0) = +-0, log1p(-1) = -inf, log1p(inf) = inf; NaN below -1 and for NaN.
/// Error: at most 0.8 ulp; seen 0.74.
[[gnu::always_inline]] TALPA_HD inline float log1p(float x) { return detail::log1p(x); }
[[gnu::always_inline]] TALPA_HD inline double log1p(double x) { return detail::log1p(x); }

/// Computes the hyperbolic tangent as -t / (2 + t) with t = expm1(-2 |x|) and the sign of x.
///
/// tanh(+-0) = +-0, tanh(+-inf) = +-1, tanh(NaN) = NaN.
/// Error: at most 3 ulp; seen 2.5.
[[gnu::always_inline]] TALPA_HD inline float tanh(float x) { return detail::tanh(x); }
[[gnu::always_inline]] TALPA_HD inline double tanh(double x) { return detail::tanh(x); }

/// Computes tanh'(x) = 1 - tanh(x)^2 = 4 e / (1 + e)^2 with e = e^(-2 |x|).
///
/// One at 0, zero at +-inf, NaN at NaN. Error: at most 4 ulp; seen 2.8.
[[gnu::always_inline]] TALPA_HD inline float tanh_derivative(float x) {
  return detail::tanh_derivative(x);
}
[[gnu::always_inline]] TALPA_HD inline double tanh_derivative(double x) {
  return detail::tanh_derivative(x);
}

/// Computes the logistic function 1 / (1 + e^-x); neither end overflows.
///
/// sigmoid(0) = 1/2, sigmoid(-inf) = 0, sigmoid(inf) = 1, sigmoid(NaN) = NaN.
/// Error: at most 3 ulp; seen 2.5.
[[gnu::always_inline]] TALPA_HD inline float sigmoid(float x) { return detail::sigmoid(x); }
[[gnu::always_inline]] TALPA_HD inline double sigmoid(double x) { return detail::sigmoid(x); }

/// Computes sigmoid'(x) = sigmoid(x) (1 - sigmoid(x)) = e / (1 + e)^2 with e = e^-|x|.
///
/// 1/4 at 0, zero at +-inf, NaN at NaN. Error: at most 4 ulp; seen 2.5.
[[gnu::always_inline]] TALPA_HD inline float sigmoid_derivative(float x) {
  return detail::sigmoid_derivative(x);
}
[[gnu::always_inline]] TALPA_HD inline double sigmoid_derivative(double x) {
  return detail::sigmoid_derivative(x);
}

/// Computes silu(x) = x sigmoid(x), also known as swish.
///
/// silu(+-0) = +-0, silu(-inf) = -0, silu(inf) = inf, silu(NaN) = NaN.
/// Error: at most 4 ulp; seen 3.4.
[[gnu::always_inline]] TALPA_HD inline float silu(float x) { return detail::silu(x); }
[[gnu::always_inline]] TALPA_HD inline double silu(double x) { return detail::silu(x); }

/// Computes silu'(x) = sigmoid(x) + x sigmoid'(x), which lies between -0.1 and 1.1.
///
/// 1/2 at 0, zero at -inf, one at inf, NaN at NaN.
/// Absolute error: at most 2.5 eps; seen 1.4 eps. (Near its zero at -1.278 no relative bound
/// holds.)
[[gnu::always_inline]] TALPA_HD inline float silu_derivative(float x) {
  return detail::silu_derivative(x);
}
[[gnu::always_inline]] TALPA_HD inline double silu_derivative(double x) {
  return detail::silu_derivative(x);
}

/// Computes gelu in its form with a hyperbolic tangent,
/// x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2 = x sigmoid(u),
/// u = 2 sqrt(2 / pi) (x + 0.044715 x^3).
///
/// gelu_tanh(+-0) = +-0, gelu_tanh(-inf) = -0, gelu_tanh(inf) = inf, gelu_tanh(NaN) = NaN.
/// Error: at most 4 ulp for x >= 0; seen 2. For x < 0, where e^u magnifies the rounding of u, at
/// most (5 + 4 |u|) ulp, of which 0.64 was seen, and at most eps; seen 0.5 eps.
/// Source: Hendrycks and Gimpel, Gaussian Error Linear Units, 2016, section 2. The exact form, with
/// the error function, differs by up to 5e-4.
[[gnu::always_inline]] TALPA_HD inline float gelu_tanh(float x) { return detail::gelu_tanh(x); }
[[gnu::always_inline]] TALPA_HD inline double gelu_tanh(double x) { return detail::gelu_tanh(x); }

/// Computes gelu_tanh'(x) = sigmoid(u) + x sigmoid'(u) u', with u as in gelu_tanh and
/// u' = 2 sqrt(2 / pi) (1 + 3 * 0.044715 x^2).
///
/// 1/2 at 0, zero at -inf, one at inf, NaN at NaN.
/// Absolute error: at most 4 eps; seen 1.6 eps.
[[gnu::always_inline]] TALPA_HD inline float gelu_tanh_derivative(float x) {
  return detail::gelu_tanh_derivative(x);
}
[[gnu::always_inline]] TALPA_HD inline double gelu_tanh_derivative(double x) {
  return detail::gelu_tanh_derivative(x);
}

/// Computes softplus(x) = log(1 + e^x) as max(x, 0) + log1p(e^-|x|).
///
/// Zero at -inf, inf at inf, NaN at NaN. The logarithm of sigmoid(x) is -softplus(-x).
/// Error: at most 2.5 ulp; seen 1.6.
[[gnu::always_inline]] TALPA_HD inline float softplus(float x) { return detail::softplus(x); }
[[gnu::always_inline]] TALPA_HD inline double softplus(double x) { return detail::softplus(x); }

/// Computes softplus'(x) = sigmoid(x), with the bound given there.
[[gnu::always_inline]] TALPA_HD inline float softplus_derivative(float x) {
  return detail::sigmoid(x);
}
[[gnu::always_inline]] TALPA_HD inline double softplus_derivative(double x) {
  return detail::sigmoid(x);
}

/// Computes the distribution function of the standard normal distribution,
/// Phi(x) = integral of e^(-t^2 / 2) / sqrt(2 pi) from -inf to x; each tail is computed as such, so
/// small values are as exact as others.
///
/// normal_cdf(0) = 1/2, normal_cdf(-inf) = 0, normal_cdf(inf) = 1, normal_cdf(NaN) = NaN.
/// Error: at most 8 ulp below zero, at most 5 above; seen 4.7 and 2.2.
/// Method: Phi(-a) = e^(-a^2 / 2) r(a) / (1 + 5/4 a), where r is nearly constant: a polynomial in
/// a / (a + c), after Shepherd and Laframboise, Mathematics of Computation 36, 1981.
[[gnu::always_inline]] TALPA_HD inline float normal_cdf(float x) { return detail::normal_cdf(x); }
[[gnu::always_inline]] TALPA_HD inline double normal_cdf(double x) { return detail::normal_cdf(x); }

/// Computes normal_cdf'(x) = e^(-x^2 / 2) / sqrt(2 pi).
///
/// Zero at +-inf, NaN at NaN. Error: at most 5 ulp; seen 2.95.
[[gnu::always_inline]] TALPA_HD inline float normal_density(float x) {
  return detail::normal_density(x);
}
[[gnu::always_inline]] TALPA_HD inline double normal_density(double x) {
  return detail::normal_density(x);
}

/// Computes max(x, 0), exactly; NaN stays NaN, -0 stays -0.
[[gnu::always_inline]] TALPA_HD inline float relu(float x) { return detail::relu(x); }
[[gnu::always_inline]] TALPA_HD inline double relu(double x) { return detail::relu(x); }

/// Computes the derivative of relu: one above zero, zero at and below it, NaN for NaN.
[[gnu::always_inline]] TALPA_HD inline float relu_derivative(float x) {
  return detail::relu_derivative(x);
}
[[gnu::always_inline]] TALPA_HD inline double relu_derivative(double x) {
  return detail::relu_derivative(x);
}

/// Cosine and sine of one angle.
template <class T>
struct cosine_sine {
  T cosine;
  T sine;
};

namespace detail {

// u = (q + r) / 4 with an integer q and |r| <= 1/2: a quarter turn is exact, so is the reduction.
template <class T>
[[gnu::always_inline]] TALPA_HD inline cosine_sine<T> cos_sin_turns(T u) {
  using F = format<T>;
  using bits = typename F::bits;
  const T quarters = T(4) * u;
  const T shifted = quarters + F::shift;
  const T r = quarters - (shifted - F::shift);
  const bits q = to_bits(shifted);  // the low two bits of the pattern are those of q mod 4
  const T z = r * r;
  const T s = math::fma(r, F::half_pi_high, r * math::fma(z, sin_tail(z), F::half_pi_low));
  const T c = math::fma(z, cos_tail(z), T(1));
  const bool odd = (q & 1) != 0;
  const bits cosine_sign = ((q + 1) & 2) << F::two_to_sign;
  const bits sine_sign = (q & 2) << F::two_to_sign;
  return {from_bits(to_bits(select(odd, s, c)) ^ cosine_sign),
          from_bits(to_bits(select(odd, c, s)) ^ sine_sign)};
}

}  // namespace detail

/// Computes cos(2 pi u) and sin(2 pi u) of an angle in turns, 0 <= u < 1.
///
/// Exact at multiples of a quarter turn (a zero may be negative). |u| < 2^20 works as well; beyond,
/// the result is unspecified.
/// Error: at most 1.25 ulp each; seen 1.03.
[[gnu::always_inline]] TALPA_HD inline cosine_sine<float> cos_sin_turns(float u) {
  return detail::cos_sin_turns(u);
}
[[gnu::always_inline]] TALPA_HD inline cosine_sine<double> cos_sin_turns(double u) {
  return detail::cos_sin_turns(u);
}

}  // namespace talpa::math
