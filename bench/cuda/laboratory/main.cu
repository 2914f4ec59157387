// SPDX-License-Identifier: Apache-2.0
// laboratory [--filter TEXT] [FILE]: every selector and preset on a device, over sizes and skew of
// the logits. Prints Markdown tables and writes FILE as JSON; with a filter only lines whose name
// holds TEXT. Names and counters are those of talpa_bench (selectors/route.hpp,
// presets/preset_bench.cpp): `selectors/` from logits to gates, mask and statistics, `routing/`
// with the sort of the slots by expert, each beside raw top-k of the same logits; `presets/` a step
// forward and backward beside that of what is adapted, frozen. `copy_pct` is the rate at which
// logits, gates and mask are moved once, as a part of the rate of a copy today.
#include "cuda/laboratory/laboratory.cuh"
#include "cuda/work.cuh"

#include <cstring>

namespace talpa::bench {
namespace {

int run(const char* filter, const char* path) {
  if (!device_answers("laboratory")) return 77;
  context<gpu> ctx;
  report out(path);
  const double copy = copy_microseconds(ctx);
  out.line("copy of 1 GiB", copy, "TB/s read and written", copied_bytes / copy * 1e-6);
  laboratory lab{ctx, out, filter, copied_bytes / copy};
  top_k_lines(lab);
  row_lines(lab);
  mass_lines(lab);
  broadcast_lines(lab);
  control_lines(lab);
  capacity_lines(lab);
  coupled_lines(lab);
  controlled_preset_lines(lab);
  entropy_preset_lines(lab);
  top_k_preset_lines(lab);
  biased_preset_lines(lab);
  dense_preset_lines(lab);
  fused_preset_lines(lab);
  network_preset_lines(lab);
  fused_network_preset_lines(lab);
  if (lab.failed > 0) std::fprintf(stderr, "%d sizes failed\n", lab.failed);
  return lab.failed > 0 ? 1 : 0;
}

}  // namespace
}  // namespace talpa::bench

int main(int count, char** arguments) {
  const char *filter = "", *path = nullptr;
  for (int i = 1; i < count; ++i) {
    if (std::strcmp(arguments[i], "--filter") == 0 && i + 1 < count) {
      filter = arguments[++i];
    } else if (arguments[i][0] != '-' && path == nullptr) {
      path = arguments[i];
    } else {
      std::fprintf(stderr, "Usage: %s [--filter TEXT] [FILE]\n", arguments[0]);
      return 2;
    }
  }
  try {
    return talpa::bench::run(filter, path);
  } catch (const talpa::error& e) {
    std::fprintf(stderr, "%s\n", e.what());
    return 1;
  }
}
