// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "run_info.hpp"
#include "tasks.hpp"

#include <talpa/core/index.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

namespace talpa::examples {

/// An expert is called dead when it gets less than this share of the gates of the held-out tokens.
inline constexpr double dead_share = 0.01;

/// What one router did after one run, seen on the held-out tokens.
struct layer_routing {
  std::string layer;
  index experts = 0;
  /// Mean over tokens of the entropy of the softmax of the scores, over ln E; before training, then
  /// after each epoch.
  std::vector<double> entropy;
  /// [tasks, E]: an expert's share of the gates of one instruction's tokens; rows sum to 1.
  std::vector<double> load;

  double load_at(index task, index expert) const {
    return load[static_cast<std::size_t>(task * experts + expert)];
  }
  /// An expert's share of the gates, mean over the instructions.
  double share(index expert) const {
    double sum = 0;
    for (index t = 0; t < task_count; ++t) sum += load_at(t, expert);
    return sum / static_cast<double>(task_count);
  }
  index dead() const {
    index count = 0;
    for (index e = 0; e < experts; ++e) count += share(e) < dead_share;
    return count;
  }
  double largest_share() const {
    double largest = 0;
    for (index e = 0; e < experts; ++e) largest = std::max(largest, share(e));
    return largest;
  }
};

/// One method with one seed.
struct method_run {
  std::uint64_t seed = 0;
  task_scores held_out;
  double train_seconds = 0;
  std::vector<double> train_loss;     // mean cross-entropy during each epoch, nats
  std::vector<double> held_out_loss;  // mean cross-entropy after each epoch, nats
  std::vector<layer_routing> layers;  // empty without routers
};

enum class method_family { frozen, lora, soft_mole, mola, dynamic };

inline const char* family_name(method_family family) {
  switch (family) {
    case method_family::lora:
      return "LoRA";
    case method_family::soft_mole:
      return "soft MoLE";
    case method_family::mola:
      return "MoLA";
    case method_family::dynamic:
      return "other routers";
    case method_family::frozen:
      break;
  }
  return "frozen base";
}

/// Mean and extremes over seeds.
struct spread {
  double mean = std::numeric_limits<double>::quiet_NaN();
  double low = std::numeric_limits<double>::quiet_NaN();
  double high = std::numeric_limits<double>::quiet_NaN();
};

/// One method with all seeds. Counts do not depend on the seed.
struct method_result {
  std::string name;
  std::string label;  // short, for figures that show the family too
  method_family family = method_family::frozen;
  index rank = 0;  // of one expert
  index adapter_parameters = 0;
  index router_parameters = 0;
  double active_rank = 0;  // mean over held-out tokens and layers
  std::vector<method_run> runs;

  index trainable() const { return adapter_parameters + router_parameters; }

  template <class Value>
  spread over_seeds(Value&& value) const {
    spread s;
    double sum = 0;
    for (const method_run& run : runs) {
      const double v = value(run);
      sum += v;
      s.low = &run == &runs.front() ? v : std::min(s.low, v);
      s.high = &run == &runs.front() ? v : std::max(s.high, v);
    }
    if (!runs.empty()) s.mean = sum / static_cast<double>(runs.size());
    return s;
  }
  spread mean_accuracy() const {
    return over_seeds([](const method_run& run) { return run.held_out.mean(); });
  }
  spread accuracy(index task) const {
    return over_seeds([&](const method_run& run) {
      return run.held_out.accuracy[static_cast<std::size_t>(task)];
    });
  }
  /// Of each seed its own worst instruction.
  spread worst_accuracy() const {
    return over_seeds([](const method_run& run) {
      return run.held_out.accuracy[static_cast<std::size_t>(run.held_out.worst())];
    });
  }
  /// The instruction with the lowest accuracy in the mean over seeds; ties go to the lower index.
  index worst_task() const {
    index worst = 0;
    for (index t = 1; t < task_count; ++t) {
      if (accuracy(t).mean < accuracy(worst).mean) worst = t;
    }
    return worst;
  }
  spread seconds() const {
    return over_seeds([](const method_run& run) { return run.train_seconds; });
  }
  /// A curve of the runs, such as &method_run::train_loss: mean over seeds, as long as the
  /// shortest.
  std::vector<double> mean_curve(std::vector<double> method_run::*curve) const {
    std::vector<double> mean;
    if (runs.empty()) return mean;
    std::size_t epochs = (runs.front().*curve).size();
    for (const method_run& run : runs) epochs = std::min(epochs, (run.*curve).size());
    for (std::size_t i = 0; i < epochs; ++i) {
      mean.push_back(over_seeds([&](const method_run& run) { return (run.*curve)[i]; }).mean);
    }
    return mean;
  }
  bool routed() const { return !runs.empty() && !runs.front().layers.empty(); }
};

/// Everything the tables and figures show.
struct report_data {
  run_info info;
  bool quick = false;
  index train_images = 0;
  index held_out_images = 0;
  index base_parameters = 0;
  int pretrain_epochs = 0;
  int epochs = 0;
  int batch = 0;
  double learning_rate = 0;
  double balance = 0;
  std::string network;                 // the layers of the base in words
  task_scores majority;                // mean over seeds of the most frequent answer
  std::vector<std::string> settings;   // of one method's router alone, a sentence each
  std::vector<method_result> methods;  // in table order
  double total_seconds = 0;
};

}  // namespace talpa::examples
