// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/cuda/context.cuh>

#include <algorithm>
#include <cstdio>
#include <string>
#include <utility>
#include <vector>

// Times of work on a device: captured once in a CUDA graph, so that the gaps between launches of
// the host do not count, and replayed between two events.

namespace talpa::bench {

/// A captured step.
class step_graph {
 public:
  template <class Step>
  step_graph(context<gpu>& ctx, Step step) : ctx_(ctx) {
    // The first run settles memory and algorithms, which a capture must not do.
    step();
    ctx.synchronise();
    cudaGraph_t graph = nullptr;
    detail::check_cuda(cudaStreamBeginCapture(ctx.stream, cudaStreamCaptureModeThreadLocal),
                       "capture");
    step();
    detail::check_cuda(cudaStreamEndCapture(ctx.stream, &graph), "capture");
    detail::check_cuda(cudaGraphInstantiate(&instance_, graph, 0), "capture");
    detail::check_cuda(cudaGraphDestroy(graph), "capture");
  }
  step_graph(const step_graph&) = delete;
  step_graph& operator=(const step_graph&) = delete;
  ~step_graph() { cudaGraphExecDestroy(instance_); }

  void replay() { detail::check_cuda(cudaGraphLaunch(instance_, ctx_.stream), "replay"); }

 private:
  context<gpu>& ctx_;
  cudaGraphExec_t instance_ = nullptr;
};

/// How long graphs are replayed: so many rounds, in each of which every graph has a turn.
struct turns {
  int rounds = 11;
  double us = 5e3;  ///< of a turn
  int least = 3;    ///< replays in a turn, of a graph that takes longer
};

/// Microseconds of one replay of each graph: medians over rounds in which every graph has a turn,
/// so that a clock that changes with the heat is the same for all of them.
inline std::vector<double> microseconds(context<gpu>& ctx, const std::vector<step_graph*>& graphs,
                                        const turns& of = {}) {
  const int rounds = of.rounds;
  cudaEvent_t start, stop;
  detail::check_cuda(cudaEventCreate(&start), "time");
  detail::check_cuda(cudaEventCreate(&stop), "time");
  const auto once = [&](step_graph& graph, int replays) {
    detail::check_cuda(cudaEventRecord(start, ctx.stream), "time");
    for (int i = 0; i < replays; ++i) graph.replay();
    detail::check_cuda(cudaEventRecord(stop, ctx.stream), "time");
    detail::check_cuda(cudaEventSynchronize(stop), "time");
    float milliseconds = 0.0f;
    detail::check_cuda(cudaEventElapsedTime(&milliseconds, start, stop), "time");
    return 1e3 * static_cast<double>(milliseconds) / replays;
  };
  std::vector<int> replays;
  for (step_graph* const g : graphs) {
    once(*g, of.least);
    replays.push_back(std::clamp(static_cast<int>(of.us / once(*g, of.least)), of.least, 200));
  }
  std::vector<std::vector<double>> times(graphs.size());
  for (int r = 0; r < rounds; ++r) {
    for (std::size_t i = 0; i < graphs.size(); ++i) {
      times[i].push_back(once(*graphs[i], replays[i]));
    }
  }
  cudaEventDestroy(start);
  cudaEventDestroy(stop);
  std::vector<double> medians;
  for (std::vector<double>& t : times) {
    std::nth_element(t.begin(), t.begin() + rounds / 2, t.end());
    medians.push_back(t[static_cast<std::size_t>(rounds / 2)]);
  }
  return medians;
}
template <class Step>
double microseconds(context<gpu>& ctx, Step step) {
  step_graph graph(ctx, step);
  return microseconds(ctx, std::vector<step_graph*>{&graph}, {.rounds = 9})[0];
}

/// Lines of a report: Markdown tables on the standard output and one JSON list in a file.
class report {
 public:
  using counters = std::vector<std::pair<std::string, double>>;

  explicit report(const char* path) : file_(path != nullptr ? std::fopen(path, "w") : nullptr) {
    if (file_ != nullptr) std::fprintf(file_, "[\n");
  }
  report(const report&) = delete;
  report& operator=(const report&) = delete;
  ~report() {
    if (file_ == nullptr) return;
    std::fprintf(file_, "\n]\n");
    std::fclose(file_);
  }
  /// `ratio` is this time over that of `beside`, or what the caller says it is.
  void line(const std::string& what, double us, const std::string& beside, double ratio) {
    begin_row("| what | time, us | beside | ratio |\n| --- | ---: | --- | ---: |\n");
    std::printf("| %s | %.2f | %s | %.3f |\n", what.c_str(), us, beside.c_str(), ratio);
    begin_object(what, us);
    if (file_ != nullptr) {
      std::fprintf(file_, ", \"beside\": \"%s\", \"ratio\": %.5f", beside.c_str(), ratio);
    }
    end();
  }
  /// A table of its own for lines with the same counters.
  void line(const std::string& what, double us, const counters& measured) {
    std::string head = "| what | time, us |", rule = "\n| --- | ---: |";
    for (const auto& [name, value] : measured) {
      head += " " + name + " |";
      rule += " ---: |";
    }
    begin_row(head + rule + "\n");
    std::printf("| %s | %.2f |", what.c_str(), us);
    for (const auto& [name, value] : measured) std::printf(" %.4g |", value);
    std::printf("\n");
    begin_object(what, us);
    for (const auto& [name, value] : measured) {
      if (file_ != nullptr) std::fprintf(file_, ", \"%s\": %.6g", name.c_str(), value);
    }
    end();
  }

 private:
  void begin_row(const std::string& head) {
    if (head == head_) return;
    std::printf("%s%s", head_.empty() ? "" : "\n", head.c_str());
    head_ = head;
  }
  void begin_object(const std::string& what, double us) {
    if (file_ == nullptr) return;
    std::fprintf(file_, "%s  {\"name\": \"%s\", \"us\": %.4f", first_ ? "" : ",\n", what.c_str(),
                 us);
    first_ = false;
  }
  void end() {
    std::fflush(stdout);
    if (file_ == nullptr) return;
    std::fprintf(file_, "}");
    std::fflush(file_);
  }

  std::FILE* file_;
  std::string head_;
  bool first_ = true;
};

}  // namespace talpa::bench
