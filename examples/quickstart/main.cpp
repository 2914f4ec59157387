// SPDX-License-Identifier: Apache-2.0
// Why: what does a mixture of low-rank experts buy, next to plain LoRA with as many weights, or
// with as much work per token?
//
// How: a small network learns to name handwritten digits and is frozen. The same images then come
// with eight instructions (its name, is it odd, what follows it, ...), and adapters on the frozen
// layers have to tell them apart: LoRA, soft MoLE and MoLA, each with the same data, order, epochs,
// optimiser and schedule. network.hpp has the layers, training.hpp the loop, evaluation.hpp what is
// measured; the other files read, print and draw.
//
// To try: --balance 0 and the dead experts of Figure 3; another method, by one line in run_methods.

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

using soft_mole = mole_linear<router<linear_scorer, dense>, lora>;
using mola = mole_linear<router<linear_scorer, top_k<gate::renormalised>>, lora>;

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
method_result& entry_of(report_data& report, const std::string& name, method_family family,
                        index rank) {
  const auto found = std::find_if(report.methods.begin(), report.methods.end(),
                                  [&](const method_result& m) { return m.name == name; });
  if (found != report.methods.end()) return *found;
  method_result made;
  made.name = name;
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
  method_result& m = entry_of(x.report, name, method_family::frozen, 0);
  method_run run;
  run.seed = seed;
  const recipe pretraining{.epochs = x.settings.pretrain_epochs,
                           .batch = 32,
                           .learning_rate = 3e-3,
                           .weight_decay = 1e-2};
  train(x.ctx, s.base, x.data, examples_of(s.split.train, name_task), pretraining, random,
        [&](int epoch, const epoch_result& result) {
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

/// Adapts the base with one kind of layer and one seed, and adds the run to the report.
template <class Layer>
void run_method(experiment& x, const seeded& s, const std::string& name, method_family family,
                const Layer& layer) {
  generator random(s.seed, 2000);
  network<Layer> net = adapt(s.base, layer, random);
  method_result& m = entry_of(x.report, name, family, expert_rank(layer));
  const trainable_counts count = count_trainable(net);
  m.adapter_parameters = count.adapters;
  m.router_parameters = count.routers;

  method_run run;
  run.seed = s.seed;
  evaluation now = evaluate_network(x.ctx, net, x.data, s.split.held_out);
  run.layers = now.layers;
  const recipe adaptation{.epochs = x.settings.epochs,
                          .batch = x.settings.batch,
                          .learning_rate = x.settings.learning_rate,
                          .balance = family == method_family::mola ? x.settings.balance : 0.0};
  // Streams of their own: every method asks the same questions in the same order.
  generator order(s.seed, 3000);
  train(x.ctx, net, x.data, all_examples(s.split.train), adaptation, order,
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

constexpr int adapted_methods = 8;

void run_methods(experiment& x, const seeded& s) {
  for (const index rank : {2, 4, 8, 16}) {
    run_method(x, s, format("LoRA r = %td", rank), method_family::lora,
               lora_linear{.adapter = adapter_of_rank(rank)});
  }
  for (const index rank : {1, 2}) {
    run_method(x, s, format("soft MoLE r = %td", rank), method_family::soft_mole,
               soft_mole{.expert = adapter_of_rank(rank), .experts = mixture_experts});
  }
  for (const index rank : {1, 2}) {
    run_method(x, s, format("MoLA top-2 r = %td", rank), method_family::mola,
               mola{.router = {.selector = {.k = 2}},
                    .expert = adapter_of_rank(rank),
                    .experts = mixture_experts});
  }
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
                                    adapted_methods * settings.epochs);
  for (const std::uint64_t seed : report.info.seeds) {
    const seeded s = prepare(x, seed);
    const task_scores majority = majority_scores(data, s.split);
    for (std::size_t t = 0; t < tasks.size(); ++t) {
      report.majority.accuracy[t] += majority.accuracy[t] / settings.seeds;
    }
    run_methods(x, s);
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
  const options defaults = default_options(TALPA_EXAMPLE_DATA_DIR);
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
