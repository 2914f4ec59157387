// SPDX-License-Identifier: Apache-2.0
//
// Routing as it is written with PyTorch, beside talpa's, on one thread of processor time: softmax,
// topk, gates that sum to one, and the slots in the order of their experts. `vs_torch` is
// talpa's time over that of PyTorch; no statistics on either side.
#include "beside.hpp"
#include "peers/torch.hpp"
#include "selectors/route.hpp"

namespace {

using namespace talpa;
using talpa::index;

void run(benchmark::State& state, index tokens, index experts, index k) {
  const bench::torch_threads threads(1);
  bench::routing_bench bench(tokens, experts, k, 0.0, true);
  const top_k<gate::renormalised> selector{.k = k};
  const torch::Tensor logits = bench::to_torch(bench.logits.view());
  torch::Tensor gates, experts_of, order;
  const auto ours = [&] {
    bench.choose(selector);
    bench.sort();
  };
  const auto theirs = [&] {
    const torch::NoGradGuard inference;
    const torch::Tensor p = torch::softmax(logits, 1);
    std::tie(gates, experts_of) = torch::topk(p, k, 1);
    gates /= gates.sum(1, true);
    order = torch::argsort(experts_of.flatten());
  };
  ours();
  theirs();
  // The same experts and gates, as far as the sums of gates by expert tell.
  const torch::Tensor sums =
      torch::zeros({experts}).index_add_(0, experts_of.flatten(), gates.flatten());
  for (index e = 0; e < experts; ++e) {
    double sum = 0.0;
    for (index n = 0; n < tokens; ++n) sum += static_cast<double>(bench.chosen.gates(n, e));
    if (std::abs(sum - static_cast<double>(sums[e].item<float>())) > 1e-3 * (1.0 + sum)) {
      state.SkipWithError("PyTorch routes differently");
      return;
    }
  }
  bench::time_beside(state, tokens, ours, "torch", theirs);
  threads.enter(state);
}

const int registered = [] {
  for (const auto& [experts, k] : {std::pair<index, index>{8, 1},
                                   {8, 2},
                                   {8, 8},
                                   {16, 2},
                                   {16, 8},
                                   {64, 1},
                                   {64, 2},
                                   {64, 8},
                                   {128, 2},
                                   {128, 8}}) {
    const std::string name = bench::route_name("torch/routing", 4096, experts, k, 0.0);
    benchmark::RegisterBenchmark(name.c_str(), [experts = experts, k = k](benchmark::State& state) {
      run(state, 4096, experts, k);
    })->UseManualTime();
  }
  return 0;
}();

}  // namespace
