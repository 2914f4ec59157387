// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/mode.hpp>
#include <talpa/core/random.hpp>
#include <talpa/cpu/context.hpp>
#include <talpa/routing/routing.hpp>
#include <talpa/scorers/explain.hpp>
#include <talpa/testing/parameters.hpp>

#include <string>

// A scorer behind virtual functions: what the laws do to a scorer is compiled once, not for each.

namespace talpa::testing::detail {

template <floating T>
class scorer_subject {
 public:
  virtual ~scorer_subject() = default;
  virtual parameter_bag<T> init(index inputs, index experts, generator& random,
                                const std::string& prefix) const = 0;
  /// One forward, then `repetitions` of backward. Whether backward handed all its memory back.
  virtual bool run(context<cpu>& ctx, parameter_bag<T>& p, const batch_info<T, cpu>& batch,
                   input<T, cpu> x, output<T, cpu> logits, input<T, cpu> dlogits, output<T, cpu> dx,
                   grad_mode dx_mode, int repetitions) const = 0;
};

template <floating T, class Scorer>
class scorer_model final : public scorer_subject<T> {
 public:
  explicit scorer_model(const Scorer& scorer) : scorer_(scorer) {}

  parameter_bag<T> init(index inputs, index experts, generator& random,
                        const std::string& prefix) const override {
    return parameter_bag<T>(scorer_.template init<T, cpu>(inputs, experts, random, prefix));
  }
  bool run(context<cpu>& ctx, parameter_bag<T>& bag, const batch_info<T, cpu>& batch,
           input<T, cpu> x, output<T, cpu> logits, input<T, cpu> dlogits, output<T, cpu> dx,
           grad_mode dx_mode, int repetitions) const override {
    auto& p = bag.template as<typename Scorer::template params<T, cpu>>();
    const auto kept = scorer_.forward(ctx, p, x, logits, mode::training, batch);
    const auto memory = ctx.memory.used(), scratch = ctx.scratch.used();
    for (int i = 0; i < repetitions; ++i) {
      scorer_.backward(ctx, p, kept, x, dlogits, dx, dx_mode);
    }
    return ctx.memory.used() == memory && ctx.scratch.used() == scratch;
  }

 private:
  Scorer scorer_;
};

}  // namespace talpa::testing::detail
