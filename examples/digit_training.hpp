// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "quickstart/digits.hpp"
#include "quickstart/tasks.hpp"

#include <talpa/talpa.hpp>

#include <cstddef>
#include <cstdint>
#include <vector>

// What the programs on handwritten digits share.

namespace talpa::examples {

/// Row number `position` of a list that begins again at its end.
inline index row_at(const std::vector<index>& rows, index position) {
  return rows[static_cast<std::size_t>(position) % rows.size()];
}

/// AdamW with 20 steps of warm-up and half a cosine on what trains of a layer and its head.
/// `loss_at(tape, step)` records the loss of a step. Returns the bytes of gradients and moments.
template <class Params, class LossAt>
index train(context<cpu>& ctx, Params& params, affine_params<float, cpu>& head, double rate,
            index steps, LossAt&& loss_at) {
  parameter_group<float, cpu> group{.learning_rate = rate};
  adamw<float, cpu> optimiser({group.add(params).add(head)});
  const warmup_cosine schedule{.warmup_steps = 20, .total_steps = steps};
  tape<float, cpu> t(ctx);
  for (index step = 0; step < steps; ++step) {
    t.backward(loss_at(t, step));
    optimiser.step(ctx, schedule);
    optimiser.zero_grad(ctx);
    t.reset();
  }
  index numbers = 0;
  for (const parameter<float, cpu>* p : optimiser.parameters()) {
    numbers += p->grad().size() + 2 * optimiser.state(*p).first.size();
  }
  return numbers * static_cast<index>(sizeof(float));
}

/// Share of the rows of logits that are largest at their label. `logits_of(tape, i)` records those
/// of batch i and leaves its answers in `labels`.
template <class LogitsOf>
double accuracy(context<cpu>& ctx, const vector<std::int32_t, cpu>& labels, index batches,
                LogitsOf&& logits_of) {
  tape<float, cpu> t(ctx);
  index right = 0;
  for (index i = 0; i < batches; ++i) {
    const matrix_view<const float, cpu> logits = logits_of(t, i).value();
    for (index n = 0; n < logits.rows; ++n) {
      right += predicted_class(logits.row(n), logits.cols) == labels[n];
    }
    t.reset();
  }
  return static_cast<double>(right) / static_cast<double>(batches * labels.size());
}

}  // namespace talpa::examples
