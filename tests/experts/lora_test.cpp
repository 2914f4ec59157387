// SPDX-License-Identifier: Apache-2.0
#include "support/cpu_products.hpp"
#include "support/laws.hpp"
#include "support/random.hpp"
#include "support/scalars.hpp"
#include "support/tolerance.hpp"

#include <talpa/cpu/gather.hpp>
#include <talpa/cpu/grouped_gemm.hpp>
#include <talpa/cpu/rank_gate.hpp>
#include <talpa/cpu/segments.hpp>
#include <talpa/experts/lora.hpp>
#include <talpa/testing/expert_laws.hpp>

#include <doctest/doctest.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <string>

namespace talpa::lora_test {

namespace {

/// Mean and mean square of all weights.
struct moments {
  double mean = 0.0;
  double square = 0.0;
};
moments moments_of(const parameter<double, cpu>& p) {
  moments m;
  const double n = static_cast<double>(p.size());
  for (index i = 0; i < p.size(); ++i) {
    m.mean += p.value().data[i] / n;
    m.square += p.value().data[i] * p.value().data[i] / n;
  }
  return m;
}

/// Standard deviations that a fair sample leaves once in 1.7 million: a wrong verdict is no matter
/// of luck, the seed being fixed.
constexpr double sigmas = 5.0;

}  // namespace

TEST_SUITE("experts/lora") {
  TEST_CASE("two experts of rank 1, by hand") {
    // s = 6 / 1. A_0 = [1 2], B_0 = [1 0 1]; A_1 = [0 3], B_1 = [2 2 0]; x = [1 1].
    const lora expert{.rank = 1, .alpha = 6.0};
    generator random(1);
    auto p = expert.init<float, cpu>(2, 3, 2, random, "");
    const float a[] = {1, 2, 0, 3}, b[] = {1, 0, 1, 2, 2, 0};
    std::copy_n(a, 4, p.a.value().data);
    std::copy_n(b, 6, p.b.value().data);
    matrix<float, cpu> x(1, 2), gates(1, 2), y(1, 3), dy(1, 3), dgates(1, 2), dx(1, 2);
    x(0, 0) = x(0, 1) = 1.0f;
    gates(0, 0) = 0.5f;
    gates(0, 1) = 0.25f;
    y(0, 0) = 100.0f;
    context<cpu> ctx(1);
    // u = (3, 3); z = 6 (0.5 3, 0.25 3) = (9, 4.5); y += 9 B_0 + 4.5 B_1 = (18, 9, 9).
    const auto kept = expert.forward_masked(ctx, p, gates, x, y.view());
    CHECK(y(0, 0) == 118.0f);
    CHECK(y(0, 1) == 9.0f);
    CHECK(y(0, 2) == 9.0f);
    // dy = (1, 0, 1): dz = (2, 2); dg = 6 (2 3, 2 3) = (36, 36); du = 6 (0.5 2, 0.25 2) = (6, 3);
    // dx = 6 A_0 + 3 A_1 = (6, 21); dA = du^T x; dB = z^T dy.
    dy(0, 0) = dy(0, 2) = 1.0f;
    expert.backward_masked(ctx, p, kept, gates, x, dy, dgates.view(), dx.view(),
                           grad_mode::overwrite);
    CHECK(dgates(0, 0) == 36.0f);
    CHECK(dgates(0, 1) == 36.0f);
    CHECK(dx(0, 0) == 6.0f);
    CHECK(dx(0, 1) == 21.0f);
    CHECK(p.a.grad()(0, 0) == 6.0f);
    CHECK(p.a.grad()(1, 1) == 3.0f);
    CHECK(p.b.grad()(0, 0) == 9.0f);
    CHECK(p.b.grad()(0, 1) == 0.0f);
    CHECK(p.b.grad()(1, 2) == 4.5f);
  }

  TEST_CASE_TEMPLATE("laws of lora", T, TALPA_SCALARS) {
    support::obeys(testing::expert_laws<T>(lora{.rank = 3, .alpha = 4.0}));
    support::obeys(testing::expert_laws<T>(
        lora{.rank = 8, .alpha = 16.0, .scaling = lora_scaling::by_root_rank}));
    support::obeys(testing::expert_laws<T>(lora{.rank = 1, .alpha = -2.0}, {},
                                           {.tokens = 1, .inputs = 1, .outputs = 1, .experts = 1}));
    support::obeys(
        testing::expert_laws<T>(lora{.rank = 2, .alpha = 1.0, .init_a = lora_init::gaussian}, {},
                                {.tokens = 12, .inputs = 17, .outputs = 3, .experts = 33}));
    support::obeys(testing::expert_laws<T>(lora{.rank = 5}, {},
                                           {.tokens = 7, .inputs = 4, .outputs = 6, .experts = 2}));
  }

  TEST_CASE("alpha is divided by the rank or by its root") {
    CHECK(lora{.rank = 16, .alpha = 8.0}.scale() == 0.5);
    CHECK(lora{.rank = 16, .alpha = 8.0, .scaling = lora_scaling::by_root_rank}.scale() == 2.0);
    CHECK(lora{}.scale() == 2.0);
    CHECK(lora{.dropout = 0.25}.input_dropout() == 0.25);
    CHECK(lora{.rank = 7}.width() == 7);
  }

  TEST_CASE_TEMPLATE("ranks as experts, all on with gate 1, are one LoRA", T, TALPA_SCALARS) {
    constexpr index tokens = 30, inputs = 7, outputs = 5, ranks = 12;
    const lora whole{.rank = ranks, .alpha = 18.0}, rank{.rank = 1, .alpha = 18.0 / ranks};
    CHECK(whole.scale() == rank.scale());
    generator random(4);
    auto one = whole.init<T, cpu>(inputs, outputs, 1, random, "");
    fill_normal(one.b.value(), 1.0, random);
    lora::params<T, cpu> many{parameter<T, cpu>("A", matrix<T, cpu>(one.a.value())),
                              parameter<T, cpu>("B", matrix<T, cpu>(one.b.value()))};
    matrix<T, cpu> x(tokens, inputs), gate(tokens, 1), gates(tokens, ranks);
    fill_normal(x.view(), 1.0, random);
    std::fill_n(gate.data(), gate.size(), T{1});
    std::fill_n(gates.data(), gates.size(), T{1});
    matrix<T, cpu> y(tokens, outputs), found(tokens, outputs), dy(tokens, outputs);
    fill_normal(dy.view(), 1.0, random);
    matrix<T, cpu> dx(tokens, inputs), dx_found(tokens, inputs), dgate(tokens, 1),
        dgates(tokens, ranks);
    context<cpu> ctx(1);
    const auto kept = whole.forward_masked(ctx, one, gate, x, y.view());
    whole.backward_masked(ctx, one, kept, gate, x, dy, dgate.view(), dx.view(),
                          grad_mode::overwrite);
    const auto kept_ranks = rank.forward_masked(ctx, many, gates, x, found.view());
    rank.backward_masked(ctx, many, kept_ranks, gates, x, dy, dgates.view(), dx_found.view(),
                         grad_mode::overwrite);
    CHECK(testing::first_difference(found, y) == "");
    CHECK(testing::first_difference(dx_found, dx) == "");
    CHECK(testing::first_difference<T>(many.a.grad(), one.a.grad()) == "");
    CHECK(testing::first_difference<T>(many.b.grad(), one.b.grad()) == "");

    // Grouped, each rank on its own: R products of D terms, whose sizes one LoRA of absolute values
    // adds up.
    const auto sizes = [](matrix<T, cpu> m) {
      for (index i = 0; i < m.size(); ++i) m.data()[i] = std::abs(m.data()[i]);
      return m;
    };
    lora::params<T, cpu> absolute{parameter<T, cpu>("A", sizes(matrix<T, cpu>(one.a.value()))),
                                  parameter<T, cpu>("B", sizes(matrix<T, cpu>(one.b.value())))};
    matrix<T, cpu> size(tokens, outputs);
    whole.forward_masked(ctx, absolute, gate, sizes(x), size.view());
    matrix<std::uint32_t, cpu> on(tokens, 1);
    for (index n = 0; n < tokens; ++n) on(n, 0) = (1u << ranks) - 1u;
    segments<cpu> s = make_segments(ctx.memory, tokens, ranks, tokens * ranks);
    const auto slot_gates = ctx.memory.template take<T>(tokens * ranks);
    ops::build_segments(ctx, on.view(), gates.view(), s, slot_gates);
    matrix<T, cpu> x_slots(s.capacity(), inputs), y_slots(s.capacity(), outputs);
    ops::gather(ctx, s, x.view(), x_slots.view());
    rank.forward_grouped(ctx, many, s, slot_gates, x_slots, y_slots.view());
    ops::combine(ctx, s, y_slots.view(), found.view(), grad_mode::overwrite);
    CHECK(testing::first_excess(found.view(), y.view(), [&](index n, index o) {
            return 2.0 * testing::gamma<T>(inputs + ranks + 4.0) * static_cast<double>(size(n, o));
          }) == "");
  }

  TEST_CASE("the scaling reaches the output") {
    // One expert, gate 1, A and B of ones: y = s r d.
    for (const lora_scaling scaling : {lora_scaling::by_rank, lora_scaling::by_root_rank}) {
      const lora expert{.rank = 4, .alpha = 3.0, .scaling = scaling};
      generator random(1);
      auto p = expert.init<double, cpu>(5, 2, 1, random, "");
      std::fill_n(p.a.value().data, p.a.size(), 1.0);
      std::fill_n(p.b.value().data, p.b.size(), 1.0);
      matrix<double, cpu> x(1, 5), gates(1, 1), y(1, 2);
      std::fill_n(x.data(), 5, 1.0);
      gates(0, 0) = 1.0;
      context<cpu> ctx(1);
      expert.forward_masked(ctx, p, gates, x, y.view());
      CHECK(y(0, 1) == (scaling == lora_scaling::by_rank ? 0.75 : 1.5) * 20.0);
    }
  }

  TEST_CASE("A begins uniform in +-1 / sqrt D, B at zero") {
    generator random(9);
    const index inputs = 49;
    const auto p = lora{.rank = 16}.init<double, cpu>(inputs, 30, 12, random, "expert.");
    CHECK(p.a.name() == "expert.A");
    CHECK(p.b.name() == "expert.B");
    CHECK(p.a.rows() == 12 * 16);
    CHECK(p.a.cols() == inputs);
    CHECK(p.b.rows() == 12 * 16);
    CHECK(p.b.cols() == 30);
    CHECK(testing::largest(p.b.value()) == 0.0);
    const double bound = 1.0 / 7.0, n = static_cast<double>(p.a.size());
    CHECK(testing::largest(p.a.value()) <= bound);
    // Variance of a uniform number a^2 / 3, of its square a^4 (1 / 5 - 1 / 9).
    const moments m = moments_of(p.a);
    CHECK(std::abs(m.mean) <= sigmas * bound / std::sqrt(3.0 * n));
    CHECK(std::abs(m.square - bound * bound / 3.0) <=
          sigmas * bound * bound * std::sqrt((1.0 / 5.0 - 1.0 / 9.0) / n));
    // The end of the range is reached: n draws leave the last part 16 / n out once in e^16 seeds.
    CHECK(testing::largest(p.a.value()) >= bound * (1.0 - 16.0 / n));
  }

  TEST_CASE("A can begin normal with deviation 1 / r") {
    generator random(10);
    const auto p =
        lora{.rank = 8, .init_a = lora_init::gaussian}.init<double, cpu>(50, 3, 20, random, "");
    CHECK(testing::largest(p.b.value()) == 0.0);
    const double deviation = 1.0 / 8.0, n = static_cast<double>(p.a.size());
    const moments m = moments_of(p.a);
    // Variance of the square of a normal number: 2 sigma^4.
    CHECK(std::abs(m.mean) <= sigmas * deviation / std::sqrt(n));
    CHECK(std::abs(m.square - deviation * deviation) <=
          sigmas * deviation * deviation * std::sqrt(2.0 / n));
    // Beyond what a uniform number of the same variance reaches.
    CHECK(testing::largest(p.a.value()) > deviation * std::sqrt(3.0));
  }

  TEST_CASE("A and B can begin as those of PERFT") {
    generator random(11);
    const auto p =
        lora{.rank = 8, .init_a = lora_init::perft}.init<double, cpu>(50, 40, 20, random, "");
    const auto normal = [](const parameter<double, cpu>& factor, double deviation) {
      const double n = static_cast<double>(factor.size());
      const moments m = moments_of(factor);
      CHECK(std::abs(m.mean) <= sigmas * deviation / std::sqrt(n));
      CHECK(std::abs(m.square - deviation * deviation) <=
            sigmas * deviation * deviation * std::sqrt(2.0 / n));
      CHECK(testing::largest(factor.value()) > deviation * std::sqrt(3.0));
    };
    normal(p.a, std::sqrt(2.0 / 8.0));
    normal(p.b, 1e-6);
  }

  TEST_CASE("hyperparameters outside their range are refused") {
    CHECK_NOTHROW(lora{}.validate());
    CHECK_NOTHROW((lora{.rank = 1, .alpha = -1.0, .dropout = 0.999}).validate());
    CHECK_THROWS_WITH_AS(lora{.rank = 0}.validate(),
                         "talpa::lora: 'rank' is 0, expected >= 1 = width of the adapter",
                         value_error);
    CHECK_THROWS_WITH_AS(lora{.alpha = std::numeric_limits<double>::infinity()}.validate(),
                         "talpa::lora: 'alpha' is inf, expected a finite number", value_error);
    CHECK_THROWS_WITH_AS(lora{.alpha = std::numeric_limits<double>::quiet_NaN()}.validate(),
                         "talpa::lora: 'alpha' is nan, expected a finite number", value_error);
    CHECK_THROWS_WITH_AS(lora{.dropout = 1.0}.validate(),
                         "talpa::lora: 'dropout' is 1, expected 0 <= dropout < 1", value_error);
    CHECK_THROWS_WITH_AS(lora{.dropout = -0.5}.validate(),
                         "talpa::lora: 'dropout' is -0.5, expected 0 <= dropout < 1", value_error);
    CHECK_THROWS_WITH_AS(lora{.dropout = std::numeric_limits<double>::quiet_NaN()}.validate(),
                         "talpa::lora: 'dropout' is nan, expected 0 <= dropout < 1", value_error);
  }

  TEST_CASE("only the experts that are named train") {
    generator random(2);
    const lora expert{.rank = 3};
    auto p = expert.init<float, cpu>(4, 5, 6, random, "");
    const index chosen[] = {1, 2, 5};
    expert.train_experts(p, std::span<const index>(chosen));
    CHECK(p.a.trained_size() == 3 * 3 * 4);
    CHECK(p.b.trained_size() == 3 * 3 * 5);
    CHECK(p.a.trained().size() == 2);
    const index beyond[] = {6};
    CHECK_THROWS_AS(expert.train_experts(p, std::span<const index>(beyond)), value_error);
  }
}

}  // namespace talpa::lora_test
