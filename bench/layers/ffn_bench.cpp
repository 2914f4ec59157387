// SPDX-License-Identifier: Apache-2.0
//
// Feed-forward layers, forward and a whole step, on one thread, each beside what it is built round:
// `moe_ffn` beside a loop over experts as one writes it with Eigen, router included (`vs_loop`);
// `mole_ffn` beside the products of its dense network (`vs_products`); `perft_block` beside its
// base alone (`vs_base`); `parrot_block` beside its experts with slots and gates at hand
// (`vs_experts`). With `skew` every router gives its experts mean logits of their own, normal with
// that deviation. `active` is the mean number of experts a token uses, or of adapters where they
// have a router of their own, `entropy` the mean of its softmax in nats, `violation` that of the
// load.
#include "beside.hpp"
#include "token_kinds.hpp"

#include <talpa/talpa.hpp>

#include <Eigen/Core>
#include <benchmark/benchmark.h>

#include <cmath>
#include <cstddef>
#include <iterator>
#include <string>
#include <utility>
#include <vector>

namespace {

using namespace talpa;
using talpa::index;

constexpr index tokens = 512, width = 256, hidden = 256, experts = 8, chosen = 2, rank = 8;
constexpr index languages = 6, sequence = 64, text_rows = 16;  // of parrot_block

using routes = router<linear_scorer, top_k<gate::renormalised>>;
using eigen_matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using eigen_view = Eigen::Map<const eigen_matrix>;

eigen_view as_eigen(matrix_view<const float, cpu> m) { return {m.data, m.rows, m.cols}; }
/// The rows of one expert.
eigen_view block(const eigen_view& bank, index e) {
  return {bank.data() + e * hidden * width, hidden, width};
}

struct workload {
  explicit workload(const bench::token_kind& kind_) : kind(kind_) {}

  bench::token_kind kind;
  context<cpu> ctx{1};
  generator random{1};
  matrix<float, cpu> x = bench::tokens_of_kind(tokens, width, kind, random);  // [N, D]
  matrix<float, cpu> dy = bench::normal_matrix(tokens, width, 1.0, random);   // [N, D]
  matrix<float, cpu> y{tokens, width}, dx{tokens, width};

  template <class Layer, class Params>
  void pass(const Layer& layer, Params& params, bool step,
            const batch_info<float, cpu>& batch = {}) {
    const workspace<cpu>::scope scope(ctx.memory);
    const auto kept = layer.forward(ctx, params, x, y.view(), mode::training, batch);
    if (step) layer.backward(ctx, params, kept, x, dy, dx.view(), grad_mode::overwrite);
  }

  template <class Router>
  void skew(Router& router, index of) {
    if (kind.skew == 0) return;
    bench::add_mean_logits(router.scorer, bench::mean_logits(of, kind, random));
  }
  /// Enters what statistics say of the load.
  template <class Layer, class Params>
  void enter_load(benchmark::State& state, const Layer& layer, const Params& params) {
    const workspace<cpu>::scope scope(ctx.memory);
    const auto kept = layer.forward(ctx, params, x, y.view(), mode::training, {});
    const statistics_report report(measure(ctx, bench::routing_of(kept)));
    state.counters["active"] = report.active_experts();
    state.counters["entropy"] = report.mean_entropy();
    state.counters["violation"] = report.max_violation();
  }
};

/// moe_ffn of SwiGLU experts and two of them a token, expert by expert.
class expert_loop {
 public:
  explicit expert_loop(const moe_ffn<routes>::params<float, cpu>& p)
      : router_(as_eigen(p.router.scorer.weight.value())),
        gate_(as_eigen(p.expert.gate.value())),
        up_(as_eigen(p.expert.up.value())),
        down_(as_eigen(p.expert.down.value())),
        of_(experts) {
    drouter_.setZero(experts, width);
    for (eigen_matrix* d : {&dgate_, &dup_, &ddown_}) d->setZero(experts * hidden, width);
  }

  void forward(matrix_view<const float, cpu> input) {
    const auto x = as_eigen(input);
    route(x);
    y_.setZero(x.rows(), width);
    for (index e = 0; e < experts; ++e) {
      expert& o = of_[static_cast<std::size_t>(e)];
      const auto n = std::ssize(o.slots);
      o.x.resize(n, width);
      for (index s = 0; s < n; ++s) o.x.row(s) = x.row(o.slots[static_cast<std::size_t>(s)].token);
      o.a.noalias() = o.x * block(gate_, e).transpose();
      o.b.noalias() = o.x * block(up_, e).transpose();
      o.h = o.a.array() / (1.0f + (-o.a.array()).exp()) * o.b.array();
      o.y.noalias() = o.h * block(down_, e);
      for (index s = 0; s < n; ++s) {
        const slot& at = o.slots[static_cast<std::size_t>(s)];
        y_.row(at.token) += at.gate * o.y.row(s);
      }
    }
  }

  void backward(matrix_view<const float, cpu> input, matrix_view<const float, cpu> output) {
    const auto x = as_eigen(input), dy = as_eigen(output);
    dx_.setZero(x.rows(), width);
    dgates_.setZero(x.rows(), experts);
    for (index e = 0; e < experts; ++e) {
      expert& o = of_[static_cast<std::size_t>(e)];
      const auto n = std::ssize(o.slots);
      o.dy.resize(n, width);
      for (index s = 0; s < n; ++s) {
        const slot& at = o.slots[static_cast<std::size_t>(s)];
        dgates_(at.token, e) = dy.row(at.token).dot(o.y.row(s));
        o.dy.row(s) = at.gate * dy.row(at.token);
      }
      ddown_.middleRows(e * hidden, hidden).noalias() += o.h.transpose() * o.dy;
      o.h.noalias() = o.dy * block(down_, e).transpose();
      o.sigmoid = 1.0f / (1.0f + (-o.a.array()).exp());
      o.db = o.h.array() * o.a.array() * o.sigmoid.array();
      o.a = o.h.array() * o.b.array() * o.sigmoid.array() *
            (1.0f + o.a.array() * (1.0f - o.sigmoid.array()));
      dgate_.middleRows(e * hidden, hidden).noalias() += o.a.transpose() * o.x;
      dup_.middleRows(e * hidden, hidden).noalias() += o.db.transpose() * o.x;
      o.x.noalias() = o.a * block(gate_, e);
      o.x.noalias() += o.db * block(up_, e);
      for (index s = 0; s < n; ++s) {
        dx_.row(o.slots[static_cast<std::size_t>(s)].token) += o.x.row(s);
      }
    }
    // Gates are a softmax over the chosen logits and 0 elsewhere.
    for (index n = 0; n < x.rows(); ++n) {
      const float mean = gates_.row(n).dot(dgates_.row(n));
      dgates_.row(n) = gates_.row(n).array() * (dgates_.row(n).array() - mean);
    }
    drouter_.noalias() += dgates_.transpose() * x;
    dx_.noalias() += dgates_ * router_;
  }

  const eigen_matrix& y() const { return y_; }
  const eigen_matrix& dx() const { return dx_; }

 private:
  struct slot {
    index token;
    float gate;
  };
  struct expert {
    std::vector<slot> slots;
    eigen_matrix x, a, b, h, y, dy, db, sigmoid;
  };

  void route(const eigen_view& x) {
    for (expert& o : of_) o.slots.clear();
    logits_.noalias() = x * router_.transpose();
    gates_.setZero(x.rows(), experts);
    for (index n = 0; n < x.rows(); ++n) {
      index first = 0, second = -1;
      logits_.row(n).maxCoeff(&first);
      for (index e = 0; e < experts; ++e) {
        if (e != first && (second < 0 || logits_(n, e) > logits_(n, second))) second = e;
      }
      gates_(n, first) = 1.0f / (1.0f + std::exp(logits_(n, second) - logits_(n, first)));
      gates_(n, second) = 1.0f - gates_(n, first);
      for (const index e : {first, second}) {
        of_[static_cast<std::size_t>(e)].slots.push_back({n, gates_(n, e)});
      }
    }
  }

  eigen_view router_, gate_, up_, down_;           // [E, D], [E H, D]
  eigen_matrix drouter_, dgate_, dup_, ddown_;     // of the same shapes
  eigen_matrix logits_, gates_, dgates_, y_, dx_;  // [N, E], [N, D]
  std::vector<expert> of_;
};

/// Registers forward and step of a layer; `run(state, step, kind)` times it.
template <class Run>
void add(const std::string& layer, const std::string& sizes, const bench::token_kind& kind,
         Run run) {
  for (const bool step : {false, true}) {
    const std::string name = "layers/" + layer + (step ? "/step" : "/forward") +
                             "/N:" + std::to_string(tokens) + "/D:" + std::to_string(width) +
                             "/H:" + std::to_string(hidden) + sizes +
                             (kind.skew != 0 ? bench::kind_name(kind) : std::string()) + "/f32/cpu";
    benchmark::RegisterBenchmark(name.c_str(), [=](benchmark::State& state) {
      run(state, step, kind);
    })->UseManualTime();
  }
}
/// The same for tokens of which experts are wanted alike, and by skewed routers.
template <class Run>
void add_routed(const std::string& layer, const std::string& sizes, Run run) {
  add(layer, sizes, bench::even_tokens, run);
  add(layer, sizes, bench::skewed_tokens, run);
}

constexpr moe_ffn<routes> mixture_of_experts{
    .router = {.selector = {.k = chosen}}, .expert = {.hidden = hidden}, .experts = experts};

bool close(const eigen_matrix& plain, const matrix<float, cpu>& ours) {
  return (plain - as_eigen(ours.view())).cwiseAbs().maxCoeff() <
         1e-4f * plain.cwiseAbs().maxCoeff();
}

void run_moe(benchmark::State& state, bool step, const bench::token_kind& kind) {
  workload work(kind);
  auto params = mixture_of_experts.init<float, cpu>(width, work.random);
  work.skew(params.router, experts);
  expert_loop loop(params);
  const auto plain = [&] {
    loop.forward(work.x.view());
    if (step) loop.backward(work.x.view(), work.dy.view());
  };
  const auto pass = [&] { work.pass(mixture_of_experts, params, step); };
  pass();
  plain();
  if (!close(loop.y(), work.y) || (step && !close(loop.dx(), work.dx))) {
    return state.SkipWithError("the loop comes to another result");
  }
  bench::time_beside(state, tokens, pass, "loop", plain);
  work.enter_load(state, mixture_of_experts, params);
}

void run_mole(benchmark::State& state, bool step, const bench::token_kind& kind) {
  workload work(kind);
  const mole_ffn<routes> layer{
      .router = {.selector = {.k = chosen}}, .expert = {.rank = rank}, .experts = experts};
  auto base = swiglu{.hidden = hidden}.init<float, cpu>(width, width, 1, work.random, "base.");
  base.freeze();
  auto params = layer.init<float, cpu>(std::move(base), work.random);
  work.skew(params.router, experts);
  matrix<float, cpu> a(tokens, hidden), b(tokens, hidden);
  const auto products = [&] {
    const auto multiply = [&](const matrix<float, cpu>& in, const parameter<float, cpu>& weight,
                              transpose how, float keep, matrix<float, cpu>& out) {
      ops::gemm(work.ctx, in.view(), transpose::no, weight.value(), how, keep, out.view());
    };
    multiply(work.x, params.base.gate, transpose::yes, 0.0f, a);
    multiply(work.x, params.base.up, transpose::yes, 0.0f, b);
    multiply(a, params.base.down, transpose::no, 0.0f, work.y);
    if (!step) return;
    multiply(work.dy, params.base.down, transpose::yes, 0.0f, a);
    multiply(a, params.base.gate, transpose::no, 0.0f, work.dx);
    multiply(b, params.base.up, transpose::no, 1.0f, work.dx);
  };
  bench::time_beside(
      state, tokens, [&] { work.pass(layer, params, step); }, "products", products);
  work.enter_load(state, layer, params);
}

template <class Placement>
void add_perft(const std::string& name, const Placement& placement, index adapters) {
  add_routed("perft_block_" + name,
             "/E:" + std::to_string(experts) + "/K:" + std::to_string(chosen) +
                 "/M:" + std::to_string(adapters) + "/R:" + std::to_string(rank),
             [=](benchmark::State& state, bool step, const bench::token_kind& kind) {
               workload work(kind);
               const perft_block<moe_ffn<routes>, Placement, lora> block{.base = mixture_of_experts,
                                                                         .placement = placement,
                                                                         .adapter = {.rank = rank},
                                                                         .adapters = adapters};
               auto base = mixture_of_experts.init<float, cpu>(width, work.random);
               work.skew(base.router, experts);
               base.freeze();
               auto params = block.template init<float, cpu>(std::move(base), work.random);
               if constexpr (requires { params.placement.router; }) {
                 work.skew(params.placement.router, adapters);
               }
               bench::time_beside(
                   state, tokens, [&] { work.pass(block, params, step); }, "base",
                   [&] { work.pass(block.base, params.base, step); });
               work.enter_load(state, block, params);
             });
}

void run_parrot(benchmark::State& state, bool step, const bench::token_kind& kind) {
  workload work(kind);
  parrot_block layer = presets::parrot;
  layer.expert.hidden = hidden;
  auto params = layer.init<float, cpu>(width, work.random);
  const auto text = bench::normal_matrix(tokens / sequence * text_rows, width, 1.0, work.random);
  const batch_info<float, cpu> batch{.sequence_length = sequence,
                                     .conditioning = {.rows = text.view()}};
  const auto kept = layer.forward(work.ctx, params, work.x, work.y.view(), mode::training, batch);
  const auto sorted = sort_slots(work.ctx, kept.applied, languages);
  const index slots = tokens * languages;
  matrix<float, cpu> x(slots, width), dy(slots, width), y(slots, width), dx(slots, width);
  vector<float, cpu> dgates(slots);
  ops::gather(work.ctx, sorted.slots, work.x.view(), x.view());
  ops::gather(work.ctx, sorted.slots, work.dy.view(), dy.view());
  const auto bare_experts = [&] {
    const workspace<cpu>::scope scope(work.ctx.memory);
    const auto saved = layer.expert.forward_grouped(work.ctx, params.expert, sorted.slots,
                                                    sorted.gates, x, y.view());
    if (!step) return;
    layer.expert.backward_grouped(work.ctx, params.expert, saved, sorted.slots, sorted.gates, x, dy,
                                  dgates.view(), dx.view(), grad_mode::overwrite);
  };
  bench::time_beside(
      state, tokens, [&] { work.pass(layer, params, step, batch); }, "experts", bare_experts);
}

void add_all() {
  const std::string of_experts = "/E:" + std::to_string(experts) + "/K:" + std::to_string(chosen);
  add_routed("moe_ffn", of_experts, run_moe);
  add_routed("mole_ffn", of_experts + "/R:" + std::to_string(rank), run_mole);
  const routes own{.selector = {.k = chosen}};
  add_perft("single", placement::single{}, 1);
  add_perft("dense", placement::dense{}, 4);
  add_perft("routed", placement::routed<routes>{own}, 4);
  add_perft("base_weighted", placement::base_weighted<routes>{own}, 4);
  add_perft("embedded", placement::embedded{}, experts);
  add("parrot_block", "/E:" + std::to_string(languages), bench::even_tokens, run_parrot);
}

const int registered = (add_all(), 0);

}  // namespace
