// SPDX-License-Identifier: Apache-2.0
#include "support/cpu_products.hpp"
#include "support/laws.hpp"
#include "support/scalars.hpp"

#include <talpa/cpu/fill.hpp>
#include <talpa/cpu/gather.hpp>
#include <talpa/cpu/grouped_gemm.hpp>
#include <talpa/cpu/ragged_gate.hpp>
#include <talpa/cpu/ragged_gemm.hpp>
#include <talpa/cpu/rank_gate.hpp>
#include <talpa/cpu/segments.hpp>
#include <talpa/experts/lora.hpp>
#include <talpa/experts/mixed_rank_lora.hpp>

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <concepts>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace talpa::mixed_rank_lora_test {

namespace {

/// The laws expect equal shares of every parameter where experts train one by one.
struct all_train : mixed_rank_lora {
  template <class T, class B>
  void train_experts(params<T, B>&, std::span<const index>) const = delete;
};

/// Tokens, gates and their slots, every expert on for two tokens of three.
template <class T>
struct routed_batch {
  context<cpu> ctx{1};
  matrix<T, cpu> x, gates, dy;
  matrix<std::uint32_t, cpu> on;
  segments<cpu> s;
  vector_view<T, cpu> slot_gates;
  matrix<T, cpu> x_slots, dy_slots;

  routed_batch(index tokens, index inputs, index outputs, index experts, generator& random)
      : x(tokens, inputs), gates(tokens, experts), dy(tokens, outputs), on(tokens, 1) {
    for (auto* m : {&x, &gates, &dy}) fill_normal(m->view(), 1.0, random);
    for (index n = 0; n < tokens; ++n) {
      for (index e = 0; e < experts; ++e) {
        if ((n + e) % 3 != 0) {
          on(n, 0) |= 1u << e;
        } else {
          gates(n, e) = T{0};
        }
      }
    }
    const index slots = ops::count_slots(ctx, on.view(), experts);
    s = make_segments(ctx.memory, tokens, experts, slots);
    slot_gates = ctx.memory.template take<T>(slots);
    ops::build_segments(ctx, on.view(), gates.view(), s, slot_gates);
    x_slots = matrix<T, cpu>(slots, inputs);
    dy_slots = matrix<T, cpu>(slots, outputs);
    ops::gather(ctx, s, x.view(), x_slots.view());
    ops::gather(ctx, s, dy.view(), dy_slots.view());
  }
};

}  // namespace

TEST_SUITE("experts/mixed_rank_lora") {
  TEST_CASE_TEMPLATE("laws of mixed_rank_lora", T, TALPA_SCALARS) {
    support::obeys(testing::expert_laws<T>(all_train{{.ranks = {1, 4, 2, 6}, .alpha = 4.0}}));
    support::obeys(testing::expert_laws<T>(all_train{{.ranks = {3}, .alpha = -2.0}}, {},
                                           {.tokens = 1, .inputs = 1, .outputs = 1, .experts = 1}));
    if (std::same_as<T, double>) return;  // gradients are in double either way
    std::vector<index> ranks(33, 2);
    ranks[0] = 1;
    ranks[32] = 9;
    support::obeys(testing::expert_laws<T>(
        all_train{{.ranks = ranks, .alpha = 1.0, .scaling = lora_scaling::by_root_rank}}, {},
        {.tokens = 12, .inputs = 17, .outputs = 3, .experts = 33}));
  }

  TEST_CASE_TEMPLATE("each expert is the LoRA of its rank", T, TALPA_SCALARS) {
    constexpr index tokens = 20, inputs = 7, outputs = 5, experts = 3;
    const mixed_rank_lora expert{.ranks = {4, 1, 2}, .alpha = 3.0};
    generator random(3), same(3);
    auto p = expert.init<T, cpu>(inputs, outputs, experts, random, "expert.");
    std::vector<lora> alone;
    std::vector<lora::params<T, cpu>> bank;
    for (const index rank : expert.ranks) {
      alone.push_back({.rank = rank, .alpha = 3.0});
      bank.push_back(alone.back().init<T, cpu>(inputs, outputs, 1, same, ""));
    }
    fill_normal(p.b.value(), 1.0, random);
    for (index e = 0; e < experts; ++e) {
      auto& q = bank[static_cast<std::size_t>(e)];
      CHECK(testing::first_difference<T>(p.a.value().row_range(p.blocks[e], q.a.rows()),
                                         q.a.value()) == "");
      for (index r = 0; r < q.b.rows(); ++r) {
        std::copy_n(p.b.value().row(p.blocks[e] + r), outputs, q.b.value().row(r));
      }
      CHECK(expert.scale(e) == alone[static_cast<std::size_t>(e)].scale());
    }

    routed_batch<T> batch(tokens, inputs, outputs, experts, random);
    context<cpu> ctx(1);
    const index slots = batch.s.capacity();
    matrix<T, cpu> y(slots, outputs), dx(slots, inputs);
    vector<T, cpu> dgates(slots);
    const auto kept =
        expert.forward_grouped(ctx, p, batch.s, batch.slot_gates, batch.x_slots, y.view());
    expert.backward_grouped(ctx, p, kept, batch.s, batch.slot_gates, batch.x_slots, batch.dy_slots,
                            dgates.view(), dx.view(), grad_mode::overwrite);
    const matrix<T, cpu> da(p.a.grad()), db(p.b.grad());
    p.a.zero_grad(ctx);
    p.b.zero_grad(ctx);
    matrix<T, cpu> y_all(tokens, outputs), dx_all(tokens, inputs), dgates_all(tokens, experts);
    const auto kept_all = expert.forward_masked(ctx, p, batch.gates, batch.x, y_all.view());
    expert.backward_masked(ctx, p, kept_all, batch.gates, batch.x, batch.dy, dgates_all.view(),
                           dx_all.view(), grad_mode::overwrite);

    // The slots of one expert through a LoRA of its rank: the same sums, cut alike, but Eigen may
    // order those of a narrower product otherwise. Sizes are those of absolute values, at most
    // |A| |x| |B| |g| over D and R terms.
    const auto close = [&](auto found, auto expected, double terms, double size) {
      CHECK(testing::first_excess(found, expected, [&](index, index) {
              return 2.0 * testing::gamma<T>(terms + 6.0) * size;
            }) == "");
    };
    for (index e = 0; e < experts; ++e) {
      auto& q = bank[static_cast<std::size_t>(e)];
      const lora& one = alone[static_cast<std::size_t>(e)];
      const index first = batch.s.offsets[e], count = batch.s.offsets[e + 1] - first;
      matrix<T, cpu> gate(count, 1), found(count, outputs), found_dx(count, inputs),
          found_dg(count, 1);
      for (index i = 0; i < count; ++i) gate(i, 0) = batch.slot_gates[first + i];
      const auto x = batch.x_slots.view().row_range(first, count);
      const auto dy = batch.dy_slots.view().row_range(first, count);
      const auto of_one = one.forward_masked(ctx, q, gate, x, found.view());
      one.backward_masked(ctx, q, of_one, gate, x, dy, found_dg.view(), found_dx.view(),
                          grad_mode::overwrite);
      const double rank = static_cast<double>(one.rank), n = static_cast<double>(count);
      const double x1 = testing::largest(x), dy1 = testing::largest(dy);
      const double g1 = testing::largest(gate.view());
      const double a1 = testing::largest(q.a.value()), b1 = testing::largest(q.b.value());
      const double s = one.scale();
      close(y.view().row_range(first, count), found.view(), inputs + rank,
            s * g1 * inputs * rank * a1 * x1 * b1);
      close(dx.view().row_range(first, count), found_dx.view(), outputs + rank,
            s * g1 * outputs * rank * a1 * dy1 * b1);
      close(matrix_view<T, cpu>(dgates.data() + first, count, 1), found_dg.view(),
            inputs + outputs + rank, s * inputs * outputs * rank * a1 * x1 * b1 * dy1);
      const auto da_e = da.view().row_range(p.blocks[e], one.rank);
      const auto db_e = db.view().row_range(p.blocks[e], one.rank);
      close(da_e, q.a.grad(), n + outputs, s * g1 * n * outputs * b1 * dy1 * x1);
      close(db_e, q.b.grad(), n + inputs, s * g1 * n * inputs * a1 * x1 * dy1);
      // The masked form adds tokens whose gate is zero.
      close(p.a.grad().row_range(p.blocks[e], one.rank), q.a.grad(), tokens + outputs,
            s * g1 * n * outputs * b1 * dy1 * x1);
      close(p.b.grad().row_range(p.blocks[e], one.rank), q.b.grad(), tokens + inputs,
            s * g1 * n * inputs * a1 * x1 * dy1);
    }
  }

  TEST_CASE("equal ranks are lora, bit for bit") {
    constexpr index tokens = 20, inputs = 7, outputs = 5, experts = 3;
    const mixed_rank_lora expert{.ranks = {2, 2, 2}, .alpha = 3.0};
    const lora uniform{.rank = 2, .alpha = 3.0};
    generator random(3);
    auto p = expert.init<float, cpu>(inputs, outputs, experts, random, "");
    fill_normal(p.b.value(), 1.0, random);
    lora::params<float, cpu> q{parameter<float, cpu>("A", matrix<float, cpu>(p.a.value())),
                               parameter<float, cpu>("B", matrix<float, cpu>(p.b.value()))};
    routed_batch<float> batch(tokens, inputs, outputs, experts, random);
    context<cpu> ctx(1);
    matrix<float, cpu> y(tokens, outputs), expected(tokens, outputs);
    expert.forward_masked(ctx, p, batch.gates, batch.x, y.view());
    uniform.forward_masked(ctx, q, batch.gates, batch.x, expected.view());
    CHECK(testing::first_difference(y, expected) == "");
    matrix<float, cpu> y_slots(batch.s.capacity(), outputs), expected_slots = y_slots;
    const auto kept =
        expert.forward_grouped(ctx, p, batch.s, batch.slot_gates, batch.x_slots, y_slots.view());
    const auto of_lora = uniform.forward_grouped(ctx, q, batch.s, batch.slot_gates, batch.x_slots,
                                                 expected_slots.view());
    CHECK(testing::first_difference(y_slots, expected_slots) == "");
    matrix<float, cpu> dx(batch.s.capacity(), inputs);
    vector<float, cpu> dgates(batch.s.capacity());
    expert.backward_grouped(ctx, p, kept, batch.s, batch.slot_gates, batch.x_slots, batch.dy_slots,
                            dgates.view(), dx.view(), grad_mode::overwrite);
    uniform.backward_grouped(ctx, q, of_lora, batch.s, batch.slot_gates, batch.x_slots,
                             batch.dy_slots, dgates.view(), dx.view(), grad_mode::overwrite);
    CHECK(testing::first_difference<float>(p.a.grad(), q.a.grad()) == "");
    CHECK(testing::first_difference<float>(p.b.grad(), q.b.grad()) == "");
  }

  TEST_CASE(
      "only the ranks of the experts that are named train, and their gradient is the whole's") {
    constexpr index tokens = 20, inputs = 4, outputs = 5, experts = 4;
    const mixed_rank_lora expert{.ranks = {1, 3, 2, 4}};
    generator random(2);
    auto p = expert.init<float, cpu>(inputs, outputs, experts, random, "");
    fill_normal(p.b.value(), 1.0, random);
    routed_batch<float> batch(tokens, inputs, outputs, experts, random);
    const auto step = [&] {
      context<cpu> ctx(1);
      matrix<float, cpu> y(batch.s.capacity(), outputs), dx(batch.s.capacity(), inputs);
      vector<float, cpu> dgates(batch.s.capacity());
      const auto kept =
          expert.forward_grouped(ctx, p, batch.s, batch.slot_gates, batch.x_slots, y.view());
      expert.backward_grouped(ctx, p, kept, batch.s, batch.slot_gates, batch.x_slots,
                              batch.dy_slots, dgates.view(), dx.view(), grad_mode::overwrite);
    };
    step();
    const matrix<float, cpu> whole(p.a.grad());
    const index chosen[] = {1, 3};
    expert.train_experts(p, chosen);
    CHECK(p.a.trained_size() == (3 + 4) * inputs);
    CHECK(p.b.trained_size() == (3 + 4) * outputs);
    step();
    // Ranks 1..3 and 6..9 of the bank.
    CHECK(testing::first_difference<float>(p.a.grad().row_range(0, 3),
                                           whole.view().row_range(1, 3)) == "");
    CHECK(testing::first_difference<float>(p.a.grad().row_range(3, 4),
                                           whole.view().row_range(6, 4)) == "");
    const index beyond[] = {4};
    CHECK_THROWS_WITH_AS(expert.train_experts(p, beyond),
                         "talpa::mixed_rank_lora: 'experts' is 4, expected 0..3 = experts",
                         value_error);
    CHECK(p.a.trained_size() == (3 + 4) * inputs);
  }

  TEST_CASE("ranges") {
    CHECK_THROWS_WITH_AS(
        mixed_rank_lora{.ranks = {}}.validate(),
        "talpa::mixed_rank_lora: 'ranks' is 0, expected at least one number, one an expert",
        value_error);
    CHECK_THROWS_WITH_AS(
        (mixed_rank_lora{.ranks = {2, 0}}.validate()),
        "talpa::mixed_rank_lora: 'rank' is 0, expected >= 1 = width of the adapter", value_error);
    generator random(1);
    CHECK_THROWS_WITH_AS(
        (mixed_rank_lora{.ranks = {2, 3}}.init<float, cpu>(4, 4, 3, random, "")),
        "talpa::mixed_rank_lora: 'ranks' is 2, expected 3..3 = numbers, one an expert",
        value_error);
  }
}

}  // namespace talpa::mixed_rank_lora_test
