// SPDX-License-Identifier: Apache-2.0
//
// Losses of one layer, forward and backward, on one thread, beside load_balance as MoLA has it.
#include "beside.hpp"

#include <talpa/talpa.hpp>

#include <benchmark/benchmark.h>

#include <cmath>
#include <concepts>
#include <cstdint>
#include <string>
#include <vector>

namespace {

using namespace talpa;
using talpa::index;

constexpr index tokens = 4096, sequence_length = 512;

/// A layer that has been routed by top-2.
struct workload {
  explicit workload(index experts)
      : ctx(1),
        random(1),
        logits(bench::normal_matrix(tokens, experts, 1.0, random)),
        control(bench::normal_matrix(tokens, 1, 1.0, random)),
        clean(bench::normal_matrix(tokens, experts, 1.0, random)),
        deviation(bench::normal_matrix(tokens, experts, 1.0, random)),
        labels(tokens / sequence_length),
        chosen(tokens, experts),
        dlogits(tokens, experts),
        dgates(tokens, experts),
        dcontrol(tokens, 1),
        dclean(tokens, experts),
        ddeviation(tokens, experts),
        dvalue(1, 1) {
    dvalue(0, 0) = 1.0f;
    for (index i = 0; i < deviation.size(); ++i) {
      deviation.data()[i] = 0.1f + std::abs(deviation.data()[i]);
    }
    for (std::size_t s = 0; s < labels.size(); ++s) labels[s] = static_cast<std::int32_t>(s % 2);
    ops::select(ctx, top_k<gate::renormalised>{.k = 2}, logits, {}, chosen.gates.view(),
                chosen.mask.view());
  }

  /// `noise`: as behind a scorer that adds noise.
  template <class Loss>
  void step(const Loss& loss, bool noise) {
    const workspace<cpu>::scope scope(ctx.memory);
    routed_view<float, cpu> layer{logits.view(), chosen.view()};
    layer.sequence_length = sequence_length;
    layer.control = control.view();
    layer.labels = {labels.data(), static_cast<index>(labels.size())};
    routed_gradient<float, cpu> gradient{dlogits.view(), dgates.view(), dcontrol.view()};
    if (noise) {
      layer.noise = {clean.view(), deviation.view()};
      gradient.dnoise = {dclean.view(), ddeviation.view()};
    }
    const auto kept = loss.forward(ctx, layer);
    benchmark::DoNotOptimize(kept.value(0, 0));
    loss.backward(ctx, layer, kept, dvalue, gradient, grad_mode::overwrite);
  }

  context<cpu> ctx;
  generator random;
  matrix<float, cpu> logits;            // [N, E]
  matrix<float, cpu> control;           // [N, 1]
  matrix<float, cpu> clean, deviation;  // [N, E]
  std::vector<std::int32_t> labels;
  routing<float, cpu> chosen;
  matrix<float, cpu> dlogits, dgates;     // [N, E]
  matrix<float, cpu> dcontrol;            // [N, 1]
  matrix<float, cpu> dclean, ddeviation;  // [N, E]
  matrix<float, cpu> dvalue;              // [1, 1]
};

template <class Loss>
void add(const std::string& name, Loss loss) {
  for (const index experts : {8, 64}) {
    const std::string full = "losses/" + name + "/step/N:" + std::to_string(tokens) +
                             "/E:" + std::to_string(experts) + "/f32/cpu";
    benchmark::RegisterBenchmark(full.c_str(), [=](benchmark::State& state) {
      workload work(experts);
      const load_balance<balance::per_selection, balance::per_layer> other;
      bench::time_beside(
          state, tokens, [&] { work.step(loss, std::same_as<Loss, load_cv2>); }, "load_balance",
          [&] { work.step(other, false); });
    })->UseManualTime();
  }
}

void add_all() {
  using balance::per_layer, balance::per_sequence, balance::per_selection, balance::per_target;
  add("load_balance", load_balance<per_selection, per_layer>{});
  add("load_balance_by_sequence", load_balance<per_selection, per_sequence>{});
  add("load_balance_soft_mass", load_balance<balance::soft_mass, per_layer>{});
  add("load_balance_of_gates", load_balance<per_target, per_layer, affinity::gates>{});
  add("load_balance_of_sigmoids", load_balance<per_selection, per_sequence, affinity::sigmoid>{});
  add("load_balance_of_margins", load_balance<per_selection, per_layer, affinity::margin>{});
  add("importance_cv2", importance_cv2{});
  add("load_cv2", load_cv2{});
  add("localized_balance", localized_balance{});
  add("router_z", router_z{});
  add("entropy_shannon", entropy_loss<entropy::shannon>{});
  add("entropy_tsallis", entropy_loss<entropy::tsallis>{});
  add("entropy_renyi", entropy_loss<entropy::renyi>{});
  add("gjs", gjs{});
  add("top_k_mass", top_k_mass{});
  add("lambda_mean", lambda_mean{});
  add("lambda_sparsity", lambda_sparsity{});
}

const int registered = (add_all(), 0);

}  // namespace
