// SPDX-License-Identifier: Apache-2.0
// Why: what does a mixture of low-rank experts buy, next to plain LoRA with as many weights, or
// with as much work per token?
//
// How: a small network learns to name handwritten digits and is frozen. The same images then come
// with eight instructions (its name, is it odd, what follows it, ...), and adapters on the frozen
// layers have to tell them apart: LoRA, soft MoLE, MoLA and other routers, each with the same data,
// order, epochs, optimiser and schedule. network.hpp has the layers, training.hpp the loop,
// evaluation.hpp what is measured; the other files read, print and draw.
//
// To try: --balance 0 and the dead experts of Figure 3; --methods lora,mola; another method, by an
// entry in the table `methods`.

#include "atomic_file.hpp"
#include "digits.hpp"
#include "evaluation.hpp"
#include "interrupt.hpp"
#include "network.hpp"
#include "options.hpp"
#include "progress.hpp"
#include "report.hpp"
#include "report_data.hpp"
#include "report_table.hpp"
#include "run_info.hpp"
#include "run_log.hpp"
#include "tasks.hpp"
#include "training.hpp"

#include <talpa/cpu/mix_logits.hpp>
#include <talpa/cpu/overlay_rows.hpp>
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
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <memory>
#include <string>
#include <utility>
#include <vector>

// What CMake knows of the build; by hand the program works from the repository's root.
#ifndef TALPA_EXAMPLE_DATA_DIR
#define TALPA_EXAMPLE_DATA_DIR "examples/data"
#endif
#ifndef TALPA_BUILD_TYPE
#define TALPA_BUILD_TYPE "unknown"
#endif
#ifndef TALPA_BUILD_FLAGS
#define TALPA_BUILD_FLAGS ""
#endif

namespace talpa::examples {

namespace {

constexpr double held_out_fraction = 1.0 / 3.0;
constexpr index mixture_experts = 8;
// One epoch of pretraining asks one instruction, one of adaptation eight.
constexpr double pretrain_epoch_work = 1.0 / static_cast<double>(task_count);

/// Scale alpha / r = 2 for every method and rank.
lora adapter_of_rank(index rank) {
  return {.rank = rank, .alpha = 2.0 * static_cast<double>(rank)};
}

/// Everything a run writes to.
struct experiment {
  const options& settings;
  const digits& data;
  context<cpu>& ctx;
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
struct seeded {
  std::uint64_t seed = 0;
  data_split split;
  base_network base;
};

/// The entry of a method in the report, made when its first seed runs.
method_result& entry_of(report_data& report, const std::string& name, const std::string& label,
                        method_family family, index rank) {
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

run_log::object accuracies(const task_scores& scores) {
  run_log::object by_task;
  for (std::size_t t = 0; t < tasks.size(); ++t) by_task[tasks[t].name] = scores.accuracy[t];
  return by_task;
}

void log_result(run_log& log, const method_result& m, const method_run& run) {
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

std::string label(const std::string& name, std::uint64_t seed, int epoch, int epochs, double loss) {
  return format("%-16s seed %llu epoch %2d/%d loss %s", name.c_str(),
                static_cast<unsigned long long>(seed), epoch, epochs, fixed(loss, 3).c_str());
}

/// Splits, pretrains on the name of the digit, and notes what the base makes of the instructions.
seeded prepare(experiment& x, std::uint64_t seed) {
  seeded s;
  s.seed = seed;
  s.split = split_digits(x.data, held_out_fraction, seed);
  generator random(seed, 1000);  // the split took the first streams
  s.base = make_base(random);

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
    s.base.visit([&](const parameter<float, cpu>& p) { x.report.base_parameters += p.size(); });
    x.report.train_images = std::ssize(s.split.train);
    x.report.held_out_images = std::ssize(s.split.held_out);
  }
  m.runs.push_back(run);
  log_result(x.log, m, run);
  return s;
}

/// One entry of the table of methods: a row of the results for each rank.
struct method {
  const char* key;  // of --methods
  const char* name;
  method_family family;
  std::vector<index> ranks;                                            // of an expert
  void (*run)(experiment&, const seeded&, const method&, index rank);  // one rank, one seed
  const char* settings;  // of its router, for the report; empty: nothing to tell
};

/// Adapts the base with one kind of layer and one seed, and adds the run to the report.
/// `on_routers` is the loss on the routers.
template <class Layer, class Loss>
void run_method(experiment& x, const seeded& s, const method& what, const Layer& layer,
                const Loss& on_routers) {
  const index rank = expert_rank(layer);
  const std::string name = format("%s r = %td", what.name, rank);
  const std::string mark = detail::is_series(what.family) ? format("r = %td", rank) : what.name;
  generator random(s.seed, 2000);
  network<Layer> net = adapt(s.base, layer, random);
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

void run_lora(experiment& x, const seeded& s, const method& m, index rank) {
  run_method(x, s, m, lora_linear{.adapter = adapter_of_rank(rank)}, no_loss{});
}

void run_soft(experiment& x, const seeded& s, const method& m, index rank) {
  run_method(x, s, m, mixture(router<linear_scorer, dense>{}, rank), no_loss{});
}

void run_mola(experiment& x, const seeded& s, const method& m, index rank) {
  const router<linear_scorer, top_2> routing{.selector = {.k = 2}};
  run_method(x, s, m, mixture(routing, rank), balanced(x.settings.balance));
}

void run_top_p(experiment& x, const seeded& s, const method& m, index rank) {
  const router<linear_scorer, top_p<gate::raw, crossing::kept>> routing{.selector = {.p = 0.4}};
  const losses on_routers{
      term{x.settings.balance, load_balance<balance::per_selection, balance::per_layer>{}},
      term{1e-4, entropy_loss<entropy::shannon>{.entropy = {.normalised = false}}}};
  run_method(x, s, m, mixture(routing, rank), on_routers);
}

void run_dyn_mole(experiment& x, const seeded& s, const method& m, index rank) {
  const entropy::tsallis uncertainty{.q = 1.1};
  const router<linear_scorer, dynamic_entropy<entropy::tsallis>> routing{
      .selector = {.p = 0.75, .min_k = 2, .threshold = 0.9, .entropy = uncertainty}};
  const losses on_routers{
      term{x.settings.balance, load_balance<balance::soft_mass, balance::pooled>{}},
      term{1e-2, entropy_loss<entropy::tsallis, balance::pooled>{.entropy = uncertainty}}};
  run_method(x, s, m, mixture(routing, rank), on_routers);
}

void run_gw_moe(experiment& x, const seeded& s, const method& m, index rank) {
  const router<linear_scorer, broadcast<top_2>> routing{
      .selector = {.inner = {.k = 2}, .threshold = 0.8}};
  run_method(x, s, m, mixture(routing, rank), balanced(x.settings.balance));
}

void run_mor(experiment& x, const seeded& s, const method& m, index rank) {
  const router<mixture_of_routers<mix::probability, linear_scorer>, top_2> routing{
      .scorer = {.sub_routers = 3}, .selector = {.k = 2}};
  run_method(x, s, m, mixture(routing, rank), balanced(x.settings.balance));
}

void run_ld_mole(experiment& x, const seeded& s, const method& m, index rank) {
  const mlp_scorer<> sharpness{
      .hidden = 16, .hidden_bias = true, .bias = true, .initial_bias = -2.5};
  const router<linear_scorer, sparsegen<mlp_scorer<>>> routing{.selector = {.control = sharpness}};
  const losses on_routers{
      term{x.settings.balance,
           load_balance<balance::per_selection, balance::per_layer, affinity::gates>{}}};
  run_method(x, s, m, mixture(routing, rank), on_routers);
}

/// All methods, in the order of the tables.
const std::vector<method>& methods() {
  static const std::vector<method> all{
      {"lora", "LoRA", method_family::lora, {2, 4, 8, 16}, run_lora, ""},
      {"soft", "soft MoLE", method_family::soft_mole, {1, 2}, run_soft, ""},
      {"mola",
       "MoLA top-2",
       method_family::mola,
       {1, 2},
       run_mola,
       "MoLA: gates of the two chosen experts sum to one; load balance loss."},
      {"top_p",
       "top-p",
       method_family::dynamic,
       {2},
       run_top_p,
       "top-p: the most probable experts, up to the one with which their probabilities exceed 0.4; "
       "gates are the probabilities; load balance loss, and entropy in nats with weight 1e-4."},
      {"dyn_mole",
       "DynMoLE",
       method_family::dynamic,
       {2},
       run_dyn_mole,
       "DynMoLE: all experts where the Tsallis entropy (q = 1.1) of the probabilities exceeds 0.9 "
       "of its greatest value, else the most probable while they sum to at most 0.75, and at least "
       "two; gates are the probabilities; load balance loss on the gates, and that entropy with "
       "weight 1e-2."},
      {"gw_moe",
       "GW-MoE",
       method_family::dynamic,
       {2},
       run_gw_moe,
       "GW-MoE: in training, tokens with an entropy of at least 0.8 ln E go to all experts; "
       "otherwise the router of MoLA, also in its loss. Active rank and routing are measured "
       "without training's broadcast."},
      {"mor",
       "MoR",
       method_family::dynamic,
       {2},
       run_mor,
       "MoR: the router of MoLA on the mixed probabilities of three sub-routers, which a main "
       "router weighs for each token; load balance loss."},
      {"ld_mole",
       "LD-MoLE",
       method_family::dynamic,
       {2},
       run_ld_mole,
       "LD-MoLE: gates are the sparse projection of the scores, its sharpness from a small network "
       "(16 hidden units) for each token; load balance loss on the gates."},
  };
  return all;
}

std::vector<std::string> method_keys() {
  std::vector<std::string> keys;
  for (const method& m : methods()) keys.push_back(m.key);
  return keys;
}

std::vector<method> selected_methods(const options& settings) {
  std::vector<method> selected;
  for (const method& m : methods()) {
    const auto& keys = settings.methods;
    if (std::find(keys.begin(), keys.end(), m.key) != keys.end()) selected.push_back(m);
  }
  return selected;
}

run_info describe(const options& settings, const std::vector<std::string>& arguments) {
  run_info info;
  info.version = version_text();
  info.compiler = compiler_text();
  info.build_type = TALPA_BUILD_TYPE;
  info.flags = TALPA_BUILD_FLAGS;
  info.isa = isa_text();
  info.optimised = built_optimised();
  info.threads = settings.threads;
  for (int i = 0; i < settings.seeds; ++i) {
    info.seeds.push_back(settings.seed + static_cast<std::uint64_t>(i));
  }
  for (const std::string& a : arguments) info.command += (info.command.empty() ? "" : " ") + a;
  info.started = utc_now();
  return info;
}

void run(const options& settings, const std::vector<std::string>& arguments) {
  const auto start = std::chrono::steady_clock::now();
  report_data report;
  report.info = describe(settings, arguments);
  report.quick = settings.quick;
  report.pretrain_epochs = settings.pretrain_epochs;
  report.epochs = settings.epochs;
  report.batch = settings.batch;
  report.learning_rate = settings.learning_rate;
  report.balance = settings.balance;
  report.network =
      format("%td - %td - %td - %td with ReLU", widths[0], widths[1], widths[2], widths[3]);

  const std::vector<method> selected = selected_methods(settings);
  std::size_t adapted_networks = 0;  // a seed
  for (const method& m : selected) {
    adapted_networks += m.ranks.size();
    if (*m.settings != '\0') report.settings.push_back(m.settings);
  }

  // Wrong files are found before the work, not after.
  const digits data = load_digits(settings.data, settings.data_rows);
  std::unique_ptr<atomic_file> page;
  if (!settings.report.empty()) page = std::make_unique<atomic_file>(settings.report);
  run_log log(settings.log, report.info);
  std::fputs(build_warning(report.info).c_str(), stderr);

  context<cpu> ctx(settings.threads);
  progress shown(stderr, detect_progress_style(stderr, settings.quiet));
  experiment x{settings, data, ctx, log, shown, report};
  x.work_in_all = settings.seeds * (settings.pretrain_epochs * pretrain_epoch_work +
                                    static_cast<double>(adapted_networks) * settings.epochs);
  for (const std::uint64_t seed : report.info.seeds) {
    const seeded s = prepare(x, seed);
    const task_scores majority = majority_scores(data, s.split);
    for (std::size_t t = 0; t < tasks.size(); ++t) {
      report.majority.accuracy[t] += majority.accuracy[t] / settings.seeds;
    }
    for (const method& m : selected) {
      for (const index rank : m.ranks) m.run(x, s, m, rank);
    }
  }
  report.total_seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();

  log.write({{"event", "end"}, {"seconds", report.total_seconds}});
  if (page) page->write(report_html(report));
  log.commit();
  if (page) page->commit();
  shown.finish("done");

  std::fputs(result_table(report, is_terminal(stdout) && colors_wanted()).c_str(), stdout);
  if (!settings.report.empty() || !settings.log.empty()) std::fputs("\n", stdout);
  if (!settings.report.empty()) std::printf("report  %s\n", printable(settings.report).c_str());
  if (!settings.log.empty()) std::printf("log     %s\n", printable(settings.log).c_str());
}

int run_program(const std::vector<std::string>& arguments) {
  const options defaults = default_options(TALPA_EXAMPLE_DATA_DIR, method_keys());
  options settings;
  try {
    settings = parse_options(arguments, defaults);
  } catch (const value_error& e) {
    std::fprintf(stderr, "%s\n", e.what());
    return 2;
  }
  if (settings.help) {
    std::fputs(help_text(defaults).c_str(), stdout);
  } else if (settings.version) {
    std::printf("quickstart of talpa %s\n", version_text().c_str());
  } else {
    tidy_up_on_signals();
    run(settings, arguments);
  }
  if (std::fflush(stdout) != 0 || std::ferror(stdout) != 0) {
    std::fputs("quickstart: standard output could not be written\n", stderr);
    return 1;
  }
  return 0;
}

}  // namespace

}  // namespace talpa::examples

int main(int count, char** values) {
  try {
    return talpa::examples::run_program({values + 1, values + count});
  } catch (const talpa::io_error& e) {
    std::fprintf(stderr, "%s\n", e.what());
    return 2;
  } catch (const std::exception& e) {
    std::fprintf(stderr, "quickstart: %s\n", e.what());
    return 1;
  }
}
