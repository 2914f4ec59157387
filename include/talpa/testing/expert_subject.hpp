// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/mode.hpp>
#include <talpa/core/random.hpp>
#include <talpa/cpu/context.hpp>
#include <talpa/experts/explain.hpp>
#include <talpa/testing/parameters.hpp>

#include <span>
#include <string>

// An expert behind virtual functions: what the laws do to an expert is compiled once, not for each.

namespace talpa::testing::detail {

/// Whether `train_experts` restricts training to some of the experts.
template <class Expert, class T>
concept trains_by_expert = requires(const Expert& x, typename Expert::template params<T, cpu>& p,
                                    std::span<const index> experts) {
  x.train_experts(p, experts);
};

/// What does not depend on the scalar.
struct expert_facts {
  bool has_masked_form = false;   ///< rank_space_expert
  bool trains_by_expert = false;  ///< has train_experts
  index width = 0;
};

template <floating T>
class expert_subject {
 public:
  virtual ~expert_subject() = default;
  virtual parameter_bag<T> init(index inputs, index outputs, index experts, generator& random,
                                const std::string& prefix) const = 0;
  /// Only where the expert has it.
  virtual void train_experts(parameter_bag<T>& p, std::span<const index> chosen) const = 0;
  /// One forward, then `repetitions` of backward. Whether backward handed all its memory back.
  virtual bool run_grouped(context<cpu>& ctx, parameter_bag<T>& p, const segments<cpu>& slots,
                           vector_input<T, cpu> gates, input<T, cpu> x, output<T, cpu> y,
                           input<T, cpu> dy, vector_output<T, cpu> dgates, output<T, cpu> dx,
                           int repetitions) const = 0;
  /// The same in the masked form, where the expert has it.
  virtual bool run_masked(context<cpu>& ctx, parameter_bag<T>& p, input<T, cpu> gates,
                          input<T, cpu> x, output<T, cpu> y, input<T, cpu> dy,
                          output<T, cpu> dgates, output<T, cpu> dx, grad_mode dx_mode,
                          int repetitions) const = 0;
};

template <floating T, class Expert>
class expert_model final : public expert_subject<T> {
 public:
  explicit expert_model(const Expert& expert) : expert_(expert) {}

  parameter_bag<T> init(index inputs, index outputs, index experts, generator& random,
                        const std::string& prefix) const override {
    return parameter_bag<T>(
        expert_.template init<T, cpu>(inputs, outputs, experts, random, prefix));
  }
  void train_experts(parameter_bag<T>& bag, std::span<const index> chosen) const override {
    if constexpr (trains_by_expert<Expert, T>) expert_.train_experts(params(bag), chosen);
  }
  bool run_grouped(context<cpu>& ctx, parameter_bag<T>& bag, const segments<cpu>& slots,
                   vector_input<T, cpu> gates, input<T, cpu> x, output<T, cpu> y, input<T, cpu> dy,
                   vector_output<T, cpu> dgates, output<T, cpu> dx,
                   int repetitions) const override {
    auto& p = params(bag);
    const auto kept = expert_.forward_grouped(ctx, p, slots, gates, x, y);
    const auto memory = ctx.memory.used(), scratch = ctx.scratch.used();
    for (int i = 0; i < repetitions; ++i) {
      expert_.backward_grouped(ctx, p, kept, slots, gates, x, dy, dgates, dx, grad_mode::overwrite);
    }
    return ctx.memory.used() == memory && ctx.scratch.used() == scratch;
  }
  bool run_masked(context<cpu>& ctx, parameter_bag<T>& bag, input<T, cpu> gates, input<T, cpu> x,
                  output<T, cpu> y, input<T, cpu> dy, output<T, cpu> dgates, output<T, cpu> dx,
                  grad_mode dx_mode, int repetitions) const override {
    bool returned = true;
    if constexpr (rank_space_expert<Expert>) {
      auto& p = params(bag);
      const auto kept = expert_.forward_masked(ctx, p, gates, x, y);
      const auto memory = ctx.memory.used(), scratch = ctx.scratch.used();
      for (int i = 0; i < repetitions; ++i) {
        expert_.backward_masked(ctx, p, kept, gates, x, dy, dgates, dx, dx_mode);
      }
      returned = ctx.memory.used() == memory && ctx.scratch.used() == scratch;
    }
    return returned;
  }

 private:
  static auto& params(parameter_bag<T>& bag) {
    return bag.template as<typename Expert::template params<T, cpu>>();
  }

  Expert expert_;
};

}  // namespace talpa::testing::detail
