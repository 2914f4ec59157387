// SPDX-License-Identifier: Apache-2.0
// Why: what does a mixture of low-rank experts buy, next to plain LoRA with as many weights, or
// with as much work per token?
//
// How: a small network learns to name handwritten digits and is frozen. The same images then come
// with eight instructions (its name, is it odd, what follows it, ...), and adapters on the frozen
// layers have to tell them apart: LoRA, soft MoLE, MoLA and other routers, each with the same data,
// order, epochs, optimiser and schedule. experiment.hpp has the methods, network.hpp the layers,
// training.hpp the loop, evaluation.hpp what is measured; the other files read, print and draw.
//
// To try: --balance 0 and the dead experts of Figure 3; --methods lora,mola; another method, by an
// entry in the table `methods` of experiment.hpp; --device gpu.

#include "atomic_file.hpp"
#include "digits.hpp"
#include "experiment.hpp"
#include "interrupt.hpp"
#include "on_gpu.hpp"
#include "options.hpp"
#include "progress.hpp"
#include "report.hpp"
#include "report_data.hpp"
#include "report_table.hpp"
#include "run_info.hpp"
#include "run_log.hpp"

#include <talpa/cpu/mix_logits.hpp>
#include <talpa/cpu/overlay_rows.hpp>
#include <talpa/talpa.hpp>

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

std::vector<std::string> method_keys() {
  std::vector<std::string> keys;
  for (const method<cpu>& m : methods<cpu>()) keys.push_back(m.key);
  return keys;
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
  info.device = settings.device == device_name::gpu ? gpu_text() : "cpu";
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

  for (const method<cpu>& m : selected_methods<cpu>(settings)) {
    if (*m.settings != '\0') report.settings.push_back(m.settings);
  }

  // Wrong files are found before the work, not after.
  const digits data = load_digits(settings.data, settings.data_rows);
  std::unique_ptr<atomic_file> page;
  if (!settings.report.empty()) page = std::make_unique<atomic_file>(settings.report);
  run_log log(settings.log, report.info);
  std::fputs(build_warning(report.info).c_str(), stderr);

  progress shown(stderr, detect_progress_style(stderr, settings.quiet));
  const assignment given{settings, data, log, shown, report};
  if (settings.device == device_name::gpu) {
    run_on_gpu(given);
  } else {
    context<cpu> ctx(settings.threads);
    run_methods(ctx, given);
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
    if (settings.device == device_name::gpu) gpu_text();
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
