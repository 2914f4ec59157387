// SPDX-License-Identifier: Apache-2.0
//
// A mixture of LoRA experts over a frozen linear map as it is written with PyTorch, beside talpa's:
//   loop          for each expert its tokens gathered, two products, index_add (public MoLE code)
//   dense         for each expert all tokens, weighed by its column of the gates
//   concatenated  the ranks of all experts at once, masked by the gates
//   sorted_bmm    tokens sorted by expert and padded to the fullest one, batched products
// Each iteration times PyTorch's linear map alone, its layer, talpa's packed linear map alone and
// its layer (strategy automatic), one after the other. `vs_torch` is talpa's layer over PyTorch's,
// `adapter_vs_torch` the same without the linear map; `overhead_pct` and `torch_overhead_pct` are
// what each layer takes above its own linear map. Time is that of the processor on one thread, that
// which passes on two. A step is forward and backward for x, router and experts.
#include "beside.hpp"
#include "peers/torch.hpp"

#include <string>
#include <vector>

namespace {

using namespace talpa;
using talpa::index;

constexpr index experts = 8, chosen = 2, rank = 8;  // E, K, R

struct torch_mole {
  torch::Tensor base;    // [O, D]
  torch::Tensor router;  // [E, D]
  torch::Tensor a;       // [E, R, D]
  torch::Tensor b;       // [E, R, O]
  float scale = 0.0f;

  struct routes {
    torch::Tensor gates, experts;  // [N, K]
  };
  routes route(const torch::Tensor& x) const {
    auto [top, which] = torch::topk(torch::softmax(torch::linear(x, router), 1), chosen, 1);
    return {top / top.sum(1, true), which};
  }
  torch::Tensor all_gates(const routes& r, index tokens) const {  // [N, E]
    return torch::zeros({tokens, experts}).scatter(1, r.experts, r.gates);
  }
  torch::Tensor linear(const torch::Tensor& x) const { return torch::linear(x, base); }

  torch::Tensor loop(const torch::Tensor& x) const {
    const routes r = route(x);
    torch::Tensor y = linear(x);
    for (index e = 0; e < experts; ++e) {
      const std::vector<torch::Tensor> at = torch::where(r.experts == e);
      if (at[0].numel() == 0) continue;
      const torch::Tensor out =
          torch::matmul(torch::matmul(x.index_select(0, at[0]), a[e].t()), b[e]);
      const torch::Tensor g = r.gates.index({at[0], at[1]}).unsqueeze(1);
      y = y.index_add(0, at[0], out * g * scale);
    }
    return y;
  }
  torch::Tensor dense(const torch::Tensor& x) const {
    const torch::Tensor gates = all_gates(route(x), x.size(0));
    torch::Tensor y = linear(x);
    for (index e = 0; e < experts; ++e) {
      const torch::Tensor u = torch::matmul(x, a[e].t());
      y = y + torch::matmul(u * (gates.select(1, e).unsqueeze(1) * scale), b[e]);
    }
    return y;
  }
  torch::Tensor concatenated(const torch::Tensor& x) const {
    const torch::Tensor gates = all_gates(route(x), x.size(0)) * scale;
    const torch::Tensor u = torch::matmul(x, a.flatten(0, 1).t());
    const torch::Tensor z = (u.view({-1, experts, rank}) * gates.unsqueeze(2)).flatten(1);
    return torch::addmm(linear(x), z, b.flatten(0, 1));
  }
  torch::Tensor sorted_bmm(const torch::Tensor& x) const {
    const routes r = route(x);
    const torch::Tensor of_slot = r.experts.flatten();
    const torch::Tensor order = torch::argsort(of_slot);
    const torch::Tensor sorted = of_slot.index_select(0, order);
    const torch::Tensor counts = torch::bincount(of_slot, {}, experts);
    const index capacity = counts.max().item<std::int64_t>();
    const torch::Tensor first = torch::cumsum(counts, 0) - counts;
    const torch::Tensor place = torch::arange(sorted.numel()) - first.index_select(0, sorted) +
                                sorted * capacity;  // of a sorted slot among E capacity rows
    const torch::Tensor token = torch::div(order, chosen, "floor");
    const torch::Tensor rows = torch::zeros({experts * capacity, x.size(1)})
                                   .index_copy(0, place, x.index_select(0, token));
    const torch::Tensor u = torch::bmm(rows.view({experts, capacity, -1}), a.transpose(1, 2));
    const torch::Tensor out = torch::bmm(u, b).flatten(0, 1).index_select(0, place);
    const torch::Tensor g = r.gates.flatten().index_select(0, order).unsqueeze(1);
    return linear(x).index_add(0, token, out * g * scale);
  }
};

using form = torch::Tensor (torch_mole::*)(const torch::Tensor&) const;

struct sizes {
  index tokens, width;  // N, D = O
  int threads;
  bool step;
};

void run(benchmark::State& state, form torch_form, const sizes& s) {
  const bench::torch_threads torch_threads(s.threads);
  context<cpu> ctx(s.threads);
  generator random(1);
  const mole_linear<router<linear_scorer, top_k<gate::renormalised>>, lora> layer{
      .router = {.selector = {.k = chosen}}, .expert = {.rank = rank}, .experts = experts};
  auto base = linear{.bias = false}.init<float, cpu>(s.width, s.width, random, "base.");
  base.freeze();
  auto params = layer.init<float, cpu>(std::move(base), random);
  fill_normal(params.expert.b.value(), 0.1, random);
  const auto x = bench::normal_matrix(s.tokens, s.width, 1.0, random);   // [N, D]
  const auto dy = bench::normal_matrix(s.tokens, s.width, 1.0, random);  // [N, O]
  matrix<float, cpu> y(s.tokens, s.width), dx(s.tokens, s.width);

  torch_mole peer;
  peer.base = bench::to_torch(params.base.weight.value());
  peer.router = bench::to_torch(params.router.scorer.weight.value());
  peer.a = bench::to_torch(params.expert.a.value()).view({experts, rank, s.width});
  peer.b = bench::to_torch(params.expert.b.value()).view({experts, rank, s.width});
  peer.scale = static_cast<float>(layer.expert.scale());
  torch::Tensor torch_x = bench::to_torch(x.view()), torch_y;
  const torch::Tensor torch_dy = bench::to_torch(dy.view());
  for (torch::Tensor* t : {&torch_x, &peer.router, &peer.a, &peer.b}) t->requires_grad_(s.step);
  params.base.pack(ctx, s.step ? packing::both : packing::forward);

  const auto torch_pass = [&](form of) {
    torch_y = (peer.*of)(torch_x);
    if (!s.step) return;
    torch_y.backward(torch_dy);
    for (torch::Tensor* t : {&torch_x, &peer.router, &peer.a, &peer.b}) t->mutable_grad().reset();
  };
  const auto linear_pass = [&] {
    affine_forward<cpu, float>(ctx, params.base, x, y);
    if (s.step) affine_backward<cpu, float>(ctx, params.base, x, dy, dx, grad_mode::overwrite);
  };
  const auto layer_pass = [&] {
    const workspace<cpu>::scope scope(ctx.memory);
    const auto saved = layer.forward(ctx, params, x, y, mode::training);
    if (s.step) layer.backward(ctx, params, saved, x, dy, dx, grad_mode::overwrite);
  };
  linear_pass();
  layer_pass();
  torch_pass(&torch_mole::linear);
  torch_pass(torch_form);
  const double difference = (torch_y.detach() - bench::to_torch(y.view())).norm().item<double>() /
                            torch_y.norm().item<double>();
  if (!(difference < 1e-4)) {
    state.SkipWithError("PyTorch comes to another result");
    return;
  }

  const auto time_of = [&](const auto& pass) { return bench::seconds_on(s.threads, pass); };
  std::vector<double> times, to_torch, adapter_to_torch, overhead, torch_overhead;
  for (auto _ : state) {
    const double torch_base = time_of([&] { torch_pass(&torch_mole::linear); });
    const double torch_all = time_of([&] { torch_pass(torch_form); });
    torch_threads.rest();
    const double our_base = time_of(linear_pass), our_all = time_of(layer_pass);
    times.push_back(our_all);
    to_torch.push_back(our_all / torch_all);
    adapter_to_torch.push_back((our_all - our_base) / (torch_all - torch_base));
    overhead.push_back(100.0 * (our_all / our_base - 1.0));
    torch_overhead.push_back(100.0 * (torch_all / torch_base - 1.0));
    state.SetIterationTime(our_all);
  }
  state.counters["ns/token"] = 1e9 * bench::median(times) / static_cast<double>(s.tokens);
  bench::enter_ratio(state, "vs_torch", to_torch);
  state.counters["adapter_vs_torch"] = bench::median(adapter_to_torch);
  state.counters["overhead_pct"] = bench::median(overhead);
  state.counters["torch_overhead_pct"] = bench::median(torch_overhead);
  torch_threads.enter(state);
}

const int registered = [] {
  struct named {
    const char* name;
    form of;
  };
  for (const int threads : {1, 2}) {
    for (const bool step : {false, true}) {
      for (const auto& [tokens, width] :
           {std::pair<index, index>{64, 768}, {512, 768}, {512, 2048}, {512, 4096}}) {
        for (const named& f : {named{"loop", &torch_mole::loop},
                               {"dense", &torch_mole::dense},
                               {"concatenated", &torch_mole::concatenated},
                               {"sorted_bmm", &torch_mole::sorted_bmm}}) {
          const std::string name =
              std::string("torch/mole_linear/") + (step ? "step/" : "forward/") + f.name +
              "/N:" + std::to_string(tokens) + "/D:" + std::to_string(width) + "/E:8/R:8/K:2" +
              "/threads:" + std::to_string(threads) + "/f32/cpu";
          const sizes s{tokens, width, threads, step};
          benchmark::RegisterBenchmark(
              name.c_str(), [of = f.of, s](benchmark::State& state) { run(state, of, s); })
              ->UseManualTime()
              ->Unit(benchmark::kMillisecond);
        }
      }
    }
  }
  return 0;
}();

}  // namespace
