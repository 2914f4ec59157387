// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/cuda/context.cuh>

#include <algorithm>
#include <cstdio>
#include <string>
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

/// Microseconds of one replay of each graph: medians over rounds in which every graph has a turn of
/// about 5 ms, so that a clock that changes with the heat is the same for all of them.
inline std::vector<double> microseconds(context<gpu>& ctx, const std::vector<step_graph*>& graphs,
                                        int rounds = 11) {
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
    once(*g, 3);
    replays.push_back(std::clamp(static_cast<int>(5e3 / once(*g, 3)), 3, 200));
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
  return microseconds(ctx, std::vector<step_graph*>{&graph}, 9)[0];
}

/// Lines of a report: a Markdown table on the standard output and one JSON object in a file.
class report {
 public:
  explicit report(const char* path) : file_(path != nullptr ? std::fopen(path, "w") : nullptr) {
    std::printf("| what | time, us | beside | ratio |\n| --- | ---: | --- | ---: |\n");
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
    std::printf("| %s | %.2f | %s | %.3f |\n", what.c_str(), us, beside.c_str(), ratio);
    std::fflush(stdout);
    if (file_ == nullptr) return;
    std::fprintf(file_, "%s  {\"name\": \"%s\", \"us\": %.4f, \"beside\": \"%s\", \"ratio\": %.5f}",
                 first_ ? "" : ",\n", what.c_str(), us, beside.c_str(), ratio);
    std::fflush(file_);
    first_ = false;
  }

 private:
  std::FILE* file_;
  bool first_ = true;
};

}  // namespace talpa::bench
