// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/matrix.hpp>
#include <talpa/core/mode.hpp>
#include <talpa/cpu/context.hpp>
#include <talpa/losses/explain.hpp>
#include <talpa/routing/routing.hpp>

#include <limits>
#include <span>

// A loss behind virtual functions: what the laws do to a loss is compiled once, not for each.

namespace talpa::testing::detail {

template <floating T>
class loss_subject {
 public:
  struct outcome {
    double value = std::numeric_limits<double>::quiet_NaN();  ///< NaN: not [1, 1]
    bool returned = true;  ///< backward handed all its memory back
  };

  virtual ~loss_subject() = default;
  /// One forward, then `repetitions` of backward with the upstream gradient `dvalue`.
  virtual outcome evaluate(context<cpu>& ctx, std::span<const routed_view<T, cpu>> layers,
                           std::span<const routed_gradient<T, cpu>> gradients, T dvalue,
                           grad_mode mode, int repetitions) const = 0;
};

template <floating T, class Loss>
class loss_model final : public loss_subject<T> {
 public:
  using typename loss_subject<T>::outcome;

  explicit loss_model(const Loss& loss) : loss_(loss) {}

  outcome evaluate(context<cpu>& ctx, std::span<const routed_view<T, cpu>> layers,
                   std::span<const routed_gradient<T, cpu>> gradients, T dvalue, grad_mode mode,
                   int repetitions) const override {
    const auto kept = loss_.forward(ctx, layers);
    const auto memory = ctx.memory.used(), scratch = ctx.scratch.used();
    matrix<T, cpu> upstream(1, 1);
    upstream(0, 0) = dvalue;
    for (int i = 0; i < repetitions; ++i) {
      loss_.backward(ctx, layers, kept, upstream, gradients, mode);
    }
    outcome r;
    r.returned = ctx.memory.used() == memory && ctx.scratch.used() == scratch;
    const matrix_view<const T, cpu> value = kept.value;
    if (value.rows == 1 && value.cols == 1) r.value = static_cast<double>(value(0, 0));
    return r;
  }

 private:
  Loss loss_;
};

}  // namespace talpa::testing::detail
