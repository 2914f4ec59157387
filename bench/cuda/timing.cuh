// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/cuda/context.cuh>

#include <algorithm>
#include <cstdio>
#include <string>
#include <vector>

// Times of work on a device: captured once in a CUDA graph, so that the gaps between launches of the
// host do not count, and replayed between two events.

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

/// Microseconds of one replay: the median over `rounds` of the mean of as many replays as fill
/// about 5 ms.
inline double microseconds(context<gpu>& ctx, step_graph& graph, int rounds = 9) {
  cudaEvent_t start, stop;
  detail::check_cuda(cudaEventCreate(&start), "time");
  detail::check_cuda(cudaEventCreate(&stop), "time");
  const auto once = [&](int replays) {
    detail::check_cuda(cudaEventRecord(start, ctx.stream), "time");
    for (int i = 0; i < replays; ++i) graph.replay();
    detail::check_cuda(cudaEventRecord(stop, ctx.stream), "time");
    detail::check_cuda(cudaEventSynchronize(stop), "time");
    float milliseconds = 0.0f;
    detail::check_cuda(cudaEventElapsedTime(&milliseconds, start, stop), "time");
    return 1e3 * static_cast<double>(milliseconds) / replays;
  };
  once(3);
  const int replays = std::clamp(static_cast<int>(5e3 / once(3)), 3, 200);
  std::vector<double> times;
  for (int i = 0; i < rounds; ++i) times.push_back(once(replays));
  cudaEventDestroy(start);
  cudaEventDestroy(stop);
  std::nth_element(times.begin(), times.begin() + rounds / 2, times.end());
  return times[static_cast<std::size_t>(rounds / 2)];
}
template <class Step>
double microseconds(context<gpu>& ctx, Step step, int rounds = 9) {
  step_graph graph(ctx, step);
  return microseconds(ctx, graph, rounds);
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
