// SPDX-License-Identifier: Apache-2.0
#include "experts/networks.hpp"
#include "support/reference.hpp"
#include "support/scalars.hpp"

#include <talpa/experts/parallel_adapter.hpp>

#include <doctest/doctest.h>

#include <cmath>
#include <concepts>
#include <cstdint>

namespace talpa::parallel_adapter_test {

using namespace support;

TEST_SUITE("experts/parallel_adapter") {
  TEST_CASE_TEMPLATE("laws of parallel_adapter", T, TALPA_SCALARS) {
    obeys(testing::expert_laws<T>(parallel_adapter<>{.rank = 3}, adapter));
    obeys(testing::expert_laws<T>(parallel_adapter<>{.rank = 1, .scale = -0.5}, adapter, one));
    if (std::same_as<T, double>) return;  // gradients are in double either way
    obeys(testing::expert_laws<float>(
        parallel_adapter<tanh>{.rank = 2, .scale = 4.0, .init_factors = adapter_init::perft},
        network, many));
  }
  TEST_CASE_TEMPLATE("in training units are dropped before the activation, alike in both forms", T,
                     TALPA_SCALARS) {
    // Unit r of expert e at token n stays where keep(stream, (n E + e) R + r) says, divided by p,
    // and the activation sees what is left: dropout behind it would give silu(u) / p.
    const parallel_adapter<> expert{.rank = 3, .scale = 1.5, .dropout = 0.25};
    constexpr index tokens = 40, inputs = 5, outputs = 4, experts = 3;
    generator random(7);
    auto p = expert.template init<T, cpu>(inputs, outputs, experts, random, "");
    testing::detail::shake<T>(p, random, 0.5);
    matrix<T, cpu> x(tokens, inputs), gates(tokens, experts);
    fill_normal(x.view(), 1.0, random);
    fill_normal(gates.view(), 1.0, random);
    const random_stream stream = random.next();
    const dropout_mask mask{.stream = stream, .keep = 0.75f, .active = true};

    support::table expected(tokens, outputs), size(tokens, outputs);
    index dropped = 0;
    for (index n = 0; n < tokens; ++n) {
      for (index i = 0; i < experts * 3; ++i) {
        double u = 0.0, terms = 0.0;
        for (index d = 0; d < inputs; ++d) {
          u += double(p.down.value()(i, d)) * double(x(n, d));
          terms += std::abs(double(p.down.value()(i, d)) * double(x(n, d)));
        }
        const bool on = keep(stream, static_cast<std::uint64_t>(n * experts * 3 + i), 0.75f);
        dropped += on ? 0 : 1;
        u = on ? u / 0.75 : 0.0;
        const double h = u / (1.0 + std::exp(-u)), g = 1.5 * double(gates(n, i / 3));
        for (index o = 0; o < outputs; ++o) {
          expected(n, o) += g * h * double(p.up.value()(i, o));
          // |silu'| < 1.1, so an error of u is at most that much larger behind it.
          if (on) size(n, o) += std::abs(1.1 * g * terms / 0.75 * double(p.up.value()(i, o)));
        }
      }
    }
    // 360 draws of 1 / 4, within five deviations.
    CHECK(std::abs(static_cast<double>(dropped) - 90.0) <= 5.0 * std::sqrt(360.0 * 3.0 / 16.0));
    // D and E R products and sums, dropout, some eight roundings of the activation, two of gates.
    const double relative = testing::gamma<T>(inputs + experts * 3 + 16.0);
    const auto bound = [&](index n, index o) { return relative * size(n, o); };

    context<cpu> ctx(2);
    matrix<T, cpu> y(tokens, outputs), all(tokens, outputs);
    expert.forward_masked(ctx, p, gates, x, y.view(), mask);
    for (index i = 0; i < all.size(); ++i)
      all.data()[i] = static_cast<T>(expected.values[static_cast<std::size_t>(i)]);
    const auto rounded = [&](index n, index o) {
      return bound(n, o) + testing::gamma<T>(1.0) * std::abs(expected(n, o));
    };
    CHECK(testing::first_excess(y.view(), all.view(), rounded) == "");

    matrix<std::uint32_t, cpu> on(tokens, 1);
    for (index n = 0; n < tokens; ++n) on(n, 0) = 7u;
    segments<cpu> s = make_segments(ctx.memory, tokens, experts, tokens * experts);
    const auto slot_gates = ctx.memory.template take<T>(tokens * experts);
    ops::build_segments(ctx, on.view(), gates.view(), s, slot_gates);
    matrix<T, cpu> x_slots(s.capacity(), inputs), y_slots(s.capacity(), outputs);
    ops::gather(ctx, s, x.view(), x_slots.view());
    expert.forward_grouped(ctx, p, s, slot_gates, x_slots, y_slots.view(), mask);
    ops::combine(ctx, s, y_slots.view(), y.view(), grad_mode::overwrite);
    CHECK(testing::first_excess(y.view(), all.view(), rounded) == "");
  }
  TEST_CASE("ranges") {
    CHECK_THROWS_WITH_AS(parallel_adapter<>{.dropout = 1.0}.validate(),
                         "talpa::parallel_adapter: 'dropout' is 1, expected 0 <= dropout < 1",
                         value_error);
    CHECK_THROWS_WITH_AS(
        parallel_adapter<>{.rank = 0}.validate(),
        "talpa::parallel_adapter: 'rank' is 0, expected >= 1 = width of the bottleneck",
        value_error);
    CHECK_THROWS_WITH_AS(parallel_adapter<>{.scale = INFINITY}.validate(),
                         "talpa::parallel_adapter: 'scale' is inf, expected a finite number",
                         value_error);
  }
}

}  // namespace talpa::parallel_adapter_test
