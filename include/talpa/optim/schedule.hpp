// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/check.hpp>
#include <talpa/core/math.hpp>

#include <concepts>

namespace talpa {

/// Gives the factor of the learning rate for update number `step`, from 0. A pure function: a run
/// can be resumed at any step.
template <class S>
concept rate_schedule = requires(const S& s, index step) {
  { s.factor(step) } -> std::same_as<double>;
};

namespace detail {

/// Rises linearly over the first updates: 1 / W, 2 / W, ..., 1. The first update is not lost, as it
/// would be with a rise from 0.
inline double warmup_factor(index warmup_steps, index step) {
  return step < warmup_steps ? static_cast<double>(step + 1) / static_cast<double>(warmup_steps)
                             : 1.0;
}

/// Share of the updates after warm-up that are over, in [0, 1].
inline double progress(const char* function, index warmup_steps, index total_steps,
                       double final_factor, index step) {
  check_at_least(function, "warmup_steps", warmup_steps, 0, "updates of warm-up");
  check_at_least(function, "total_steps", total_steps, warmup_steps + 1,
                 "updates in all, more than warmup_steps");
  check_value(final_factor >= 0.0 && final_factor <= 1.0, function, "final_factor", final_factor,
              "a number in [0, 1]");
  check_at_least(function, "step", step, 0, "updates so far");
  if (step < warmup_steps) return 0.0;
  if (step >= total_steps) return 1.0;
  return static_cast<double>(step - warmup_steps) / static_cast<double>(total_steps - warmup_steps);
}

}  // namespace detail

/// Warm-up, then the full rate for ever.
///
/// factor = min(1, (step + 1) / warmup_steps).
/// Throws: value_error for a negative number.
struct warmup_constant {
  index warmup_steps = 0;  ///< >= 0

  double factor(index step) const {
    check_at_least("warmup_constant", "warmup_steps", warmup_steps, 0, "updates of warm-up");
    check_at_least("warmup_constant", "step", step, 0, "updates so far");
    return detail::warmup_factor(warmup_steps, step);
  }
};

/// Warm-up, then down in a straight line.
///
/// factor = 1 - (1 - final_factor) p, p = (step - warmup_steps) / (total_steps - warmup_steps),
/// from total_steps on final_factor.
/// Throws: value_error for numbers outside their ranges.
struct warmup_linear {
  index warmup_steps = 0;     ///< >= 0
  index total_steps = 0;      ///< > warmup_steps
  double final_factor = 0.0;  ///< 0..1

  double factor(index step) const {
    const double p =
        detail::progress("warmup_linear", warmup_steps, total_steps, final_factor, step);
    return step < warmup_steps ? detail::warmup_factor(warmup_steps, step)
                               : final_factor + (1.0 - final_factor) * (1.0 - p);
  }
};

/// Warm-up, then down along half a cosine.
///
/// factor = final_factor + (1 - final_factor) (1 + cos(pi p)) / 2 with p as in warmup_linear.
/// Determinism: the cosine is that of talpa::math, the same bits on every machine.
/// Throws: value_error for numbers outside their ranges.
/// Source: Loshchilov and Hutter, 2017, SGDR, equation 5, without restarts.
struct warmup_cosine {
  index warmup_steps = 0;     ///< >= 0
  index total_steps = 0;      ///< > warmup_steps
  double final_factor = 0.0;  ///< 0..1

  double factor(index step) const {
    const double p =
        detail::progress("warmup_cosine", warmup_steps, total_steps, final_factor, step);
    if (step < warmup_steps) return detail::warmup_factor(warmup_steps, step);
    const double half_turn = math::cos_sin_turns(0.5 * p).cosine;  // cos(pi p)
    return final_factor + (1.0 - final_factor) * 0.5 * (1.0 + half_turn);
  }
};

static_assert(rate_schedule<warmup_constant> && rate_schedule<warmup_linear> &&
              rate_schedule<warmup_cosine>);

}  // namespace talpa
