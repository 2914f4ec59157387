// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/transfer.hpp>
#include <talpa/ops/adamw.hpp>
#include <talpa/optim/group.hpp>
#include <talpa/optim/schedule.hpp>

#include <cmath>
#include <limits>
#include <span>
#include <utility>
#include <vector>

namespace talpa {

/// Numbers of adamw that are the same for all groups.
struct adamw_options {
  double beta1 = 0.9;     ///< in [0, 1), decay of the mean gradient
  double beta2 = 0.999;   ///< in [0, 1), decay of the mean squared gradient
  double epsilon = 1e-8;  ///< > 0, added outside the square root
};

/// Optimiser: Adam with decoupled weight decay and bias correction, see ops/adamw.hpp for the
/// formula.
///
/// Learning rate of a step: that of the group times `factor`. The decay of a step is learning rate
/// times the group's weight_decay.
/// State: two numbers for each weight that trains, for trained rows only. After construction a step
/// allocates nothing.
/// On a device the steps are counted there, so that a step captured in a CUDA graph goes on
/// counting when it is replayed (`steps()` counts calls); its learning rates are those of the
/// capture.
/// Edges: weights with a zero gradient still decay, and still move while their moments fade: an
/// expert without tokens is not left alone. A parameter that changed what trains of it since
/// construction is an error.
/// Cost of a step: reads four numbers and writes three for each weight that trains.
/// Determinism: same bits for any number of threads.
/// Throws: value_error, see parameter_set; for options outside their ranges; before any work.
/// Source: Loshchilov and Hutter, 2019, Decoupled weight decay regularization, algorithm 2, with
/// the learning rate inside the decay, as in torch.optim.AdamW.
template <floating T, backend B>
class adamw {
 public:
  static constexpr const char* name = "adamw";

  /// State of one parameter, both [trained rows, cols].
  struct moments {
    matrix_view<T, B> first;
    matrix_view<T, B> second;
  };

  explicit adamw(std::vector<parameter_group<T, B>> groups, const adamw_options& options = {})
      : set_(name, std::move(groups)), options_(options) {
    check_value(options.beta1 >= 0.0 && options.beta1 < 1.0, name, "beta1", options.beta1,
                "a number in [0, 1)");
    check_value(options.beta2 >= 0.0 && options.beta2 < 1.0, name, "beta2", options.beta2,
                "a number in [0, 1)");
    // Also as a T, in which 1e-50 would be zero and 0 / 0 the first step of a zero gradient.
    check_value(static_cast<T>(options.epsilon) > T{0} &&
                    options.epsilon <= std::numeric_limits<double>::max(),
                name, "epsilon", options.epsilon, "a number > 0");
    first_.reserve(set_.entries().size());
    second_.reserve(set_.entries().size());
    for (const auto& entry : set_.entries()) {
      first_.emplace_back(entry.source->grad().rows, entry.source->cols());
      second_.emplace_back(entry.source->grad().rows, entry.source->cols());
    }
    if constexpr (ops::adamw_counts<B>) {
      powers_ = matrix<double, B>(1, 2);
      set_powers();
    }
  }
  adamw(const adamw&) = delete;
  adamw& operator=(const adamw&) = delete;

  /// One update with the gradients that are there; the learning rates are multiplied by `factor`.
  void step(context<B>& ctx, double factor = 1.0) {
    check_value(factor >= 0.0 && factor <= std::numeric_limits<double>::max(), "adamw::step",
                "factor", factor, "a finite number >= 0");
    set_.check_unchanged("adamw::step");
    ++steps_;
    if constexpr (ops::adamw_counts<B>) {
      ops::adamw_advance(ctx, {.beta1 = options_.beta1, .beta2 = options_.beta2}, powers_.view());
    }
    for (std::size_t i = 0; i < set_.entries().size(); ++i) {
      const auto& entry = set_.entries()[i];
      const parameter_group<T, B>& group = set_.group_of(entry);
      const adamw_numbers numbers{.learning_rate = factor * group.learning_rate,
                                  .beta1 = options_.beta1,
                                  .beta2 = options_.beta2,
                                  .epsilon = options_.epsilon,
                                  .weight_decay = group.weight_decay,
                                  .step = steps_};
      for (const row_run& run : entry.runs) {
        const auto grad = entry.source->grad().row_range(run.grad_first, run.rows);
        const auto first = first_[i].view().row_range(run.grad_first, run.rows);
        const auto second = second_[i].view().row_range(run.grad_first, run.rows);
        const auto value = entry.source->value().row_range(run.first, run.rows);
        if constexpr (ops::adamw_counts<B>) {
          ops::adamw_update_counted(ctx, numbers, powers_.view(), grad, first, second, value);
        } else {
          ops::adamw_update(ctx, numbers, grad, first, second, value);
        }
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
  /// State of a parameter, to store and to restore.
  moments state(const parameter<T, B>& p) {
    const std::size_t i = set_.find("adamw::state", p);
    return {first_[i].view(), second_[i].view()};
  }
  /// Continues a run after `steps` updates, whose moments `state` gave back.
  void resume(index steps) {
    check_at_least("adamw::resume", "steps", steps, 0, "updates so far");
    steps_ = steps;
    if constexpr (ops::adamw_counts<B>) set_powers();
  }

 private:
  /// The device counts from `steps_` on.
  void set_powers() {
    matrix<double, cpu> powers(1, 2);
    powers(0, 0) = std::pow(options_.beta1, static_cast<double>(steps_));
    powers(0, 1) = std::pow(options_.beta2, static_cast<double>(steps_));
    to_device<double, B>(powers, powers_.view());
  }

  parameter_set<T, B> set_;
  adamw_options options_;
  std::vector<matrix<T, B>> first_;   // [trained rows, cols] for each parameter
  std::vector<matrix<T, B>> second_;  // likewise
  index steps_ = 0;
  matrix<double, B> powers_;  // [1, 2], beta1^steps and beta2^steps where the device counts
};

}  // namespace talpa
