// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "digits.hpp"
#include "evaluation.hpp"
#include "figures.hpp"
#include "network.hpp"
#include "options.hpp"
#include "progress.hpp"
#include "report_data.hpp"
#include "run_log.hpp"
#include "tasks.hpp"
#include "text.hpp"
#include "training.hpp"

#include <talpa/losses/entropy.hpp>
#include <talpa/losses/losses.hpp>
#include <talpa/scorers/mixture_of_routers.hpp>
#include <talpa/scorers/mlp_scorer.hpp>
#include <talpa/selectors/broadcast.hpp>
#include <talpa/selectors/dynamic_entropy.hpp>
#include <talpa/selectors/sparsegen.hpp>
#include <talpa/selectors/top_p.hpp>
#include <talpa/talpa.hpp>

#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

// The methods and what a run does with each, on whatever backend.

namespace talpa::examples {

inline constexpr double held_out_fraction = 1.0 / 3.0;
inline constexpr index mixture_experts = 8;
// One epoch of pretraining asks one instruction, one of adaptation eight.
inline constexpr double pretrain_epoch_work = 1.0 / static_cast<double>(task_count);

/// Scale alpha / r = 2 for every method and rank.
inline lora adapter_of_rank(index rank) {
  return {.rank = rank, .alpha = 2.0 * static_cast<double>(rank)};
}

/// Everything a run writes to, and where its networks are.
template <backend B>
struct experiment {
  const options& settings;
  const digits& data;
  context<B>& ctx;
  run_log& log;
  progress& shown;
  report_data& report;
  double work_done = 0;  // in epochs of adaptation
  double work_in_all = 0;

  void advance(double work, const std::string& what) {
    work_done += work;
    shown.update(work_done / work_in_all, what);
  }
};

/// One of the seeds, with what all its methods share.
template <backend B>
struct seeded {
  std::uint64_t seed = 0;
  data_split split;
  network<linear, B> base;
};

/// The entry of a method in the report, made when its first seed runs.
inline method_result& entry_of(report_data& report, const std::string& name,
                               const std::string& label, method_family family, index rank) {
  const auto found = std::find_if(report.methods.begin(), report.methods.end(),
                                  [&](const method_result& m) { return m.name == name; });
  if (found != report.methods.end()) return *found;
  method_result made;
  made.name = name;
  made.label = label;
  made.family = family;
  made.rank = rank;
  report.methods.push_back(std::move(made));
  return report.methods.back();
}

inline run_log::object accuracies(const task_scores& scores) {
  run_log::object by_task;
  for (std::size_t t = 0; t < tasks.size(); ++t) by_task[tasks[t].name] = scores.accuracy[t];
  return by_task;
}

inline void log_result(run_log& log, const method_result& m, const method_run& run) {
  run_log::object routing = run_log::object::array();
  for (const layer_routing& layer : run.layers) {
    std::vector<double> share;
    for (index e = 0; e < layer.experts; ++e) share.push_back(layer.share(e));
    routing.push_back({{"layer", layer.layer},
                       {"entropy", layer.entropy.back()},
                       {"dead_experts", layer.dead()},
                       {"share", share}});
  }
  log.write({{"event", "result"},
             {"method", m.name},
             {"seed", run.seed},
             {"adapter_parameters", m.adapter_parameters},
             {"router_parameters", m.router_parameters},
             {"active_rank", m.active_rank},
             {"train_seconds", run.train_seconds},
             {"mean_accuracy", run.held_out.mean()},
             {"worst_task", tasks[static_cast<std::size_t>(run.held_out.worst())].name},
             {"accuracy", accuracies(run.held_out)},
             {"routing", routing}});
}

inline std::string label(const std::string& name, std::uint64_t seed, int epoch, int epochs,
                         double loss) {
  return format("%-16s seed %llu epoch %2d/%d loss %s", name.c_str(),
                static_cast<unsigned long long>(seed), epoch, epochs, fixed(loss, 3).c_str());
}

/// Splits, pretrains on the name of the digit, and notes what the base makes of the instructions.
template <backend B>
seeded<B> prepare(experiment<B>& x, std::uint64_t seed) {
  seeded<B> s;
  s.seed = seed;
  s.split = split_digits(x.data, held_out_fraction, seed);
  generator random(seed, 1000);  // the split took the first streams
  s.base = make_base<B>(random);

  const std::string name = "frozen base";
  method_result& m = entry_of(x.report, name, name, method_family::frozen, 0);
  method_run run;
  run.seed = seed;
  const recipe pretraining{.epochs = x.settings.pretrain_epochs,
                           .batch = 32,
                           .learning_rate = 3e-3,
                           .weight_decay = 1e-2};
  train(x.ctx, s.base, x.data, examples_of(s.split.train, name_task), pretraining, random,
        no_loss{}, [&](int epoch, const epoch_result& result) {
          run.train_seconds += result.seconds;
          run.train_loss.push_back(result.loss);
          x.log.write({{"event", "pretrain_epoch"},
                       {"seed", seed},
                       {"epoch", epoch},
                       {"train_loss", result.loss},
                       {"seconds", result.seconds}});
          x.advance(pretrain_epoch_work,
                    label("pretraining", seed, epoch, pretraining.epochs, result.loss));
        });
  run.held_out = evaluate_network(x.ctx, s.base, x.data, s.split.held_out).scores;
  if (m.runs.empty()) {
    s.base.visit([&](const parameter<float, B>& p) { x.report.base_parameters += p.size(); });
    x.report.train_images = std::ssize(s.split.train);
    x.report.held_out_images = std::ssize(s.split.held_out);
  }
  m.runs.push_back(run);
  log_result(x.log, m, run);
  return s;
}

/// One entry of the table of methods: a row of the results for each rank.
template <backend B>
struct method {
  const char* key;  // of --methods
  const char* name;
  method_family family;
  std::vector<index> ranks;                                                  // of an expert
  void (*run)(experiment<B>&, const seeded<B>&, const method&, index rank);  // one rank, one seed
  const char* settings;  // of its router, for the report; empty: nothing to tell
};

/// Adapts the base with one kind of layer and one seed, and adds the run to the report.
/// `on_routers` is the loss on the routers.
template <backend B, class Layer, class Loss>
void run_method(experiment<B>& x, const seeded<B>& s, const method<B>& what, const Layer& layer,
                const Loss& on_routers) {
  const index rank = expert_rank(layer);
  const std::string name = format("%s r = %td", what.name, rank);
  const std::string mark = detail::is_series(what.family) ? format("r = %td", rank) : what.name;
  generator random(s.seed, 2000);
  network<Layer, B> net = adapt(s.base, layer, random);
  method_result& m = entry_of(x.report, name, mark, what.family, rank);
  const trainable_counts count = count_trainable(net);
  m.adapter_parameters = count.adapters;
  m.router_parameters = count.routers;

  method_run run;
  run.seed = s.seed;
  evaluation now = evaluate_network(x.ctx, net, x.data, s.split.held_out);
  run.layers = now.layers;
  const recipe adaptation{.epochs = x.settings.epochs,
                          .batch = x.settings.batch,
                          .learning_rate = x.settings.learning_rate};
  // Streams of their own: every method asks the same questions in the same order.
  generator order(s.seed, 3000);
  train(x.ctx, net, x.data, all_examples(s.split.train), adaptation, order, on_routers,
        [&](int epoch, const epoch_result& result) {
          now = evaluate_network(x.ctx, net, x.data, s.split.held_out);
          run.train_seconds += result.seconds;
          run.train_loss.push_back(result.loss);
          run.held_out_loss.push_back(now.loss);
          run_log::object entropy = run_log::object::array();
          for (std::size_t l = 0; l < now.layers.size(); ++l) {
            run.layers[l].entropy.push_back(now.layers[l].entropy.front());
            entropy.push_back(now.layers[l].entropy.front());
          }
          x.log.write({{"event", "epoch"},
                       {"method", name},
                       {"seed", s.seed},
                       {"epoch", epoch},
                       {"train_loss", result.loss},
                       {"held_out_loss", now.loss},
                       {"held_out_accuracy", now.scores.mean()},
                       {"entropy", entropy},
                       {"seconds", result.seconds}});
          x.advance(1.0, label(name, s.seed, epoch, adaptation.epochs, result.loss));
        });
  run.held_out = now.scores;
  for (std::size_t l = 0; l < now.layers.size(); ++l) run.layers[l].load = now.layers[l].load;
  // Counts and ranks are the same for every seed unless the selector decides how many experts.
  const auto runs = static_cast<double>(m.runs.size());
  m.active_rank = (m.active_rank * runs + now.active_rank) / (runs + 1.0);
  m.runs.push_back(run);
  log_result(x.log, m, run);
}

/// A mixture of `mixture_experts` experts of one rank under a router.
template <class Scorer, class Selector>
mole_linear<router<Scorer, Selector>, lora> mixture(const router<Scorer, Selector>& routing,
                                                    index rank) {
  return {.router = routing, .expert = adapter_of_rank(rank), .experts = mixture_experts};
}

using top_2 = top_k<gate::renormalised>;

template <backend B>
void run_lora(experiment<B>& x, const seeded<B>& s, const method<B>& m, index rank) {
  run_method(x, s, m, lora_linear{.adapter = adapter_of_rank(rank)}, no_loss{});
}

template <backend B>
void run_soft(experiment<B>& x, const seeded<B>& s, const method<B>& m, index rank) {
  run_method(x, s, m, mixture(router<linear_scorer, dense>{}, rank), no_loss{});
}

template <backend B>
void run_mola(experiment<B>& x, const seeded<B>& s, const method<B>& m, index rank) {
  const router<linear_scorer, top_2> routing{.selector = {.k = 2}};
  run_method(x, s, m, mixture(routing, rank), balanced(x.settings.balance));
}

template <backend B>
void run_top_p(experiment<B>& x, const seeded<B>& s, const method<B>& m, index rank) {
  const router<linear_scorer, top_p<gate::raw, crossing::kept>> routing{.selector = {.p = 0.4}};
  const losses on_routers{
      term{x.settings.balance, load_balance<balance::per_selection, balance::per_layer>{}},
      term{1e-4, entropy_loss<entropy::shannon>{.entropy = {.normalised = false}}}};
  run_method(x, s, m, mixture(routing, rank), on_routers);
}

template <backend B>
void run_dyn_mole(experiment<B>& x, const seeded<B>& s, const method<B>& m, index rank) {
  const entropy::tsallis uncertainty{.q = 1.1};
  const router<linear_scorer, dynamic_entropy<entropy::tsallis>> routing{
      .selector = {.p = 0.75, .min_k = 2, .threshold = 0.9, .entropy = uncertainty}};
  const losses on_routers{
      term{x.settings.balance, load_balance<balance::soft_mass, balance::pooled>{}},
      term{1e-2, entropy_loss<entropy::tsallis, balance::pooled>{.entropy = uncertainty}}};
  run_method(x, s, m, mixture(routing, rank), on_routers);
}

template <backend B>
void run_gw_moe(experiment<B>& x, const seeded<B>& s, const method<B>& m, index rank) {
  const router<linear_scorer, broadcast<top_2>> routing{
      .selector = {.inner = {.k = 2}, .threshold = 0.8}};
  run_method(x, s, m, mixture(routing, rank), balanced(x.settings.balance));
}

template <backend B>
void run_mor(experiment<B>& x, const seeded<B>& s, const method<B>& m, index rank) {
  const router<mixture_of_routers<mix::probability, linear_scorer>, top_2> routing{
      .scorer = {.sub_routers = 3}, .selector = {.k = 2}};
  run_method(x, s, m, mixture(routing, rank), balanced(x.settings.balance));
}

template <backend B>
void run_ld_mole(experiment<B>& x, const seeded<B>& s, const method<B>& m, index rank) {
  const mlp_scorer<> sharpness{
      .hidden = 16, .hidden_bias = true, .bias = true, .initial_bias = -2.5};
  const router<linear_scorer, sparsegen<mlp_scorer<>>> routing{.selector = {.control = sharpness}};
  const losses on_routers{
      term{x.settings.balance,
           load_balance<balance::per_selection, balance::per_layer, affinity::gates>{}}};
  run_method(x, s, m, mixture(routing, rank), on_routers);
}

/// All methods, in the order of the tables.
template <backend B>
const std::vector<method<B>>& methods() {
  static const std::vector<method<B>> all{
      {"lora", "LoRA", method_family::lora, {2, 4, 8, 16}, run_lora<B>, ""},
      {"soft", "soft MoLE", method_family::soft_mole, {1, 2}, run_soft<B>, ""},
      {"mola",
       "MoLA top-2",
       method_family::mola,
       {1, 2},
       run_mola<B>,
       "MoLA: gates of the two chosen experts sum to one; load balance loss."},
      {"top_p",
       "top-p",
       method_family::dynamic,
       {2},
       run_top_p<B>,
       "top-p: the most probable experts, up to the one with which their probabilities exceed 0.4; "
       "gates are the probabilities; load balance loss, and entropy in nats with weight 1e-4."},
      {"dyn_mole",
       "DynMoLE",
       method_family::dynamic,
       {2},
       run_dyn_mole<B>,
       "DynMoLE: all experts where the Tsallis entropy (q = 1.1) of the probabilities exceeds 0.9 "
       "of its greatest value, else the most probable while they sum to at most 0.75, and at least "
       "two; gates are the probabilities; load balance loss on the gates, and that entropy with "
       "weight 1e-2."},
      {"gw_moe",
       "GW-MoE",
       method_family::dynamic,
       {2},
       run_gw_moe<B>,
       "GW-MoE: in training, tokens with an entropy of at least 0.8 ln E go to all experts; "
       "otherwise the router of MoLA, also in its loss. Active rank and routing are measured "
       "without training's broadcast."},
      {"mor",
       "MoR",
       method_family::dynamic,
       {2},
       run_mor<B>,
       "MoR: the router of MoLA on the mixed probabilities of three sub-routers, which a main "
       "router weighs for each token; load balance loss."},
      {"ld_mole",
       "LD-MoLE",
       method_family::dynamic,
       {2},
       run_ld_mole<B>,
       "LD-MoLE: gates are the sparse projection of the scores, its sharpness from a small network "
       "(16 hidden units) for each token; load balance loss on the gates."},
  };
  return all;
}

/// The methods that the command line selects.
template <backend B>
std::vector<method<B>> selected_methods(const options& settings) {
  std::vector<method<B>> selected;
  for (const method<B>& m : methods<B>()) {
    const auto& keys = settings.methods;
    if (std::find(keys.begin(), keys.end(), m.key) != keys.end()) selected.push_back(m);
  }
  return selected;
}

/// What a run reads and writes, wherever its networks are.
struct assignment {
  const options& settings;
  const digits& data;
  run_log& log;
  progress& shown;
  report_data& report;
};

/// Pretrains and adapts for each seed, on the backend of the context.
template <backend B>
void run_methods(context<B>& ctx, const assignment& given) {
  const options& settings = given.settings;
  const std::vector<method<B>> selected = selected_methods<B>(settings);
  std::size_t adapted_networks = 0;  // a seed
  for (const method<B>& m : selected) adapted_networks += m.ranks.size();
  experiment<B> x{settings, given.data, ctx, given.log, given.shown, given.report};
  x.work_in_all = settings.seeds * (settings.pretrain_epochs * pretrain_epoch_work +
                                    static_cast<double>(adapted_networks) * settings.epochs);
  for (const std::uint64_t seed : given.report.info.seeds) {
    const seeded<B> s = prepare(x, seed);
    const task_scores majority = majority_scores(given.data, s.split);
    for (std::size_t t = 0; t < tasks.size(); ++t) {
      given.report.majority.accuracy[t] += majority.accuracy[t] / settings.seeds;
    }
    for (const method<B>& m : selected) {
      for (const index rank : m.ranks) m.run(x, s, m, rank);
    }
  }
}

}  // namespace talpa::examples
