// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/ops/sgd.hpp>
#include <talpa/optim/group.hpp>
#include <talpa/optim/schedule.hpp>

#include <limits>
#include <span>
#include <utility>
#include <vector>

namespace talpa {

/// Numbers of sgd that are the same for all groups.
struct sgd_options {
  double momentum = 0.0;  ///< in [0, 1)
  bool nesterov = false;  ///< look ahead along the velocity; wants momentum > 0
};

/// Optimiser: stochastic gradient descent with momentum, see ops/sgd.hpp for the formula.
///
/// Learning rate of a step: that of the group times `factor`. Weight decay is of the L2 kind: added
/// to the gradient, and so part of the velocity.
/// State: with momentum one number for each weight that trains, for trained rows only; else
/// nothing. After construction a step allocates nothing.
/// Edges: a parameter that changed what trains of it since construction is an error; with momentum
/// or decay a zero gradient still moves weights.
/// Cost of a step: reads three numbers and writes two for each weight that trains, without momentum
/// two and one.
/// Determinism: same bits for any number of threads.
/// Throws: value_error, see parameter_set; for options outside their ranges; before any work.
template <floating T, backend B>
class sgd {
 public:
  static constexpr const char* name = "sgd";

  explicit sgd(std::vector<parameter_group<T, B>> groups, const sgd_options& options = {})
      : set_(name, std::move(groups)), options_(options) {
    check_value(options.momentum >= 0.0 && options.momentum < 1.0, name, "momentum",
                options.momentum, "a number in [0, 1)");
    if (options.nesterov && options.momentum == 0.0) {
      detail::throw_value(name, "momentum", "0", "a number in (0, 1) = what nesterov looks along");
    }
    if (options.momentum == 0.0) return;
    velocity_.reserve(set_.entries().size());
    for (const auto& entry : set_.entries()) {
      velocity_.emplace_back(entry.source->grad().rows, entry.source->cols());
    }
  }
  sgd(const sgd&) = delete;
  sgd& operator=(const sgd&) = delete;

  /// One update with the gradients that are there; the learning rates are multiplied by `factor`.
  void step(context<B>& ctx, double factor = 1.0) {
    check_value(factor >= 0.0 && factor <= std::numeric_limits<double>::max(), "sgd::step",
                "factor", factor, "a finite number >= 0");
    set_.check_unchanged("sgd::step");
    ++steps_;
    for (std::size_t i = 0; i < set_.entries().size(); ++i) {
      const auto& entry = set_.entries()[i];
      const parameter_group<T, B>& group = set_.group_of(entry);
      const sgd_numbers numbers{.learning_rate = factor * group.learning_rate,
                                .momentum = options_.momentum,
                                .weight_decay = group.weight_decay,
                                .nesterov = options_.nesterov};
      for (const row_run& run : entry.runs) {
        const matrix_view<T, B> velocity =
            velocity_.empty() ? matrix_view<T, B>()
                              : velocity_[i].view().row_range(run.grad_first, run.rows);
        ops::sgd_update(ctx, numbers, entry.source->grad().row_range(run.grad_first, run.rows),
                        velocity, entry.source->value().row_range(run.first, run.rows));
      }
    }
  }
  /// One update at the rate of the schedule for this step.
  template <rate_schedule Schedule>
  void step(context<B>& ctx, const Schedule& schedule) {
    step(ctx, schedule.factor(steps_));
  }

  void zero_grad(context<B>& ctx) { set_.zero_grad(ctx); }
  /// Updates so far.
  index steps() const { return steps_; }
  /// All parameters in the order of the groups.
  std::span<parameter<T, B>* const> parameters() const { return set_.parameters(); }
  /// Velocity of what trains of a parameter, [trained rows, cols]; empty without momentum.
  matrix_view<T, B> velocity(const parameter<T, B>& p) {
    const std::size_t i = set_.find("sgd::velocity", p);
    return velocity_.empty() ? matrix_view<T, B>() : velocity_[i].view();
  }
  /// Continues a run after `steps` updates, for schedules.
  void resume(index steps) {
    check_at_least("sgd::resume", "steps", steps, 0, "updates so far");
    steps_ = steps;
  }

 private:
  parameter_set<T, B> set_;
  sgd_options options_;
  std::vector<matrix<T, B>> velocity_;  // [trained rows, cols] for each parameter, or none
  index steps_ = 0;
};

}  // namespace talpa
