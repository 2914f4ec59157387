// SPDX-License-Identifier: Apache-2.0
//
// The sort of slots by expert, alone, for the routing of raw top-k; beside a counting sort that
// looks at each bit of the mask by itself.
#include "beside.hpp"
#include "selectors/route.hpp"

#include <algorithm>

namespace {

using namespace talpa;
using talpa::index;

/// build_segments in the plainest way.
void sort_plainly(const routing_view<const float, cpu>& routed, bench::plain_segments& slots) {
  slots.begin(routed.gates.cols);
  for (index n = 0; n < routed.gates.rows; ++n) {
    for (index e = 0; e < routed.gates.cols; ++e) {
      if (routed.on(n, e)) slots.add(n, e, routed.gates(n, e));
    }
  }
  slots.sort();
}

void run(benchmark::State& state, index tokens, index experts, index k) {
  bench::routing_bench bench(tokens, experts, k, 0.0, true);
  bench.route(top_k<gate::raw>{.k = k});
  const routing_view<const float, cpu> routed(bench.chosen.gates.view(), bench.chosen.mask.view());
  bench::plain_segments plain;
  const auto sort = [&] { bench.sort(); };
  const auto loop = [&] { sort_plainly(routed, plain); };
  sort();
  loop();
  const std::int32_t* const sorted = bench.slots.token_of_slot.data;
  if (!std::equal(plain.token_of_slot().begin(), plain.token_of_slot().end(), sorted)) {
    state.SkipWithError("the plain loop sorts differently");
    return;
  }
  // A clock of microseconds reads a pass of tens of them badly.
  constexpr int passes = 8;
  const auto repeated = [](const auto& pass) {
    return [&pass] {
      for (int i = 0; i < passes; ++i) pass();
    };
  };
  bench::time_beside(state, passes * tokens, repeated(sort), "loop", repeated(loop));
}

const int registered = [] {
  const bench::route_sizes sizes;
  for (const index experts : sizes.experts) {
    for (const index k : sizes.ks) {
      const std::string name = bench::route_name("segments/top_k", sizes.tokens, experts, k, 0.0);
      benchmark::RegisterBenchmark(name.c_str(), [=](benchmark::State& state) {
        run(state, sizes.tokens, experts, k);
      })->UseManualTime();
    }
  }
  return 0;
}();

}  // namespace
