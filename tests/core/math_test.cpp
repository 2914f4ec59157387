// SPDX-License-Identifier: Apache-2.0
#include "support/sanitized.hpp"
#include "support/scalars.hpp"
#include "support/tolerance.hpp"

#include <talpa/core/math.hpp>

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <limits>
#include <string>
#include <type_traits>
#include <vector>

namespace talpa::math_test {

namespace {

// The type of reference values: long double has 11 bits more than double where it is the format of
// x87; where it is double itself, reference_error grows by itself.
template <class T>
using wide = std::conditional_t<std::is_same_v<T, float>, double, long double>;

template <class T>
using bits_of = typename math::detail::format<T>::bits;

template <class T>
constexpr T infinity = std::numeric_limits<T>::infinity();
template <class T>
constexpr T nan_of = std::numeric_limits<T>::quiet_NaN();
template <class T>
constexpr T smallest = std::numeric_limits<T>::denorm_min();

template <class T>
bits_of<T> pattern(T x) {
  return math::detail::to_bits(x);
}

template <class T>
T number(bits_of<T> x) {
  return math::detail::from_bits(x);
}

// Distance from |y| to the next number of T above it, down to the subnormals.
template <class T>
wide<T> ulp(wide<T> y) {
  using limits = std::numeric_limits<T>;
  int exponent = y == 0 ? limits::min_exponent - 1 : std::ilogb(y);
  if (exponent < limits::min_exponent - 1) exponent = limits::min_exponent - 1;
  if (exponent > limits::max_exponent - 1) exponent = limits::max_exponent - 1;
  return std::ldexp(wide<T>(1), exponent - (limits::digits - 1));
}

// Every reference below is at most 8 operations of the C library and of wide<T>, each good to 2 ulp
// of wide<T>, without cancellation.
template <class T>
wide<T> reference_error(wide<T> y) {
  return 16 * std::numeric_limits<wide<T>>::epsilon() * std::abs(y);
}

// Allowed errors: c ulp of the exact value, or c epsilons of T.
template <class T>
wide<T> ulps(double c, wide<T> y) {
  return wide<T>(c) * ulp<T>(y) + reference_error<T>(y);
}
template <class T>
wide<T> epsilons(double c) {
  return wide<T>(c) * std::numeric_limits<T>::epsilon() + reference_error<T>(1);
}

template <class W>
W exact_sigmoid(W x) {
  return x < 0 ? std::exp(x) / (1 + std::exp(x)) : 1 / (1 + std::exp(-x));
}
template <class W>
W exact_bell(W x) {
  const W e = std::exp(-std::abs(x));
  return e / ((1 + e) * (1 + e));
}
template <class W>
W gelu_argument(W x) {
  return 2 * std::sqrt(2 / std::acos(W(-1))) * (x + W(0.044715L) * x * x * x);
}

// What rounding x / sqrt 2 or x^2 in W does to references with e^(-x^2 / 2): the relative error of
// the exponent, two roundings, times the exponent.
template <class W>
W scaled_argument(W x, W y) {
  const W square = std::min(x * x, W(1e4));
  return 2 * std::numeric_limits<W>::epsilon() * square * std::abs(y);
}

// A function under test, its exact value and the error its docstring allows at x, exact value y.
template <class T>
struct subject {
  const char* name;
  T (*computed)(T);
  wide<T> (*exact)(wide<T>);
  wide<T> (*allowed)(wide<T> x, wide<T> y);
};

template <class T>
std::vector<subject<T>> subjects() {
  using W = wide<T>;
  constexpr W far = 400;  // beyond, T has saturated and x * 0 would be NaN
  return {
      {"exp", math::exp, [](W x) { return std::exp(x); }, [](W, W y) { return ulps<T>(1, y); }},
      {"expm1", math::expm1, [](W x) { return std::expm1(x); },
       [](W, W y) { return ulps<T>(1.25, y); }},
      {"expm1_nonpositive", [](T x) { return math::expm1_nonpositive(-std::abs(x)); },
       [](W x) { return std::expm1(-std::abs(x)); }, [](W, W y) { return ulps<T>(1.25, y); }},
      {"log", math::log, [](W x) { return std::log(x); }, [](W, W y) { return ulps<T>(0.8, y); }},
      {"log1p", math::log1p, [](W x) { return std::log1p(x); },
       [](W, W y) { return ulps<T>(0.8, y); }},
      {"tanh", math::tanh, [](W x) { return std::tanh(x); }, [](W, W y) { return ulps<T>(3, y); }},
      {"tanh_derivative", math::tanh_derivative, [](W x) { return 4 * exact_bell(2 * x); },
       [](W, W y) { return ulps<T>(4, y); }},
      {"sigmoid", math::sigmoid, [](W x) { return exact_sigmoid(x); },
       [](W, W y) { return ulps<T>(3, y); }},
      {"sigmoid_derivative", math::sigmoid_derivative, [](W x) { return exact_bell(x); },
       [](W, W y) { return ulps<T>(4, y); }},
      {"silu", math::silu, [](W x) { return x == -infinity<W> ? W(-0.0) : x * exact_sigmoid(x); },
       [](W, W y) { return ulps<T>(4, y); }},
      {"silu_derivative", math::silu_derivative,
       [](W x) { return std::abs(x) > 2 * far ? W(x > 0) : exact_sigmoid(x) + x * exact_bell(x); },
       [](W, W) { return epsilons<T>(2.5); }},
      {"gelu_tanh", math::gelu_tanh,
       [](W x) {
         if (std::abs(x) > far) return x > 0 ? x : W(-0.0);
         return x * exact_sigmoid(gelu_argument(x));
       },
       [](W x, W y) {
         if (!(x < 0)) return ulps<T>(4, y);
         const W relative = std::abs(x) > far ? W(0) : 4 * std::abs(gelu_argument(x));
         return std::min(ulps<T>(5 + double(relative), y), epsilons<T>(1));
       }},
      {"gelu_tanh_derivative", math::gelu_tanh_derivative,
       [](W x) {
         if (std::abs(x) > far) return W(x > 0);
         const W u = gelu_argument(x);
         const W du = 2 * std::sqrt(2 / std::acos(W(-1))) * (1 + 3 * W(0.044715L) * x * x);
         return exact_sigmoid(u) + x * exact_bell(u) * du;
       },
       [](W, W) { return epsilons<T>(4); }},
      {"softplus", math::softplus,
       [](W x) { return (x > 0 ? x : W(0)) + std::log1p(std::exp(-std::abs(x))); },
       [](W, W y) { return ulps<T>(2.5, y); }},
      {"normal_cdf", math::normal_cdf, [](W x) { return std::erfc(-x / std::sqrt(W(2))) / 2; },
       [](W x, W y) { return ulps<T>(x < 0 ? 8 : 5, y) + scaled_argument(x, y); }},
      {"normal_density", math::normal_density,
       [](W x) { return std::exp(-x * x / 2) / std::sqrt(2 * std::acos(W(-1))); },
       [](W x, W y) { return ulps<T>(5, y) + scaled_argument(x, y); }},
  };
}

// Largest error over the arguments tried, in units of what is allowed; infinite where one of the
// two values is NaN and the other is not, or an infinity is missing or unjustified.
template <class T>
struct survey {
  explicit survey(const subject<T>& s) : tested(s) {}

  void operator()(T x) {
    using W = wide<T>;
    const T y = tested.computed(x);
    const W exact = tested.exact(W(x));
    double ratio = 0;
    if (std::isnan(y) || std::isnan(exact)) {
      ratio = std::isnan(y) && std::isnan(exact) ? 0 : infinity<double>;
    } else if (std::abs(exact) > W(std::numeric_limits<T>::max()) || std::isinf(y)) {
      // An infinity stands for the number that would come after the largest one.
      const W next = std::ldexp(W(1), std::numeric_limits<T>::max_exponent - 1) * 2;
      const W found = std::isinf(y) ? std::copysign(next, W(y)) : W(y);
      const W target = std::abs(exact) > next ? std::copysign(next, exact) : exact;
      ratio = double(std::abs(found - target) / tested.allowed(W(x), target));
    } else if (W(y) != exact) {
      ratio = double(std::abs(W(y) - exact) / tested.allowed(W(x), exact));
    }
    if (!(ratio <= worst)) {
      worst = ratio;
      where = x;
    }
  }

  subject<T> tested;
  double worst = 0;
  T where = 0;
};

// Where formulas, binades or rounding change: both signs of each, and 500 patterns on either side.
const double landmarks[] = {0.0,
                            1e-300,
                            1.1754943508222875e-38,
                            2.2250738585072014e-308,
                            1e-45,
                            5.9e-8,
                            1.2e-7,
                            1.1e-16,
                            2.2e-16,
                            0.2,
                            0.34657359027997264,
                            0.41421356237309503,
                            0.5,
                            0.6931,
                            0.70710678118654746,
                            0.75246,
                            1.0,
                            1.0397,
                            1.27846,
                            1.4142135623730951,
                            2.0,
                            5.0,
                            8.664,
                            12.0,
                            13.0,
                            14.17,
                            15.25,
                            16.635,
                            17.329,
                            17.4,
                            20.0,
                            24.0,
                            37.429,
                            37.45,
                            38.46,
                            38.875,
                            40.0,
                            44.0,
                            51.98,
                            87.336544,
                            88.722839,
                            89.0,
                            103.972,
                            104.0,
                            120.0,
                            354.0,
                            372.5,
                            708.3964185322641,
                            709.78271289338397,
                            710.0,
                            745.133,
                            746.0,
                            760.0,
                            16777216.0,
                            1e30,
                            3.4028234663852886e38,
                            1.7976931348623157e308};

template <class T>
void visit_landmarks(survey<T>& s) {
  for (const double mark : landmarks) {
    const double representable = std::min(mark, double(std::numeric_limits<T>::max()));
    const bits_of<T> centre = pattern(static_cast<T>(representable));
    const bits_of<T> first = centre < 500 ? 0 : centre - 500;
    for (bits_of<T> p = first; p <= centre + 500; ++p) {
      s(number<T>(p));
      s(-number<T>(p));
    }
  }
}

// Multiplying by an odd constant permutes the 64-bit integers.
std::uint64_t scatter(std::uint64_t i) {
  std::uint64_t z = i * 0x9E3779B97F4A7C15u;
  z ^= z >> 29;
  return z * 0xBF58476D1CE4E5B9u;
}

void check(const survey<float>& s) {
  INFO("float ", std::string(s.tested.name), " at ", s.where);
  CHECK(s.worst <= 1.0);
}
void check(const survey<double>& s) {
  INFO("double ", std::string(s.tested.name), " at ", s.where);
  CHECK(s.worst <= 1.0);
}

// FNV-1a of the patterns of results, all NaN counted as one.
class digest {
 public:
  template <class T>
  void add(T y) {
    std::uint64_t p = std::isnan(y) ? 0x7ff8000000000000u : std::uint64_t(pattern(y));
    for (int byte = 0; byte < 8; ++byte) {
      value_ = (value_ ^ (p & 0xff)) * 0x100000001b3u;
      p >>= 8;
    }
  }
  std::uint64_t value() const { return value_; }

 private:
  std::uint64_t value_ = 0xcbf29ce484222325u;
};

// Fixed arguments: patterns from the whole range of T, and equidistant numbers in [-2, 2),
// [-128, 128) and [-1024, 1024).
template <class T>
std::vector<T> fixed_arguments() {
  std::vector<T> x;
  for (std::uint64_t i = 0; i < 16384; ++i) {
    x.push_back(number<T>(bits_of<T>(scatter(i) >> (64 - 8 * sizeof(T)))));
  }
  for (int i = -8192; i < 8192; ++i) {
    x.push_back(static_cast<T>(std::ldexp(i, -12)));
    x.push_back(static_cast<T>(std::ldexp(i, -6)));
    x.push_back(static_cast<T>(std::ldexp(i, -3)));
  }
  return x;
}

// Digests of the results at fixed_arguments, in the order of subjects. Any compiler, level of
// optimisation, instruction set and contraction mode has to reproduce them.
struct digest_pair {
  std::uint64_t of_float;
  std::uint64_t of_double;
};
constexpr digest_pair known_digests[] = {
    {0xe26c6bcbf34d2978u, 0x16d244cfb1954b9du},  // exp
    {0x2cdbe570173f97c1u, 0xd632e199de6f77d7u},  // expm1
    {0xd023fb2a0e623045u, 0xf98785188dc01815u},  // expm1_nonpositive
    {0x4fbfd6d7d149121fu, 0x4df17988b3e03aadu},  // log
    {0x167026067894005au, 0x308e6381527b7bfdu},  // log1p
    {0xe37e53dd2e15f820u, 0x3cd7001854d93eabu},  // tanh
    {0x310dfe97abcb080du, 0x0a5e0c1469a6f16au},  // tanh_derivative
    {0x981489f3b1026d4eu, 0x24f1b97d2201bb56u},  // sigmoid
    {0x95c92e2098e60f18u, 0x5ee098d32c9d0b2cu},  // sigmoid_derivative
    {0x53a701e74c69dcd7u, 0x161c2f3f97161f72u},  // silu
    {0x8ac718c17b064291u, 0x33cd4b997133dedfu},  // silu_derivative
    {0xf0287120f2d667b1u, 0xb2939f0ca0c1ecf6u},  // gelu_tanh
    {0xc1edd0e0bffd16d0u, 0x4c0ffe1c07e076fcu},  // gelu_tanh_derivative
    {0x074f0f01e56ccbbdu, 0x5703444fa147396au},  // softplus
    {0xf4f677d33fb59511u, 0xf52fae58272d85f0u},  // normal_cdf
    {0xc0a0f65b0b3c8f9eu, 0x10f281a86ab15c4au},  // normal_density
};

// Hides a value from the optimiser, so that arithmetic happens at run time.
template <class T>
T opaque(T x) {
  volatile T hidden = x;
  return hidden;
}

}  // namespace

TEST_SUITE("core/math") {
  TEST_CASE("float functions stay within their bounds over every 4093rd pattern") {
    const std::uint64_t step = support::sanitized ? 65521 : 4093;
    for (const subject<float>& f : subjects<float>()) {
      survey<float> s(f);
      for (std::uint64_t p = 0; p <= 0xffffffffu; p += step) s(number<float>(std::uint32_t(p)));
      visit_landmarks(s);
      check(s);
    }
  }

  TEST_CASE("double functions stay within their bounds over scattered patterns") {
    for (const subject<double>& f : subjects<double>()) {
      survey<double> s(f);
      for (std::uint64_t i = 0; i < (support::sanitized ? 6000u : 100000u); ++i) {
        const std::uint64_t p = scatter(i);
        const double unit = std::ldexp(double(p >> 11), -53);
        s(number<double>(p));
        s(4 * unit - 2);
        s(40 * unit - 20);
        s(1520 * unit - 760);
      }
      visit_landmarks(s);
      check(s);
    }
  }

  TEST_CASE_TEMPLATE("exp and expm1 treat special values as documented", T, TALPA_SCALARS) {
    CHECK(pattern(math::exp(T(0))) == pattern(T(1)));
    CHECK(pattern(math::exp(T(-0.0))) == pattern(T(1)));
    CHECK(pattern(math::exp(-infinity<T>)) == pattern(T(0)));
    CHECK(math::exp(infinity<T>) == infinity<T>);
    CHECK(math::exp(std::numeric_limits<T>::max()) == infinity<T>);
    CHECK(pattern(math::exp(std::numeric_limits<T>::lowest())) == pattern(T(0)));
    CHECK(std::isnan(math::exp(nan_of<T>)));

    // The smallest argument whose result does not round to zero is log(smallest / 2).
    const T edge = std::log(smallest<T>) - std::log(T(2));  // good to an ulp
    const T step = T(ulp<T>(edge));
    CHECK(math::exp(edge + 2 * step) == smallest<T>);
    CHECK(math::exp(edge - 2 * step) == T(0));
    const T top = std::log(std::numeric_limits<T>::max());
    CHECK(math::exp(top - T(ulp<T>(top))) < infinity<T>);
    CHECK(math::exp(top + T(ulp<T>(top))) == infinity<T>);

    CHECK(pattern(math::expm1(T(0))) == pattern(T(0)));
    CHECK(pattern(math::expm1(T(-0.0))) == pattern(T(-0.0)));
    CHECK(math::expm1(smallest<T>) == smallest<T>);
    CHECK(math::expm1(-infinity<T>) == T(-1));
    CHECK(math::expm1(infinity<T>) == infinity<T>);
    CHECK(std::isnan(math::expm1(nan_of<T>)));
    CHECK(math::expm1_nonpositive(T(0)) == T(0));
    CHECK(math::expm1_nonpositive(T(-0.0)) == T(0));
    CHECK(math::expm1_nonpositive(-smallest<T>) == -smallest<T>);
    CHECK(math::expm1_nonpositive(-infinity<T>) == T(-1));
    CHECK(std::isnan(math::expm1_nonpositive(nan_of<T>)));
  }

  TEST_CASE_TEMPLATE("log and log1p treat special values as documented", T, TALPA_SCALARS) {
    CHECK(pattern(math::log(T(1))) == pattern(T(0)));
    CHECK(math::log(T(0)) == -infinity<T>);
    CHECK(math::log(T(-0.0)) == -infinity<T>);
    CHECK(math::log(infinity<T>) == infinity<T>);
    CHECK(std::isnan(math::log(-smallest<T>)));
    CHECK(std::isnan(math::log(T(-1))));
    CHECK(std::isnan(math::log(-infinity<T>)));
    CHECK(std::isnan(math::log(nan_of<T>)));

    CHECK(pattern(math::log1p(T(0))) == pattern(T(0)));
    CHECK(pattern(math::log1p(T(-0.0))) == pattern(T(-0.0)));
    CHECK(math::log1p(smallest<T>) == smallest<T>);
    CHECK(math::log1p(-smallest<T>) == -smallest<T>);
    CHECK(math::log1p(T(-1)) == -infinity<T>);
    CHECK(math::log1p(infinity<T>) == infinity<T>);
    CHECK(math::log1p(std::numeric_limits<T>::max()) == math::log(std::numeric_limits<T>::max()));
    CHECK(std::isnan(math::log1p(std::nextafter(T(-1), T(-2)))));
    CHECK(std::isnan(math::log1p(-infinity<T>)));
    CHECK(std::isnan(math::log1p(nan_of<T>)));
  }

  TEST_CASE_TEMPLATE("activations treat zeros, infinities and NaN as documented", T,
                     TALPA_SCALARS) {
    struct row {
      T (*f)(T);
      T at_minus_infinity;
      T at_zero;
      T at_infinity;
    };
    const row table[] = {{math::tanh, T(-1), T(0), T(1)},
                         {math::tanh_derivative, T(0), T(1), T(0)},
                         {math::sigmoid, T(0), T(0.5), T(1)},
                         {math::sigmoid_derivative, T(0), T(0.25), T(0)},
                         {math::silu, T(-0.0), T(0), infinity<T>},
                         {math::silu_derivative, T(0), T(0.5), T(1)},
                         {math::gelu_tanh, T(-0.0), T(0), infinity<T>},
                         {math::normal_cdf, T(0), T(0.5), T(1)},
                         {math::normal_density, T(0), T(0.3989422804014327), T(0)},
                         {math::gelu_tanh_derivative, T(0), T(0.5), T(1)},
                         {math::softplus_derivative, T(0), T(0.5), T(1)},
                         {math::relu, T(0), T(0), infinity<T>},
                         {math::relu_derivative, T(0), T(0), T(1)}};
    for (const row& r : table) {
      CAPTURE(&r - table);
      const T largest = std::numeric_limits<T>::max();
      CHECK(r.f(-infinity<T>) == r.at_minus_infinity);
      CHECK(r.f(-largest) == r.at_minus_infinity);
      CHECK(pattern(r.f(T(0))) == pattern(r.at_zero));
      CHECK(r.f(infinity<T>) == r.at_infinity);
      CHECK(r.f(largest) == (std::isinf(r.at_infinity) ? largest : r.at_infinity));
      CHECK(std::isnan(r.f(nan_of<T>)));
    }
    CHECK(pattern(math::tanh(T(-0.0))) == pattern(T(-0.0)));
    CHECK(pattern(math::silu(T(-0.0))) == pattern(T(-0.0)));
    CHECK(pattern(math::silu(-infinity<T>)) == pattern(T(-0.0)));
    CHECK(pattern(math::gelu_tanh(T(-0.0))) == pattern(T(-0.0)));
    CHECK(pattern(math::gelu_tanh(-infinity<T>)) == pattern(T(-0.0)));

    CHECK(math::softplus(-infinity<T>) == T(0));
    CHECK(math::softplus(infinity<T>) == infinity<T>);
    CHECK(math::softplus(std::numeric_limits<T>::max()) == std::numeric_limits<T>::max());
    CHECK(std::isnan(math::softplus(nan_of<T>)));

    CHECK(math::relu(T(2.5)) == T(2.5));
    CHECK(math::relu(T(-2.5)) == T(0));
    CHECK(math::relu_derivative(smallest<T>) == T(1));
    CHECK(math::relu_derivative(-smallest<T>) == T(0));
  }

  TEST_CASE("each derivative agrees with central differences of its function") {
    struct pair {
      double (*f)(double);
      double (*derivative)(double);
      double third;      // bound on |f'''|
      double roundings;  // error of f in units of the roundoff of max(1, |x|), see its docstring
    };
    const pair table[] = {{math::tanh, math::tanh_derivative, 2.0, 6.0},
                          {math::sigmoid, math::sigmoid_derivative, 0.125, 6.0},
                          {math::silu, math::silu_derivative, 1.0, 8.0},
                          {math::gelu_tanh, math::gelu_tanh_derivative, 3.0, 8.0},
                          {math::softplus, math::softplus_derivative, 0.1, 5.0},
                          {math::normal_cdf, math::normal_density, 0.4, 10.0}};
    for (const pair& p : table) {
      CAPTURE(&p - table);
      for (double x = -9.0; x <= 9.0; x += 0.171) {
        CAPTURE(x);
        const double size = std::max(1.0, std::abs(x));
        const double h = talpa::support::central_difference_step(x);
        const double above = x + h;
        const double below = x - h;
        const double slope = (p.f(above) - p.f(below)) / (above - below);
        const double bound =
            talpa::support::central_difference_bound(h, p.third, p.roundings, 2.0 * size);
        CHECK(talpa::support::within(p.derivative(x), slope, bound));
      }
    }
  }

  TEST_CASE_TEMPLATE("mul rounds its product before a sum is taken", T, TALPA_SCALARS) {
    // (1 + d)^2 = 1 + 2 d + d^2 with d^2 at most half an ulp of one rounds to 1 + 2 d, by the rule
    // for ties if need be; a fused sum would keep d^2.
    const T d = std::ldexp(T(1), -(std::numeric_limits<T>::digits + 1) / 2);
    const T a = opaque(1 + d);
    const T rounded = opaque(1 + 2 * d);
    REQUIRE(math::fma(a, a, -rounded) == d * d);
    CHECK(math::mul(a, a) - rounded == T(0));
    CHECK(rounded - math::mul(a, a) == T(0));

    const T values[] = {T(0),
                        T(-0.0),
                        T(1.1),
                        T(-0.3),
                        infinity<T>,
                        -infinity<T>,
                        smallest<T>,
                        -smallest<T>,
                        T(3),
                        nan_of<T>,
                        T(1e-30) * T(1e-8),
                        std::numeric_limits<T>::max()};
    for (const T x : values) {
      for (const T y : values) {
        CAPTURE(x);
        CAPTURE(y);
        const T product = opaque(opaque(x) * opaque(y));
        const T found = math::mul(opaque(x), opaque(y));
        CHECK(std::isnan(found) == std::isnan(product));
        if (!std::isnan(product)) CHECK(pattern(found) == pattern(product));
      }
    }
  }

  TEST_CASE_TEMPLATE("exp_nonpositive has the bits of exp", T, TALPA_SCALARS) {
    std::vector<T> x = fixed_arguments<T>();
    x.insert(x.end(), {T(0), infinity<T>, smallest<T>, std::numeric_limits<T>::max()});
    // Results that are subnormal, and the last before zero.
    const T edge = std::log(smallest<T>) - std::log(T(2));
    for (T y = std::log(std::numeric_limits<T>::min()) + T(1); y > edge - T(1); y -= T(0.01)) {
      x.push_back(y);
    }
    std::size_t different = 0;
    for (const T y : x) {
      if (std::isnan(y)) continue;
      const T argument = opaque(-std::abs(y));
      different += pattern(math::exp_nonpositive(argument)) != pattern(math::exp(argument)) ? 1 : 0;
    }
    CHECK(different == 0);
    CHECK(std::isnan(math::exp_nonpositive(nan_of<T>)));
  }

  TEST_CASE_TEMPLATE("exp_normal has the bits of exp from -80 to 0", T, TALPA_SCALARS) {
    std::size_t different = 0;
    const auto compare = [&](T x) {
      const T argument = opaque(x);
      different += pattern(math::exp_normal(argument)) != pattern(math::exp(argument)) ? 1 : 0;
    };
    for (const T x : {T(0), -T(0), T(-80), -smallest<T>}) compare(x);
    for (T x = T(-80); x < T(0); x += T(0.0013)) compare(x);
    for (const T x : fixed_arguments<T>()) {
      if (std::abs(x) <= T(80)) compare(-std::abs(x));
    }
    CHECK(different == 0);
  }

  TEST_CASE_TEMPLATE("a sum with a result of exp takes the rounded result", T, TALPA_SCALARS) {
    // Subnormal results are inexact products; a contraction would add the unrounded product. An ulp
    // of the offset is two of theirs, so every other result is a tie that the lost part decides.
    const T offset = opaque(2 * std::numeric_limits<T>::min());
    for (T x = std::log(std::numeric_limits<T>::min()); x > std::log(smallest<T>); x -= T(0.01)) {
      const T e = opaque(math::exp(opaque(x)));
      CHECK(pattern(T(math::exp(opaque(x)) + offset)) == pattern(T(e + offset)));
      CHECK(pattern(T(math::exp_nonpositive(opaque(x)) + offset)) == pattern(T(e + offset)));
    }
  }

  TEST_CASE_TEMPLATE("a loop over an array gives the bits of single calls", T, TALPA_SCALARS) {
    const std::vector<T> x = fixed_arguments<T>();
    std::vector<T> y(x.size());
    const auto compare = [&](auto in_loop, T (*single)(T)) {
      for (std::size_t i = 0; i < x.size(); ++i) y[i] = in_loop(x[i]);
      std::size_t different = 0;
      for (std::size_t i = 0; i < x.size(); ++i) {
        const T expected = opaque(single)(opaque(x[i]));
        const bool same =
            std::isnan(expected) ? std::isnan(y[i]) : pattern(expected) == pattern(y[i]);
        different += same ? 0 : 1;
      }
      CHECK(different == 0);
    };
    compare([](T a) { return math::exp(a); }, math::exp);
    compare([](T a) { return math::exp_nonpositive(-std::abs(a)); },
            [](T a) { return math::exp_nonpositive(-std::abs(a)); });
    compare([](T a) { return math::exp_normal(std::max(-std::abs(a), T(-80))); },
            [](T a) { return math::exp_normal(std::max(-std::abs(a), T(-80))); });
    compare([](T a) { return math::expm1(a); }, math::expm1);
    compare([](T a) { return math::expm1_nonpositive(-std::abs(a)); },
            [](T a) { return math::expm1_nonpositive(-std::abs(a)); });
    compare([](T a) { return math::log(a); }, math::log);
    compare([](T a) { return math::log1p(a); }, math::log1p);
    compare([](T a) { return math::tanh(a); }, math::tanh);
    compare([](T a) { return math::sigmoid(a); }, math::sigmoid);
    compare([](T a) { return math::silu(a); }, math::silu);
    compare([](T a) { return math::silu_derivative(a); }, math::silu_derivative);
    compare([](T a) { return math::gelu_tanh(a); }, math::gelu_tanh);
    compare([](T a) { return math::gelu_tanh_derivative(a); }, math::gelu_tanh_derivative);
    compare([](T a) { return math::softplus(a); }, math::softplus);
    compare([](T a) { return math::normal_cdf(a); }, math::normal_cdf);
    compare([](T a) { return math::normal_density(a); }, math::normal_density);
  }

  TEST_CASE_TEMPLATE("results have the same bits everywhere", T, TALPA_SCALARS) {
    const std::vector<T> x = fixed_arguments<T>();
    const std::vector<subject<T>> all = subjects<T>();
    REQUIRE(all.size() == std::size(known_digests));
    for (std::size_t i = 0; i < all.size(); ++i) {
      digest d;
      for (const T a : x) d.add(all[i].computed(a));
      INFO(std::string(all[i].name));
      CHECK(d.value() == (sizeof(T) == 4 ? known_digests[i].of_float : known_digests[i].of_double));
    }
  }

  TEST_CASE_TEMPLATE("cos_sin_turns stays within its bound and is exact at quarter turns", T,
                     TALPA_SCALARS) {
    using W = wide<T>;
    const W half_pi = std::acos(W(-1)) / 2;
    double worst = 0;
    for (std::uint64_t i = 0; i < 300000; ++i) {
      constexpr int digits = std::numeric_limits<T>::digits;
      const T u = std::ldexp(T(scatter(i) >> (64 - digits)), -digits);
      // Reduced to |r| <= 1/2 quarter turns, exactly.
      const W quarter = std::nearbyint(4 * W(u));
      const W r = 4 * W(u) - quarter;
      const W s = std::sin(half_pi * r);
      const W c = std::cos(half_pi * r);
      const W cosines[] = {c, -s, -c, s};
      const W sines[] = {s, c, -s, -c};
      const int q = static_cast<int>(quarter) % 4;
      const math::cosine_sine<T> found = math::cos_sin_turns(u);
      worst = std::max(worst,
                       double(std::abs(W(found.cosine) - cosines[q]) / ulps<T>(1.25, cosines[q])));
      worst = std::max(worst, double(std::abs(W(found.sine) - sines[q]) / ulps<T>(1.25, sines[q])));
    }
    CHECK(worst <= 1.0);

    const T cosines[] = {1, 0, -1, 0};
    const T sines[] = {0, 1, 0, -1};
    for (int q = 0; q < 4; ++q) {
      const math::cosine_sine<T> found = math::cos_sin_turns(T(q) / 4);
      CHECK(found.cosine == cosines[q]);
      CHECK(found.sine == sines[q]);
    }
  }
}

}  // namespace talpa::math_test
