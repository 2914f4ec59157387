// SPDX-License-Identifier: Apache-2.0
//
// What a mixture of LoRA experts and the frozen linear map below it keep of their speed while a
// busy process of somebody else shares their cores. Each iteration times batches of passes without
// it, with it and without it again; `kept_pct` is the median of the mean of the first and last time
// over the second, `linear_kept_pct` the same of the map alone. A fair share of two cores for two
// threads is 75 %. Meant for as many cores as threads: `taskset -c 0,1`, OMP_PROC_BIND=true.
#include "layers/adapted_map.hpp"
#include "workloads.hpp"

#include <talpa/talpa.hpp>

#include <benchmark/benchmark.h>

#include <csignal>
#include <functional>
#include <string>
#include <sys/types.h>
#include <sys/wait.h>
#include <unistd.h>
#include <vector>

namespace {

using namespace talpa;
using talpa::index;

/// A process that computes without end while it is let, and ends with this one.
class stranger {
 public:
  stranger() : parent_(getpid()), child_(fork()) {
    if (child_ == 0) compute();
    if (child_ > 0) stop();
  }
  ~stranger() {
    if (child_ <= 0) return;
    kill(child_, SIGKILL);
    waitpid(child_, nullptr, 0);
  }
  stranger(const stranger&) = delete;
  stranger& operator=(const stranger&) = delete;

  bool there() const { return child_ > 0; }
  void stop() const {
    kill(child_, SIGSTOP);
    int status = 0;
    waitpid(child_, &status, WUNTRACED);
  }
  void resume() const { kill(child_, SIGCONT); }

 private:
  // Nothing but this loop runs in the copy of a process that may have had several threads.
  [[noreturn]] void compute() const {
    for (unsigned i = 0;; ++i) {
      benchmark::DoNotOptimize(i);
      if (i % 1048576 == 0 && getppid() != parent_) _exit(0);
    }
  }

  pid_t parent_, child_;
};

struct workload {
  index tokens, width;
  bool backward;
};

constexpr int threads = 2;
/// Seconds of a batch: many turns of the scheduler.
constexpr double batch_seconds = 0.15;

void run(benchmark::State& state, const workload& w) {
  context<cpu> ctx(threads);
  using layer = mole_linear<router<linear_scorer, top_k<gate::renormalised>>, lora>;
  bench::adapted_map<layer> map(
      ctx, {.router = {.selector = {.k = 2}}, .expert = {.rank = 8}, .experts = 8}, w.tokens,
      w.width, w.backward);
  const stranger other;
  if (!other.there()) {
    state.SkipWithError("no second process could be made");
    return;
  }
  struct measured {
    std::function<void()> pass;
    index count = 1;  // passes of a batch
    std::vector<double> shares;
  };
  measured both[] = {{[&] { map.linear_pass(); }, 1, {}}, {[&] { map.layer_pass(); }, 1, {}}};
  const auto time_of = [](const measured& m) {
    return bench::seconds([&] {
      for (index i = 0; i < m.count; ++i) m.pass();
    });
  };
  for (measured& m : both) {
    m.pass();
    m.count += static_cast<index>(batch_seconds / time_of(m));
  }
  std::vector<double> times;
  for (auto _ : state) {
    for (measured& m : both) {
      const double before = time_of(m);
      other.resume();
      const double beside = time_of(m);
      other.stop();
      const double after = time_of(m);
      m.shares.push_back(50.0 * (before + after) / beside);
      if (&m == &both[1]) {
        const double time = beside / static_cast<double>(m.count);
        times.push_back(time);
        state.SetIterationTime(time);
      }
    }
  }
  state.counters["kept_pct"] = bench::median(both[1].shares);
  state.counters["linear_kept_pct"] = bench::median(both[0].shares);
  state.counters["ns/token"] = 1e9 * bench::median(times) / static_cast<double>(w.tokens);
}

void add_all() {
  for (const index tokens : {512, 4096}) {
    for (const index width : {768, 2048}) {
      for (const bool backward : {false, true}) {
        const workload w{tokens, width, backward};
        const std::string name = std::string("layers/shared_cores/") +
                                 (backward ? "step" : "forward") + "/N:" + std::to_string(tokens) +
                                 "/D:" + std::to_string(width) +
                                 "/E:8/R:8/K:2/threads:" + std::to_string(threads) + "/f32/cpu";
        benchmark::RegisterBenchmark(name.c_str(), [w](benchmark::State& state) { run(state, w); })
            ->UseManualTime()
            ->Iterations(9)
            ->Unit(benchmark::kMillisecond);
      }
    }
  }
}

const int registered = (add_all(), 0);

}  // namespace
