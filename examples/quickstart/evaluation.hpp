// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "network.hpp"
#include "report_data.hpp"
#include "tasks.hpp"

#include <talpa/ops/item.hpp>
#include <talpa/talpa.hpp>

#include <array>
#include <cstddef>
#include <vector>

namespace talpa::examples {

inline index expert_rank(const linear&) { return 0; }
inline index expert_rank(const lora_linear& layer) { return layer.adapter.rank; }
template <class Router>
index expert_rank(const mole_linear<Router, lora>& layer) {
  return layer.expert.rank;
}

/// What a network does with held-out questions.
struct evaluation {
  task_scores scores;
  double loss = 0;         // mean cross-entropy, nats
  double active_rank = 0;  // mean over tokens and layers
  /// With routers: one a layer, its entropy a single value.
  std::vector<layer_routing> layers;
};

/// Asks every instruction about every row.
template <class Layer, backend B>
evaluation evaluate_network(context<B>& ctx, network<Layer, B>& net, const digits& data,
                            const std::vector<index>& rows) {
  evaluation result;
  matrix<float, cpu> logits;                               // [rows, class_count]
  std::array<std::vector<statistics_report>, depth> used;  // by layer and instruction
  result.scores = evaluate(data, rows, [&](const std::vector<example>& asked) {
    const question_batch<B> batch(data, asked);
    tape<float, B> t(ctx);
    const recorded_forward<B> out = forward(t, net, batch.x(), mode::inference);
    const auto loss = t.cross_entropy(out.logits, batch.answers());
    result.loss +=
        static_cast<double>(ops::item(ctx, loss.value())) / static_cast<double>(task_count);
    for (std::size_t l = 0; l < out.routed.size(); ++l) {
      used[l].emplace_back(measure(ctx, out.routed[l].view()));
    }
    logits = to_host(out.logits.value());
    return logits.data();
  });

  const auto rank = static_cast<double>(expert_rank(net.layer));
  result.active_rank = rank;
  if constexpr (has_router<Layer>) {
    double active_experts = 0;
    for (std::size_t l = 0; l < depth; ++l) {
      layer_routing layer;
      layer.layer = layer_names[l];
      layer.experts = net.layer.experts;
      statistics_report all;
      for (const statistics_report& report : used[l]) {
        all.merge(report);
        double sum = 0;  // gates of a token need not sum to one
        for (const double gates : report.importance) sum += gates;
        for (const double gates : report.importance) layer.load.push_back(gates / sum);
      }
      layer.entropy.push_back(all.normalised_entropy());
      active_experts += all.active_experts() / static_cast<double>(depth);
      result.layers.push_back(std::move(layer));
    }
    result.active_rank = rank * active_experts;
  }
  return result;
}

}  // namespace talpa::examples
