// SPDX-License-Identifier: Apache-2.0
#include "cuda/laboratory/routes.cuh"
#include "cuda/work.cuh"

#include <talpa/cuda/segments.hpp>
#include <talpa/selectors/top_k.hpp>

#include <utility>
#include <vector>

namespace talpa::bench {
namespace {

device_routing make_routing(context<gpu>& ctx, index tokens, index experts, double skew) {
  device_routing at{normal_matrix<float>(ctx, tokens, experts, 1.0f, 1),
                    normal_matrix<float>(ctx, tokens, 1, 1.0f, 2),
                    normal_matrix<float>(ctx, 1, experts, 0.1f, 3),
                    tokens < 512 ? tokens : 512,
                    matrix<float, gpu>(tokens, experts),
                    matrix<std::uint32_t, gpu>(tokens, mask_words(experts)),
                    make_statistics<float>(ctx.memory, experts),
                    make_segments(ctx.memory, tokens, experts, tokens * experts),
                    ctx.memory.take<float>(tokens * experts)};
  if (skew == 0.0) return at;
  const auto means = normal_matrix<float>(ctx, 1, experts, static_cast<float>(skew), 4);
  const matrix_view<float, gpu> logits = at.logits.view();
  const matrix_view<const float, gpu> mean = means.view();
  kernels::for_each_element(ctx, tokens, experts,
                            [=] TALPA_DEVICE(index n, index e) { logits(n, e) += mean(0, e); });
  ctx.synchronise();
  return at;
}

void sort(context<gpu>& ctx, device_routing& at) {
  ops::build_segments<gpu, float>(ctx, std::as_const(at.mask).view(),
                                  std::as_const(at.gates).view(), at.slots, at.gate_of_slot);
}

/// The two lines of a selector at one size: without and with the sort, each beside raw top-k of the
/// same logits.
void measure_route(laboratory& lab, const std::string& chosen, const std::string& sorted,
                   const route_step& selector, index tokens, index experts, index k, double skew) {
  context<gpu>& ctx = lab.ctx;
  const workspace<gpu>::scope scope(ctx.memory);
  device_routing at = make_routing(ctx, tokens, experts, skew);
  const auto top_k_step = [&] { route(ctx, top_k<gate::raw>{.k = k}, at); };
  const auto then_sort = [&](const auto& step) {
    step();
    sort(ctx, at);
  };
  const auto selector_step = [&] { selector(ctx, at); };
  step_graph top(ctx, top_k_step), top_sorted(ctx, [&] { then_sort(top_k_step); });
  step_graph own(ctx, selector_step), own_sorted(ctx, [&] { then_sort(selector_step); });
  own_sorted.replay();
  ctx.synchronise();
  const statistics_report load(at.statistics);
  const index slots = to_host(as_column(at.slots.offsets))(experts, 0);
  check_range("routing laboratory", "slots", slots, load.selections(), load.selections(),
              "selections of the statistics");
  const std::vector<double> us =
      microseconds(ctx, {&own, &top, &own_sorted, &top_sorted}, short_turns);
  const auto enter = [&](const std::string& name, double time, double beside) {
    if (!lab.wants(name)) return;
    const double n = static_cast<double>(tokens);
    // Logits are read, gates and mask written.
    const double bytes =
        n * (8.0 * static_cast<double>(experts) + 4.0 * static_cast<double>(mask_words(experts)));
    report::counters counters{{"ns/token", 1e3 * time / n},
                              {"vs_top_k", time / beside},
                              {"tokens/s", 1e6 * n / time},
                              {"bytes/s", 1e6 * bytes / time},
                              {"copy_pct", 100.0 * bytes / time / lab.copy_bytes_per_us}};
    append_load(counters, load);
    lab.out.line(name, time, counters);
  };
  enter(chosen, us[0], us[1]);
  enter(sorted, us[2], us[3]);
}

}  // namespace

void route_lines(laboratory& lab, const std::string& name, const route_sizes& sizes,
                 const std::function<route_step(index, index)>& make) {
  // What runs on few tokens takes long.
  std::vector<index> batches{sizes.tokens};
  if (sizes.tokens >= 4096) batches.push_back(16 * sizes.tokens);
  for (const index tokens : batches) {
    for (const index experts : sizes.experts) {
      for (const index k : sizes.ks) {
        for (const double skew : {0.0, skewed}) {
          const auto called = [&](const char* group) {
            return route_name(group + name, tokens, experts, k, skew, "gpu");
          };
          const std::string chosen = called("selectors/"), sorted = called("routing/");
          if (!lab.wants(chosen) && !lab.wants(sorted)) continue;
          lab.attempt(chosen, [&] {
            measure_route(lab, chosen, sorted, make(experts, k), tokens, experts, k > 0 ? k : 2,
                          skew);
          });
        }
      }
    }
  }
}

}  // namespace talpa::bench
