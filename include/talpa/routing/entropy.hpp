// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/check.hpp>
#include <talpa/core/lanes.hpp>

#include <cmath>

namespace talpa {

/// How unsure a router is about a token, from its probabilities p = softmax(logits): 0 where one
/// expert has everything, 1 where all E are alike.
///
/// Each kind is an aggregate with `validate(function)` and, over a lane group G and an array p of
/// the row's probabilities (g.elements<T>(), p_e = 0 for a masked expert; one that has `log(e)`
/// beside, as log_probabilities gives, saves the logarithms),
///   kind.template value<T>(g, p)      H, one number a row
///   kind.template slopes<T>(g, p, d)  fills the array d with dH / dp_e up to a constant, which the
///                                     softmax does not feel; 0 where p_e = 0
/// so that dH / du_e = p_e (d_e - sum_j p_j d_j).
///
/// NaN among the probabilities gives NaN.
///
/// epsilon = 0 is the exact value: continuous in the index, 0 ln 0 = 0, H = 0 for E = 1.
/// epsilon > 0 repeats the code of DynMoLE (arXiv 2504.00661), which adds it to every probability:
/// uniform rows read slightly below 1 and one-hot rows slightly below 0; Tsallis is off by about
/// -E epsilon / (q - 1) near q = 1; E = 1 divides by zero.
/// normalised = false leaves out the division by the greatest value: nats for Shannon and Renyi.
namespace entropy {

namespace detail {

/// ln p_e.
template <class P, class Element>
[[gnu::always_inline]] TALPA_HD inline auto log_of(const P& p, Element e) {
  if constexpr (requires { p.log(e); }) {
    return p.log(e);
  } else {
    return math::log(p[e]);
  }
}

/// f(ln p_e), 0 for p_e = 0, where it is multiplied by p_e.
template <class T, class G, class P, class Element, class F>
[[gnu::always_inline]] TALPA_HD inline auto of_log(const G& g, const P& p, Element e, F f) {
  const auto zero = g.uniform(T{0});
  const auto value = f(log_of(p, e));
  return talpa::select(p[e] == zero, zero, value);
}

/// p_e^(q - 1) - 1, ln p_e at q = 1. 0 for p_e = 0.
template <class T, class G, class P, class Element>
[[gnu::always_inline]] TALPA_HD inline auto power_less_one(const G& g, const P& p, Element e,
                                                           double q) {
  const T shift = static_cast<T>(q - 1.0);
  if (shift == T{0}) return of_log<T>(g, p, e, [](const auto& log_p) { return log_p; });
  const auto exponent = [&](const auto& log_p) { return math::mul(g.uniform(shift), log_p); };
  if (shift > T{0}) {
    return of_log<T>(g, p, e,
                     [&](const auto& log_p) { return math::expm1_nonpositive(exponent(log_p)); });
  }
  return of_log<T>(g, p, e, [&](const auto& log_p) { return math::expm1(exponent(log_p)); });
}

/// What power_less_one is divided by to be continuous in q, with ln p as its limit.
template <class T>
TALPA_HD T power_divisor(double q) {
  const T shift = static_cast<T>(q - 1.0);
  return shift == T{0} ? T{1} : shift;
}

/// (p_e^(q - 1) - 1) / (q - 1), ln p_e at q = 1: continuous in q. 0 for p_e = 0.
template <class T, class G, class P, class Element>
[[gnu::always_inline]] TALPA_HD inline auto deformed_log(const G& g, const P& p, Element e,
                                                         double q) {
  return power_less_one<T>(g, p, e, q) / g.uniform(power_divisor<T>(q));
}

/// sum_e p_e (p_e^(q - 1) - 1) / (q - 1), sum_e p_e ln p_e at q = 1.
template <class T, class G, class P>
TALPA_HD typename G::template value<T> mean_deformed_log(const G& g, const P& p, double q) {
  typename G::template value<T> sum;
  const T shift = static_cast<T>(q - 1.0);
  if (shift > T{0}) {
    // e^x - 1 is finite where p_e = 0, +0 for both zeros, and zeros of either sign may be added.
    const auto factor = g.uniform(shift), zero = g.uniform(T{0});
    sum = g.template sum_of<T>(
        talpa::detail::expm1_nonpositive_of{},
        [&](auto e) { return math::fma(factor, log_of(p, e), zero); },
        [&](auto e, const auto& power) { return math::fma(p[e], power, zero); });
  } else {
    sum = g.template sum<T>([&](auto e) { return math::mul(p[e], power_less_one<T>(g, p, e, q)); });
  }
  return sum / g.uniform(power_divisor<T>(q));
}

/// p^q for p > 0; 0 for p = 0.
template <class T, class G, class V>
[[gnu::always_inline]] TALPA_HD inline V power(const G& g, const V& p, double q) {
  const auto zero = g.uniform(T{0});
  const auto value = math::exp(math::mul(g.uniform(static_cast<T>(q)), math::log(p)));
  return talpa::select(p == zero, zero, value);
}

/// f(), a number that depends on E and q alone, from groups that keep it for the rows to come.
template <class T, class G, class F>
[[gnu::always_inline]] TALPA_HD inline T shared_number(const G& g, int kind, double q, F f) {
  if constexpr (requires { g.template shared<T>(kind, q, f); }) {
    return g.template shared<T>(kind, q, f);
  } else {
    return f();
  }
}

/// ln E.
template <class T, class G>
TALPA_HD T log_experts(const G& g) {
  return shared_number<T>(g, 0, 0.0, [&] { return math::log(static_cast<T>(g.experts())); });
}

/// Tsallis of E equal probabilities: (1 - E^(1 - q)) / (q - 1), ln E at q = 1.
template <class T, class G>
TALPA_HD T greatest_tsallis(const G& g, double q) {
  return shared_number<T>(g, 1, q, [&] {
    const T shift = static_cast<T>(q - 1.0);
    const T log_e = math::log(static_cast<T>(g.experts()));
    return shift == T{0} ? log_e : -math::expm1(math::mul(-shift, log_e)) / shift;
  });
}

/// value / greatest. With one expert greatest is 0, and so is the exact value.
template <class T, class G, class V>
TALPA_HD V part_of(const G& g, const V& value, T greatest, bool exact) {
  if (exact && g.experts() == 1) return value - value;  // 0; NaN for a row that is not valid
  return value / g.uniform(greatest);
}

inline void check_index(const char* function, double q) {
  check_value(q > 0.0 && std::isfinite(q), function, "entropy.q", q, "a finite number > 0");
}
inline void check_epsilon(const char* function, const char* argument, double epsilon) {
  check_value(epsilon >= 0.0 && std::isfinite(epsilon), function, argument, epsilon,
              "a finite number >= 0");
}

}  // namespace detail

/// H = -sum_e p_e ln p_e, divided by ln E.
struct shannon {
  double epsilon = 0.0;      ///< >= 0, see above
  double log_epsilon = 0.0;  ///< >= 0, added inside the logarithm alone, as GW-MoE's code does
  bool normalised = true;    ///< false: nats

  void validate(const char* function) const {
    detail::check_epsilon(function, "entropy.epsilon", epsilon);
    detail::check_epsilon(function, "entropy.log_epsilon", log_epsilon);
  }

  template <class T, class G, class P>
  TALPA_HD typename G::template value<T> value(const G& g, const P& p) const {
    const auto shift = g.uniform(static_cast<T>(epsilon));
    const auto inside = g.uniform(static_cast<T>(log_epsilon));
    const auto zero = g.uniform(T{0});
    const bool exact = epsilon == 0.0 && log_epsilon == 0.0;
    const auto sum = g.template sum<T>([&](auto e) {
      const auto shifted = p[e] + shift;
      const auto log_p = exact ? detail::log_of(p, e) : math::log(shifted + inside);
      return talpa::select(shifted == zero, zero, math::mul(shifted, log_p));
    });
    if (!normalised) return -sum;
    return detail::part_of<T>(g, -sum, detail::log_experts<T>(g), exact);
  }

  template <class T, class G, class P, class D>
  TALPA_HD void slopes(const G& g, const P& p, D& d) const {
    const auto shift = g.uniform(static_cast<T>(epsilon));
    const auto inside = g.uniform(static_cast<T>(log_epsilon));
    const auto zero = g.uniform(T{0});
    const auto scale = g.uniform(normalised ? detail::log_experts<T>(g) : T{1});
    const bool alone = g.experts() == 1 && epsilon == 0.0 && log_epsilon == 0.0;
    g.for_each([&](auto e) {
      const auto shifted = p[e] + shift;
      const auto slope = -(math::log(shifted + inside) + shifted / (shifted + inside));
      d[e] = alone ? zero : talpa::select(p[e] == zero, zero, slope / scale);
    });
  }
};

/// H = (1 - sum_e p_e^q) / (q - 1), divided by (1 - E^(1 - q)) / (q - 1); Shannon at q = 1.
struct tsallis {
  double q = 1.1;        ///< index, > 0
  double epsilon = 0.0;  ///< >= 0, see above
  bool normalised = true;

  void validate(const char* function) const {
    detail::check_index(function, q);
    detail::check_epsilon(function, "entropy.epsilon", epsilon);
  }

  template <class T, class G, class P>
  TALPA_HD typename G::template value<T> value(const G& g, const P& p) const {
    if (epsilon > 0.0 && q == 1.0) return like_shannon().template value<T>(g, p);
    typename G::template value<T> h;
    if (epsilon > 0.0) {
      const auto shift = g.uniform(static_cast<T>(epsilon));
      const auto sum =
          g.template sum<T>([&](auto e) { return detail::power<T>(g, p[e] + shift, q); });
      h = (g.uniform(T{1}) - sum) / g.uniform(static_cast<T>(q - 1.0));
    } else {
      h = -detail::mean_deformed_log<T>(g, p, q);
    }
    if (!normalised) return h;
    return detail::part_of<T>(g, h, detail::greatest_tsallis<T>(g, q), epsilon == 0.0);
  }

  template <class T, class G, class P, class D>
  TALPA_HD void slopes(const G& g, const P& p, D& d) const {
    if (epsilon > 0.0 && q == 1.0) {
      like_shannon().template slopes<T>(g, p, d);
      return;
    }
    const auto zero = g.uniform(T{0});
    const auto shift = g.uniform(static_cast<T>(epsilon));
    const auto scale = g.uniform(normalised ? detail::greatest_tsallis<T>(g, q) : T{1});
    const auto index_q = g.uniform(static_cast<T>(q));
    const auto less_one = g.uniform(static_cast<T>(q - 1.0));
    const bool alone = g.experts() == 1 && epsilon == 0.0;
    g.for_each([&](auto e) {
      // The constants -1 and -1 / (q - 1) are left out.
      const auto slope =
          epsilon > 0.0 ? -math::mul(index_q, detail::power<T>(g, p[e] + shift, q - 1.0)) / less_one
                        : -math::mul(index_q, detail::deformed_log<T>(g, p, e, q));
      d[e] = alone ? zero : talpa::select(p[e] == zero, zero, slope / scale);
    });
  }

 private:
  TALPA_HD shannon like_shannon() const { return {epsilon, 0.0, normalised}; }
};

/// H = ln(sum_e p_e^q) / (1 - q), divided by ln E; Shannon at q = 1. epsilon > 0 also adds 1e-10
/// inside the logarithm, as the code of DynMoLE.
struct renyi {
  double q = 2.0;        ///< order, > 0
  double epsilon = 0.0;  ///< >= 0, see above
  bool normalised = true;

  void validate(const char* function) const {
    detail::check_index(function, q);
    detail::check_epsilon(function, "entropy.epsilon", epsilon);
  }

  template <class T, class G, class P>
  TALPA_HD typename G::template value<T> value(const G& g, const P& p) const {
    if (epsilon > 0.0 && q == 1.0) return like_shannon().template value<T>(g, p);
    typename G::template value<T> h;
    if (epsilon > 0.0) {
      h = math::log(shifted_sum<T>(g, p)) / g.uniform(static_cast<T>(1.0 - q));
    } else {
      // sum_e p_e^q = 1 + (q - 1) mean.
      const auto mean = detail::mean_deformed_log<T>(g, p, q);
      const T less_one = static_cast<T>(q - 1.0);
      h = less_one == T{0}
              ? -mean
              : -(math::log1p(math::mul(g.uniform(less_one), mean)) / g.uniform(less_one));
    }
    if (!normalised) return h;
    return detail::part_of<T>(g, h, detail::log_experts<T>(g), epsilon == 0.0);
  }

  template <class T, class G, class P, class D>
  TALPA_HD void slopes(const G& g, const P& p, D& d) const {
    if (epsilon > 0.0 && q == 1.0) {
      like_shannon().template slopes<T>(g, p, d);
      return;
    }
    const auto zero = g.uniform(T{0});
    const auto index_q = g.uniform(static_cast<T>(q));
    const auto scale = g.uniform(normalised ? detail::log_experts<T>(g) : T{1});
    const auto less_one = g.uniform(static_cast<T>(q - 1.0));
    const auto shift = g.uniform(static_cast<T>(epsilon));
    const auto whole =
        epsilon > 0.0 ? shifted_sum<T>(g, p)
                      : math::fma(less_one, detail::mean_deformed_log<T>(g, p, q), g.uniform(T{1}));
    const bool alone = g.experts() == 1 && epsilon == 0.0;
    g.for_each([&](auto e) {
      // q p^(q - 1) / ((1 - q) whole); without the constant 1 / ((1 - q) whole) times q this is
      // -q deformed_log / whole.
      const auto slope =
          epsilon > 0.0
              ? -math::mul(index_q, detail::power<T>(g, p[e] + shift, q - 1.0)) / less_one / whole
              : -math::mul(index_q, detail::deformed_log<T>(g, p, e, q)) / whole;
      d[e] = alone ? zero : talpa::select(p[e] == zero, zero, slope / scale);
    });
  }

 private:
  TALPA_HD shannon like_shannon() const { return {epsilon, 0.0, normalised}; }
  template <class T, class G, class P>
  TALPA_HD typename G::template value<T> shifted_sum(const G& g, const P& p) const {
    const auto shift = g.uniform(static_cast<T>(epsilon));
    return g.template sum<T>([&](auto e) { return detail::power<T>(g, p[e] + shift, q); }) +
           g.uniform(static_cast<T>(1e-10));
  }
};

}  // namespace entropy

}  // namespace talpa
