// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/matrix.hpp>
#include <talpa/core/random.hpp>
#include <talpa/testing/bounds.hpp>
#include <talpa/testing/report.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <type_traits>
#include <vector>

namespace talpa::testing {

/// Upstream gradient of a gradient check: fixed pseudo-random numbers in +-[1/2, 1), so that no
/// element of the output is left out of the projection. [rows, cols]
inline matrix<double, cpu> cotangent(index rows, index cols, std::uint64_t seed) {
  const random_stream stream = generator(seed).next();
  matrix<double, cpu> c(rows, cols);
  for (index i = 0; i < c.size(); ++i) {
    const double v = uniform<double>(stream, static_cast<std::uint64_t>(i)) - 0.5;  // [-1/2, 1/2)
    c.data()[i] = v < 0.0 ? v - 0.5 : v + 0.5;
  }
  return c;
}

/// One input of a gradient check and the gradient that backward claims for it.
struct gradient_probe {
  std::string name;
  matrix_view<double, cpu> value;           // perturbed in place and restored
  matrix_view<const double, cpu> gradient;  // shape of value
};

/// Cap of `gradient_accuracy::elements` in this program, read by each check; >= 1. A program under
/// a sanitizer, where a comparison costs many times as much, lowers it before its first law.
inline index most_elements = std::numeric_limits<index>::max();

/// What the bound of a gradient check is made of. The projected output, sum of cotangent * output,
/// is known up to gamma(roundings) * magnitude.
struct gradient_accuracy {
  double roundings = 0.0;  ///< on the longest path from an input to an output
  double magnitude = 0.0;  ///< bound of the sum of absolute terms of the projected output
  /// Whether some gradient must stand out of the bound. False where it is zero by construction.
  bool expect_nonzero = true;
  /// A probe of more elements than this has so many of them compared one by one, and all of them
  /// together along one direction; >= 1
  index elements = 64;
};

/// Step of a central difference at x: cbrt(eps) max(1, |x|) balances truncation and rounding.
inline double difference_step(double x) {
  return std::cbrt(std::numeric_limits<double>::epsilon()) * std::max(1.0, std::abs(x));
}

namespace detail {

/// sum_i a_i b_i with the rounding errors of products and additions carried along (Ogita, Rump and
/// Oishi, Accurate sum and dot product, 2005): as if summed in twice the precision.
inline double exact_dot(const matrix_view<const double, cpu>& a,
                        const matrix_view<const double, cpu>& b) {
  double sum = 0.0, lost = 0.0;
  for (index r = 0; r < a.rows; ++r) {
    for (index c = 0; c < a.cols; ++c) {
      const double product = a(r, c) * b(r, c);
      const double next = sum + product, back = next - sum;
      lost += (sum - (next - back)) + (product - back) + std::fma(a(r, c), b(r, c), -product);
      sum = next;
    }
  }
  return sum + lost;
}

}  // namespace detail

/// Compares gradients with central differences of the projected output in double.
///
/// For an element x of a probe, d = (f(x + h) - f(x - h)) / 2h with h = difference_step(x) and
/// f = sum of `upstream` * output. The claim must be within
///   |d(2h) - d(h)| + gamma(roundings) magnitude (2 / h + 1)
/// of d: the truncation error of d is h^2 f''' / 6 + O(h^4), a third of |d(2h) - d(h)| to leading
/// order, which leaves room for the next; and each of the four values of f is off by at most
/// gamma(roundings) magnitude. A probe of at most `accuracy.elements` and `most_elements` has each
/// element compared. Of a larger one so many at equal distances are, and then all move at once:
/// element i by h_i c_i with c = cotangent, and sum_i claim_i h_i c_i is compared with the
/// difference of f in the same way. Cost: four runs of the function for a comparison.
///
/// `output()` runs the function on what the probes show now and returns a view [rows, cols] of the
/// shape of `upstream`; gradients must have been computed with that upstream. `signature()` returns
/// what must not change while probing, such as the selection: where it does, the function has a
/// kink and the difference means nothing, which is a failure of the inputs. Return 0 if there is
/// nothing of the kind.
/// The report holds the worst comparison of each probe that fails.
template <class Output, class Signature>
report gradient_check(const std::string& what, const std::vector<gradient_probe>& probes,
                      const matrix<double, cpu>& upstream, const gradient_accuracy& accuracy,
                      Output output, Signature signature) {
  using talpa::detail::concat, talpa::detail::shape_text;
  report out;
  const double value_error = gamma<double>(accuracy.roundings) * accuracy.magnitude;
  const auto value = [&] {
    const matrix_view<const double, cpu> y = output();
    return y.rows == upstream.rows() && y.cols == upstream.cols()
               ? detail::exact_dot(upstream.view(), y)
               : std::numeric_limits<double>::quiet_NaN();
  };
  value();
  const std::decay_t<decltype(signature())> before = signature();
  bool stands_out = false;
  for (const gradient_probe& probe : probes) {
    const matrix_view<double, cpu> x = probe.value;
    law same(out, concat(what, ": the selection stays while '", probe.name, "' is probed"));
    law close(out, concat(what, ": the gradient of '", probe.name, "' equals differences"));
    close.expect(probe.gradient.rows == x.rows && probe.gradient.cols == x.cols, [&] {
      return concat("shape ", shape_text(probe.gradient.rows, probe.gradient.cols), " instead of ",
                    shape_text(x.rows, x.cols));
    });
    if (close.broken()) continue;
    // Worst comparison so far: the largest error in units of its bound.
    double worst = 0.0;
    std::string worst_text;
    // f(t) - f(-t), where move(t) puts the probe at t.
    const auto difference = [&](const auto& move, double t, const auto& where) {
      move(t);
      const double high = value();
      const bool same_above = signature() == before;
      move(-t);
      const double low = value();
      same.expect(same_above && signature() == before, [&] { return concat("not at ", where()); });
      return high - low;
    };
    const auto compare = [&](double claim, double near, double bound, const auto& where) {
      const double error = std::abs(claim - near);
      const bool inside = std::isfinite(claim) && std::isfinite(bound) && error <= bound;
      stands_out = stands_out || (inside && std::abs(near) > 4.0 * bound);
      const double ratio = inside ? 0.0
                           : std::isfinite(error) && std::isfinite(bound)
                               ? error / std::max(bound, std::numeric_limits<double>::min())
                               : std::numeric_limits<double>::infinity();
      if (!inside && (worst_text.empty() || ratio > worst)) {
        worst = ratio;
        worst_text = concat(where(), " is ", digits(claim), " instead of ", digits(near),
                            ", bound ", digits(bound));
      }
    };

    const index size = x.rows * x.cols;
    const index compared = std::min({size, accuracy.elements, most_elements});
    for (index k = 0; k < compared; ++k) {
      const index i = k * size / compared, r = i / x.cols, c = i % x.cols;
      const auto where = [&] { return concat("element ", shape_text(r, c)); };
      const double at = x(r, c), step = difference_step(at);
      const auto move = [&](double t) { x(r, c) = at + t; };
      // Divided by the distance of the points as they are after rounding.
      const auto slope = [&](double t) {
        return difference(move, t, where) / ((at + t) - (at - t));
      };
      const double near = slope(step), far = slope(2.0 * step);
      x(r, c) = at;
      compare(probe.gradient(r, c), near, std::abs(far - near) + value_error * (2.0 / step + 1.0),
              where);
    }

    if (compared < size) {
      const auto where = [] { return std::string("the sum along a direction"); };
      const matrix<double, cpu> direction = cotangent(x.rows, x.cols, 1);
      matrix<double, cpu> at(x.rows, x.cols);
      double claim = 0.0, absolute = 0.0;
      for (index r = 0; r < x.rows; ++r) {
        for (index c = 0; c < x.cols; ++c) {
          at(r, c) = x(r, c);
          const double step = difference_step(at(r, c)) * direction(r, c);
          const double term = probe.gradient(r, c) * ((at(r, c) + step) - (at(r, c) - step)) / 2.0;
          claim += term;
          absolute += std::abs(term);
        }
      }
      const auto move = [&](double t) {
        for (index r = 0; r < x.rows; ++r) {
          for (index c = 0; c < x.cols; ++c) {
            x(r, c) = at(r, c) + t * (difference_step(at(r, c)) * direction(r, c));
          }
        }
      };
      const double near = difference(move, 1.0, where) / 2.0;
      const double far = difference(move, 2.0, where) / 4.0;
      move(0.0);
      compare(claim, near,
              std::abs(far - near) + 3.0 * value_error +
                  gamma<double>(static_cast<double>(size) + 2.0) * absolute,
              where);
    }
    close.expect_none(worst_text);
  }
  if (accuracy.expect_nonzero) {
    law useful(out, concat(what, ": some gradient is larger than its bound"));
    useful.expect(stands_out || !out.failures.empty(),
                  [] { return std::string("none is, so this check proves nothing"); });
  }
  return out;
}

}  // namespace talpa::testing
