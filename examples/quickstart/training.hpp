// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "network.hpp"
#include "tasks.hpp"

#include <talpa/losses/losses.hpp>
#include <talpa/ops/item.hpp>
#include <talpa/talpa.hpp>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <span>
#include <type_traits>
#include <vector>

namespace talpa::examples {

/// How a network is trained.
struct recipe {
  int epochs = 1;
  int batch = 128;
  double learning_rate = 1e-3;  // peak: reached after a twentieth, then half a cosine down to 0
  double weight_decay = 0;
};

/// No losses on the routers.
struct no_loss {};

/// That of MoLA.
inline auto balanced(double weight) {
  return losses{term{weight, load_balance<balance::per_selection, balance::per_layer>{}}};
}

/// What one epoch cost.
struct epoch_result {
  double loss = 0;     // mean cross-entropy over the questions, nats; without losses on routers
  double seconds = 0;  // of training alone
};

/// Trains what is trainable in `net` on `questions`, reshuffled for every epoch by streams of
/// `random`; `on_routers` is a loss on the routers of all layers, which networks without routers
/// ignore. `after_epoch(epoch, result)` is called after each, from 1.
template <class Layer, backend B, class Loss, class AfterEpoch>
void train(context<B>& ctx, network<Layer, B>& net, const digits& data,
           std::vector<example> questions, const recipe& r, generator& random,
           const Loss& on_routers, AfterEpoch&& after_epoch) {
  using clock = std::chrono::steady_clock;
  const auto size = static_cast<std::size_t>(r.batch);
  const std::size_t steps = (questions.size() + size - 1) / size;
  const index updates = r.epochs * static_cast<index>(steps);
  const warmup_cosine schedule{.warmup_steps = updates / 20, .total_steps = updates};
  parameter_group<float, B> group;
  group.name = "network";
  group.learning_rate = r.learning_rate;
  group.weight_decay = r.weight_decay;
  adamw<float, B> optimiser({group.add(net)});
  tape<float, B> t(ctx);

  for (int epoch = 1; epoch <= r.epochs; ++epoch) {
    const clock::time_point start = clock::now();
    shuffle(questions, random.next());
    epoch_result result;
    for (std::size_t step = 0; step < steps; ++step) {
      const auto asked =
          std::span(questions).subspan(step * size, std::min(size, questions.size() - step * size));
      const question_batch<B> batch(data, asked);

      const recorded_forward<B> out = forward(t, net, batch.x(), mode::training);
      const auto cross_entropy = t.cross_entropy(out.logits, batch.answers());
      auto loss = cross_entropy;
      if constexpr (has_router<Layer> && !std::is_same_v<Loss, no_loss>) {
        const std::span<const routed_variable<float, B>> routers(out.routed);
        loss = t.weighted_sum({{cross_entropy}, {t.apply_loss(on_routers, routers)}});
      }
      t.backward(loss);
      optimiser.step(ctx, schedule);
      optimiser.zero_grad(ctx);
      result.loss += static_cast<double>(ops::item(ctx, cross_entropy.value())) *
                     static_cast<double>(asked.size()) / static_cast<double>(questions.size());
      t.reset();
    }
    result.seconds = std::chrono::duration<double>(clock::now() - start).count();
    after_epoch(epoch, result);
  }
}

}  // namespace talpa::examples
