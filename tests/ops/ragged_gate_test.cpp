// SPDX-License-Identifier: Apache-2.0
#include "support/random.hpp"
#include "support/scalars.hpp"
#include "support/tolerance.hpp"

#include <talpa/cpu/ragged_gate.hpp>
#include <talpa/testing/bounds.hpp>

#include <doctest/doctest.h>

#include <cmath>
#include <vector>

namespace talpa::ragged_gate_test {

TEST_SUITE("ops/ragged_gate") {
  TEST_CASE_TEMPLATE("each block is scaled by the gate and the scale of its expert", T,
                     TALPA_SCALARS) {
    constexpr index tokens = 300, experts = 3, ranks = 7, most = 4;
    std::vector<index> blocks{0, 1, 5, 7}, offsets{0, 170, 170, 300};
    const vector_view<const index, cpu> of_bank{blocks.data(), 4}, of_slots{offsets.data(), 4};
    support::test_random random(4);
    const matrix<T, cpu> gates = support::random_matrix<T>(random, tokens, experts);
    const matrix<T, cpu> u = support::random_matrix<T>(random, tokens, ranks);
    const matrix<T, cpu> dz = support::random_matrix<T>(random, tokens, ranks);
    std::vector<T> scales{T{2}, T{-0.5}, T{3}};
    const vector_view<const T, cpu> factor{scales.data(), 3};
    for (const int threads : {1, 3}) {
      context<cpu> ctx(threads);
      matrix<T, cpu> z(tokens, ranks), du = dz, dgates(tokens, experts);
      ops::ragged_gate(ctx, of_bank, factor, gates, u, z.view());
      ops::ragged_gate_backward(ctx, of_bank, factor, gates, u, du, du.view(), dgates.view());
      for (index n = 0; n < tokens; ++n) {
        for (index e = 0; e < experts; ++e) {
          const T g = scales[static_cast<std::size_t>(e)] * gates(n, e);
          double sum = 0.0, size = 0.0;
          for (index j = of_bank[e]; j < of_bank[e + 1]; ++j) {
            CHECK(z(n, j) == g * u(n, j));
            CHECK(du(n, j) == g * dz(n, j));
            sum += double(factor[e]) * double(dz(n, j)) * double(u(n, j));
            size += std::abs(double(factor[e]) * double(dz(n, j)) * double(u(n, j)));
          }
          CHECK(std::abs(double(dgates(n, e)) - sum) <= testing::gamma<T>(most + 2.0) * size);
        }
      }

      // The same numbers as slots: expert 0 has one rank, expert 1 no slots, expert 2 two ranks.
      matrix<T, cpu> z_slots(tokens, most), du_slots(tokens, most);
      vector<T, cpu> slot_gates(tokens), dslots(tokens);
      for (index i = 0; i < z_slots.size(); ++i) z_slots.data()[i] = T{1};
      for (index s = 0; s < tokens; ++s) slot_gates[s] = gates(s, 0);
      const auto u4 = u.view().col_range(0, most), dz4 = dz.view().col_range(0, most);
      ops::ragged_slot_gate(ctx, of_slots, of_bank, factor, slot_gates, u4, z_slots.view());
      ops::ragged_slot_gate_backward(ctx, of_slots, of_bank, factor, slot_gates, u4, dz4,
                                     du_slots.view(), dslots.view());
      for (index s = 0; s < tokens; ++s) {
        const index e = s < 170 ? 0 : 2, count = s < 170 ? 1 : 2;
        const T g = scales[static_cast<std::size_t>(e)] * slot_gates[s];
        double sum = 0.0, size = 0.0;
        for (index r = 0; r < most; ++r) {
          CHECK(z_slots(s, r) == (r < count ? g * u(s, r) : T{1}));
          CHECK(du_slots(s, r) == (r < count ? g * dz(s, r) : T{0}));
          if (r >= count) continue;
          sum += double(factor[e]) * double(dz(s, r)) * double(u(s, r));
          size += std::abs(double(factor[e]) * double(dz(s, r)) * double(u(s, r)));
        }
        CHECK(std::abs(double(dslots[s]) - sum) <= testing::gamma<T>(most + 2.0) * size);
      }
    }
  }

  TEST_CASE("ragged_gate names what does not fit") {
    context<cpu> ctx(1);
    std::vector<index> blocks{0, 1, 3};
    std::vector<float> scales{1.0f, 1.0f};
    const vector_view<const index, cpu> b{blocks.data(), 3};
    const vector_view<const float, cpu> f{scales.data(), 2};
    matrix<float, cpu> gates(4, 3), u(4, 3);
    CHECK_THROWS_WITH_AS(
        ops::ragged_gate(ctx, b, f, gates, u, u.view()),
        "talpa::ops::ragged_gate: 'blocks' has shape [3], expected [4] = experts + 1", shape_error);
    CHECK_THROWS_AS(ops::ragged_slot_gate(ctx, b, b, f, {scales.data(), 2}, u, u.view()),
                    shape_error);
  }
}

}  // namespace talpa::ragged_gate_test
