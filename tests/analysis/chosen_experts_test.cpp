// SPDX-License-Identifier: Apache-2.0
#include "support/random.hpp"

#include <talpa/analysis/router_lens.hpp>
#include <talpa/cpu/activation.hpp>
#include <talpa/cpu/adamw.hpp>
#include <talpa/cpu/add.hpp>
#include <talpa/cpu/bias.hpp>
#include <talpa/cpu/copy.hpp>
#include <talpa/cpu/dropout.hpp>
#include <talpa/cpu/fill.hpp>
#include <talpa/cpu/gated_activation.hpp>
#include <talpa/cpu/gather.hpp>
#include <talpa/cpu/grouped_gemm.hpp>
#include <talpa/cpu/rank_gate.hpp>
#include <talpa/cpu/reduce.hpp>
#include <talpa/cpu/scale.hpp>
#include <talpa/cpu/segments.hpp>
#include <talpa/cpu/select.hpp>
#include <talpa/layers/moe_ffn.hpp>
#include <talpa/optim/adamw.hpp>
#include <talpa/scorers/linear_scorer.hpp>
#include <talpa/selectors/top_k.hpp>

#include <doctest/doctest.h>

#include <algorithm>
#include <cstddef>

namespace talpa::chosen_experts_test {

using namespace support;

namespace {

using layer_type = moe_ffn<router<linear_scorer, top_k<gate::raw>>>;

}  // namespace

TEST_SUITE("analysis/chosen_experts") {
  TEST_CASE("chosen experts train as if all did; nothing else has memory for a gradient") {
    const index width = 4, hidden = 3, count = 6, tokens = 40;
    const layer_type layer{.router = {.selector = {.k = 2}},
                           .expert = {.hidden = hidden},
                           .experts = count,
                           .shared = {.hidden = hidden},
                           .shared_experts = 1};
    generator first(5), second(5);
    auto all = layer.init<double, cpu>(width, first);
    auto some = layer.init<double, cpu>(width, second);
    test_random random(81);
    const matrix<double, cpu> x = random_matrix<double>(random, tokens, width);
    const matrix<double, cpu> dy = random_matrix<double>(random, tokens, width);
    matrix<double, cpu> y(tokens, width), dx(tokens, width), dx_some(tokens, width);

    context<cpu> ctx;
    const auto kept = layer.forward(ctx, all, x, y.view(), mode::training);
    router_lens lens(1, count, 2);
    lens.add(0, kept.routed);
    const expert_selection chosen = top_experts(lens.counts(), 2);
    CHECK(lens.counts()(0, chosen[0][0]) >= lens.counts()(0, chosen[0][1]));
    layer.backward(ctx, all, kept, x, dy, dx.view(), grad_mode::overwrite);

    some.freeze();
    std::vector<index> ascending = chosen[0];
    std::sort(ascending.begin(), ascending.end());
    layer.expert.train_experts(some.expert, ascending);
    index stored = 0;
    some.visit([&](const parameter<double, cpu>& p) { stored += p.grad().rows * p.grad().cols; });
    CHECK(stored == 2 * 3 * hidden * width);
    // An optimiser keeps two numbers for each of these, and for nothing else.
    parameter_group<double, cpu> group;
    group.add(some);
    adamw<double, cpu> optimiser({group});
    std::size_t state_bytes = 0;
    for (parameter<double, cpu>* const p : optimiser.parameters()) {
      const auto state = optimiser.state(*p);
      state_bytes +=
          static_cast<std::size_t>(state.first.size() + state.second.size()) * sizeof(double);
    }
    CHECK(state_bytes == 2 * static_cast<std::size_t>(stored) * sizeof(double));
    const auto again = layer.forward(ctx, some, x, y.view(), mode::training);
    layer.backward(ctx, some, again, x, dy, dx_some.view(), grad_mode::overwrite);
    // The same sums in the same order: the same bits, and the tokens' gradient passes everything.
    CHECK(std::equal(dx.data(), dx.data() + dx.size(), dx_some.data()));
    for (std::size_t i = 0; i < ascending.size(); ++i) {
      const auto full = all.expert.up.grad().row_range(ascending[i] * hidden, hidden);
      const auto part = some.expert.up.grad().row_range(static_cast<index>(i) * hidden, hidden);
      CHECK(std::equal(full.data, full.data + hidden * width, part.data));
      CHECK(std::any_of(part.data, part.data + hidden * width, [](double d) { return d != 0.0; }));
    }
  }

  TEST_CASE("the router tunes alone as if all did; nothing else has memory for a gradient") {
    const index width = 4, count = 6, tokens = 40;
    const layer_type layer{
        .router = {.selector = {.k = 2}}, .expert = {.hidden = 3}, .experts = count};
    generator first(5), second(5);
    auto all = layer.init<double, cpu>(width, first);
    auto alone = layer.init<double, cpu>(width, second);
    alone.freeze();
    alone.router.scorer.weight.train();
    test_random random(82);
    const matrix<double, cpu> x = random_matrix<double>(random, tokens, width);
    const matrix<double, cpu> dy = random_matrix<double>(random, tokens, width);
    matrix<double, cpu> y(tokens, width), dx(tokens, width);
    for (auto* const p : {&all, &alone}) {
      context<cpu> ctx;
      const auto kept = layer.forward(ctx, *p, x, y.view(), mode::training);
      layer.backward(ctx, *p, kept, x, dy, dx.view(), grad_mode::overwrite);
    }
    index stored = 0;
    alone.visit([&](const parameter<double, cpu>& p) { stored += p.trained_size(); });
    CHECK(stored == count * width);
    const auto full = all.router.scorer.weight.grad(), part = alone.router.scorer.weight.grad();
    CHECK(std::equal(full.data, full.data + count * width, part.data));
    CHECK(std::any_of(part.data, part.data + count * width, [](double d) { return d != 0.0; }));
  }
}

}  // namespace talpa::chosen_experts_test
