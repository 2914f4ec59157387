// SPDX-License-Identifier: Apache-2.0
#include "support/cpu_products.hpp"
#include "support/laws.hpp"
#include "support/reference.hpp"
#include "support/scalars.hpp"

#include <talpa/cpu/add.hpp>
#include <talpa/cpu/block_scale.hpp>
#include <talpa/cpu/copy.hpp>
#include <talpa/cpu/fill.hpp>
#include <talpa/cpu/gather.hpp>
#include <talpa/cpu/grouped_gemm.hpp>
#include <talpa/cpu/mul.hpp>
#include <talpa/cpu/rank_gate.hpp>
#include <talpa/cpu/segments.hpp>
#include <talpa/cpu/weight_norm.hpp>
#include <talpa/experts/dora.hpp>

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <concepts>
#include <cstdint>
#include <initializer_list>
#include <span>
#include <string>

namespace talpa::dora_test {

namespace {

using support::table;
using support::to_table;

/// The laws train parts of everything, a base of its own too.
struct all_train : dora {
  template <class T, class B>
  void train_experts(params<T, B>&, std::span<const index>) const = delete;
};

/// Over a base that belongs to the test, so that the laws see A, B and the magnitudes alone.
struct on_given_base : dora {
  template <class T, class B>
  params<T, B> init(index inputs, index outputs, index experts, generator& random,
                    const std::string& prefix) const {
    static matrix<T, B> base = [&] {
      generator fixed(17);
      matrix<T, B> w(outputs, inputs);
      fill_normal(w.view(), 1.0, fixed);
      return w;
    }();
    return adapt<T, B>(base.view(), experts, random, prefix);
  }
};

template <class P>
void set(P& p, std::initializer_list<double> values) {
  index i = 0;
  for (const double v : values) p.value().data[i++] = static_cast<float>(v);
}

}  // namespace

TEST_SUITE("experts/dora") {
  TEST_CASE("one expert of rank 1, by hand") {
    // W0 = [1 1 1 0], A = [0 0 0 1], B = 1, s = 1: V = [1 1 1 1], |V| = 2, m = 4, c = 2.
    const dora expert{.rank = 1, .alpha = 1.0};
    generator random(1);
    auto p = expert.init<float, cpu>(4, 1, 1, random, "");
    set(p.base, {1, 1, 1, 0});
    set(p.a, {0, 0, 0, 1});
    set(p.b, {1});
    set(p.magnitude, {4});
    matrix<float, cpu> x(1, 4), gates(1, 1), y(1, 1), dy(1, 1), dgates(1, 1), dx(1, 4);
    for (index d = 0; d < 4; ++d) x(0, d) = static_cast<float>(d + 1);
    gates(0, 0) = 0.5f;
    y(0, 0) = 100.0f;
    dy(0, 0) = 1.0f;
    context<cpu> ctx(1);
    // W0 x = 6, q = 4, f = 2 (6 + 4) - 6 = 14.
    const auto kept = expert.forward_masked(ctx, p, gates, x, y.view());
    CHECK(y(0, 0) == 107.0f);
    // dc = 0.5 10 = 5, dm = 5 / 2, dV = -(5 4 / 8) V; dB = 2 0.5 4 + dV A^T = 4 - 2.5;
    // dA = 2 0.5 x + dV, dx = 0.5 W0 + 0.5 2 A, dW0 = 0.5 x + dV.
    expert.backward_masked(ctx, p, kept, gates, x, dy, dgates.view(), dx.view(),
                           grad_mode::overwrite);
    CHECK(dgates(0, 0) == 14.0f);
    CHECK(p.magnitude.grad()(0, 0) == 2.5f);
    CHECK(p.b.grad()(0, 0) == 1.5f);
    for (index d = 0; d < 4; ++d) {
      CHECK(p.a.grad()(0, d) == static_cast<float>(d + 1) - 2.5f);
      CHECK(p.base.grad()(0, d) == 0.5f * static_cast<float>(d + 1) - 2.5f);
      CHECK(dx(0, d) == (d < 3 ? 0.5f : 1.0f));
    }

    // The length as a constant: the same but for dV.
    dora constant = expert;
    constant.norm = dora_norm::constant;
    p.visit([](parameter<float, cpu>& q) { q.train(); });
    constant.backward_masked(ctx, p, kept, gates, x, dy, dgates.view(), dx.view(),
                             grad_mode::overwrite);
    CHECK(p.magnitude.grad()(0, 0) == 2.5f);
    CHECK(p.b.grad()(0, 0) == 4.0f);
    CHECK(p.a.grad()(0, 3) == 4.0f);
    CHECK(dx(0, 3) == 1.0f);
  }

  TEST_CASE_TEMPLATE("laws of dora", T, TALPA_SCALARS) {
    // The laws bound errors by what absolute values give, but these make V longer and c smaller
    // than they are. Among many lengths of two numbers one would cancel: a small update is given.
    const testing::expert_claims claims{.amplification = 64.0};
    const testing::expert_sizes one{.tokens = 5, .inputs = 1, .outputs = 1, .experts = 1};
    support::obeys(testing::expert_laws<T>(on_given_base{{.rank = 3, .alpha = 4.0}}, claims));
    support::obeys(testing::expert_laws<T>(all_train{{.rank = 2, .alpha = 3.0}}, claims));
    if (std::same_as<T, double>) return;  // gradients are in double either way
    support::obeys(testing::expert_laws<T>(all_train{{.rank = 1, .alpha = -0.5}}, claims, one));
    support::obeys(
        testing::expert_laws<T>(all_train{{.rank = 1, .alpha = 0.125}}, claims,
                                {.tokens = 9, .inputs = 2, .outputs = 4, .experts = 33}));
  }

  TEST_CASE_TEMPLATE("both forms are the mixture of adapted weights", T, TALPA_SCALARS) {
    constexpr index tokens = 17, inputs = 6, outputs = 5, experts = 3, ranks = 2;
    const dora expert{.rank = ranks, .alpha = 3.0};
    generator random(6);
    auto p = expert.init<T, cpu>(inputs, outputs, experts, random, "");
    testing::detail::shake<T>(p, random, 0.5);
    matrix<T, cpu> x(tokens, inputs), gates(tokens, experts);
    fill_normal(x.view(), 1.0, random);
    fill_normal(gates.view(), 1.0, random);
    const table w = to_table(p.base.value()), a = to_table(p.a.value()), b = to_table(p.b.value());
    table expected(tokens, outputs), size(tokens, outputs);
    for (index e = 0; e < experts; ++e) {
      for (index o = 0; o < outputs; ++o) {
        double v[inputs], sizes[inputs], square = 0.0, square_of_sizes = 0.0;
        for (index d = 0; d < inputs; ++d) {
          v[d] = w(o, d);
          sizes[d] = std::abs(w(o, d));
          for (index r = e * ranks; r < (e + 1) * ranks; ++r) {
            v[d] += expert.scale() * b(r, o) * a(r, d);
            sizes[d] += std::abs(expert.scale() * b(r, o) * a(r, d));
          }
          square += v[d] * v[d];
          square_of_sizes += sizes[d] * sizes[d];
        }
        const double c = static_cast<double>(p.magnitude.value()(e, o)) / std::sqrt(square);
        for (index n = 0; n < tokens; ++n) {
          const double g = static_cast<double>(gates(n, e));
          double terms = 0.0;
          for (index d = 0; d < inputs; ++d) {
            const double xd = static_cast<double>(x(n, d));
            expected(n, o) += g * (c * v[d] - w(o, d)) * xd;
            terms += sizes[d] * std::abs(xd);
          }
          // The length is off by roundings of V, of the size of its terms, over its own.
          size(n, o) += std::abs(g) * terms *
                        (1.0 + std::abs(c) * (1.0 + std::sqrt(square_of_sizes / square)));
        }
      }
    }
    // Sums of D, R and E terms, their products, the length and its quotient.
    const double relative = testing::gamma<T>(3.0 * inputs + 2.0 * ranks + 2.0 * experts + 12.0);
    const auto compare = [&](const matrix<T, cpu>& y) {
      for (index n = 0; n < tokens; ++n) {
        for (index o = 0; o < outputs; ++o) {
          CHECK(std::abs(static_cast<double>(y(n, o)) - expected(n, o)) <= relative * size(n, o));
        }
      }
    };
    context<cpu> ctx(2);
    matrix<T, cpu> y(tokens, outputs);
    expert.forward_masked(ctx, p, gates, x, y.view());
    compare(y);
    matrix<std::uint32_t, cpu> on(tokens, 1);
    for (index n = 0; n < tokens; ++n) on(n, 0) = 7u;
    segments<cpu> s = make_segments(ctx.memory, tokens, experts, tokens * experts);
    const auto slot_gates = ctx.memory.template take<T>(tokens * experts);
    ops::build_segments(ctx, on.view(), gates.view(), s, slot_gates);
    matrix<T, cpu> x_slots(s.capacity(), inputs), y_slots(s.capacity(), outputs);
    ops::gather(ctx, s, x.view(), x_slots.view());
    expert.forward_grouped(ctx, p, s, slot_gates, x_slots, y_slots.view());
    ops::combine(ctx, s, y_slots.view(), y.view(), grad_mode::overwrite);
    compare(y);
  }

  TEST_CASE("a bank on a base of somebody else looks at it and leaves it alone") {
    generator random(2);
    matrix<float, cpu> base(3, 4);
    fill_normal(base.view(), 1.0, random);
    const dora expert{.rank = 2};
    auto p = expert.adapt<float, cpu>(base.view(), 5, random, "expert.");
    CHECK(p.base.value().data == base.data());
    CHECK_FALSE(p.base.trainable());
    std::string names;
    p.visit([&](const parameter<float, cpu>& q) { names += q.name() + " "; });
    CHECK(names == "expert.A expert.B expert.magnitude ");
    CHECK(p.magnitude.rows() == 5);
    for (index o = 0; o < 3; ++o) {
      double square = 0.0;
      for (index d = 0; d < 4; ++d) square += double(base(o, d)) * double(base(o, d));
      CHECK(std::abs(double(p.magnitude.value()(4, o)) - std::sqrt(square)) <=
            testing::gamma<float>(6.0) * std::sqrt(square));
    }
    const index chosen[] = {1, 4};
    expert.train_experts(p, chosen);
    CHECK(p.a.trained_size() == 2 * 2 * 4);
    CHECK(p.b.trained_size() == 2 * 2 * 3);
    CHECK(p.magnitude.trained_size() == 2 * 3);
  }

  TEST_CASE("ranges") {
    CHECK_THROWS_WITH_AS(dora{.rank = 0}.validate(),
                         "talpa::dora: 'rank' is 0, expected >= 1 = width of the adapter",
                         value_error);
    CHECK_THROWS_WITH_AS(dora{.dropout = 1.0}.validate(),
                         "talpa::dora: 'dropout' is 1, expected 0 <= dropout < 1", value_error);
  }
}

}  // namespace talpa::dora_test
