// SPDX-License-Identifier: Apache-2.0
//
// Scorers, forward and backward in training, on one thread, beside linear_scorer.
#include "beside.hpp"

#include <talpa/talpa.hpp>

#include <benchmark/benchmark.h>

#include <string>

namespace {

using namespace talpa;
using talpa::index;

constexpr index tokens = 512, width = 768, sequence_length = 64, task_width = 64;

/// Tokens in sequences, each of which has `rows` rows of conditioning.
struct workload {
  workload(index experts, index rows, index columns)
      : ctx(1),
        random(1),
        x(bench::normal_matrix(tokens, width, 1.0, random)),
        dlogits(bench::normal_matrix(tokens, experts, 1.0, random)),
        beside(bench::normal_matrix(tokens / sequence_length * rows, columns, 1.0, random)),
        logits(tokens, experts),
        dx(tokens, width) {
    batch.sequence_length = sequence_length;
    batch.random = &random;
    batch.conditioning.rows = beside.view();
    for (std::size_t s = 0; s < labels.size(); ++s) labels[s] = static_cast<std::int32_t>(s);
    batch.labels = {labels.data(), static_cast<index>(labels.size())};
  }

  template <class Scorer, class Params>
  void step(const Scorer& scorer, Params& params) {
    const workspace<cpu>::scope scope(ctx.memory);
    const auto saved =
        scorer.template forward<float, cpu>(ctx, params, x, logits.view(), mode::training, batch);
    scorer.template backward<float, cpu>(ctx, params, saved, x, dlogits, dx.view(),
                                         grad_mode::overwrite);
  }

  context<cpu> ctx;
  generator random;
  matrix<float, cpu> x;        // [N, D]
  matrix<float, cpu> dlogits;  // [N, E]
  matrix<float, cpu> beside;   // [S L, C]
  std::vector<std::int32_t> labels = std::vector<std::int32_t>(tokens / sequence_length);
  matrix<float, cpu> logits;  // [N, E]
  matrix<float, cpu> dx;      // [N, D]
  batch_info<float, cpu> batch;
};

template <class Scorer>
void add(const std::string& name, Scorer scorer, index rows = 1, index columns = task_width) {
  for (const index experts : {8, 64}) {
    const std::string full = "scorers/" + name + "/step/N:" + std::to_string(tokens) +
                             "/D:" + std::to_string(width) + "/E:" + std::to_string(experts) +
                             "/f32/cpu";
    benchmark::RegisterBenchmark(full.c_str(), [=](benchmark::State& state) {
      workload work(experts, rows, columns);
      auto params = scorer.template init<float, cpu>(width, experts, work.random, "");
      const linear_scorer other;
      auto other_params = other.init<float, cpu>(width, experts, work.random, "");
      bench::time_beside(
          state, tokens, [&] { work.step(scorer, params); }, "linear_scorer",
          [&] { work.step(other, other_params); });
    })->UseManualTime();
  }
}

void add_all() {
  add("linear_scorer", linear_scorer{});
  add("mlp_scorer", mlp_scorer<>{});
  add("cosine_scorer", cosine_scorer{});
  add("cluster_scorer", cluster_scorer{});
  add("glu_scorer", glu_scorer{});
  add("lora_scorer", lora_scorer<linear_scorer>{});
  add("noisy_linear", noisy<linear_scorer>{});
  add("jittered_linear", jittered<linear_scorer>{});
  add("mixture_of_routers", mixture_of_routers<mix::probability, linear_scorer>{});
  add("task_mixture", task_mixture<linear_scorer, linear_scorer>{.width = task_width});
  add("cross_attention_scorer", cross_attention_scorer{}, 16, width);
}

const int registered = (add_all(), 0);

}  // namespace
