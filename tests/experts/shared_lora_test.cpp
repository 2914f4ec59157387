// SPDX-License-Identifier: Apache-2.0
#include "support/laws.hpp"
#include "support/scalars.hpp"

#include <talpa/cpu/gather.hpp>
#include <talpa/cpu/gemm.hpp>
#include <talpa/cpu/grouped_gemm.hpp>
#include <talpa/cpu/rank_gate.hpp>
#include <talpa/cpu/rank_share.hpp>
#include <talpa/cpu/segments.hpp>
#include <talpa/experts/lora.hpp>
#include <talpa/experts/shared_lora.hpp>
#include <talpa/testing/expert_laws.hpp>

#include <doctest/doctest.h>

#include <algorithm>
#include <concepts>

namespace talpa::shared_lora_test {

namespace {

/// y of an expert's masked form on the same inputs.
template <class Expert>
matrix<double, cpu> evaluate(const Expert& expert,
                             const typename Expert::template params<double, cpu>& p,
                             const matrix<double, cpu>& gates, const matrix<double, cpu>& x) {
  matrix<double, cpu> y(x.rows(), 4);
  context<cpu> ctx(1);
  expert.forward_masked(ctx, p, gates, x, y.view());
  return y;
}

/// lora with copies of the shared factor is the same function. Sums of E R and D terms.
template <class Expert, class Copy>
void equals_copies(const Expert& expert, Copy copy) {
  constexpr index tokens = 6, inputs = 5, outputs = 4, experts = 3;
  generator random(9);
  auto p = expert.template init<double, cpu>(inputs, outputs, experts, random, "");
  p.visit([&](parameter<double, cpu>& q) { fill_normal(q.value(), 1.0, random); });
  const lora plain{.rank = expert.rank, .alpha = expert.alpha, .scaling = expert.scaling};
  auto whole = plain.init<double, cpu>(inputs, outputs, experts, random, "");
  copy(p, whole, experts);
  matrix<double, cpu> gates(tokens, experts), x(tokens, inputs);
  fill_normal(gates.view(), 1.0, random);
  fill_normal(x.view(), 1.0, random);
  const matrix<double, cpu> found = evaluate(expert, p, gates, x);
  const matrix<double, cpu> expected = evaluate(plain, whole, gates, x);
  // Sums of absolute terms: lora with absolute values.
  const auto absolute = [](matrix_view<double, cpu> m) {
    for (index r = 0; r < m.rows; ++r) {
      for (index c = 0; c < m.cols; ++c) m(r, c) = std::abs(m(r, c));
    }
  };
  absolute(whole.a.value());
  absolute(whole.b.value());
  absolute(gates.view());
  absolute(x.view());
  const matrix<double, cpu> size = evaluate(plain, whole, gates, x);
  CHECK(testing::first_excess(found.view(), expected.view(), [&](index r, index c) {
          return 2.0 * testing::gamma<double>(inputs + experts * 2.0 + 4.0) * size(r, c);
        }) == "");
}

void copy_rows(matrix_view<const double, cpu> from, matrix_view<double, cpu> to, index experts) {
  for (index e = 0; e < experts; ++e) {
    for (index r = 0; r < from.rows; ++r) {
      std::copy_n(from.row(r), from.cols, to.row(e * from.rows + r));
    }
  }
}

}  // namespace

TEST_SUITE("experts/shared_lora") {
  TEST_CASE_TEMPLATE("laws of shared_a_lora", T, TALPA_SCALARS) {
    support::obeys(testing::expert_laws<T>(shared_a_lora{.rank = 3, .alpha = 4.0}));
    support::obeys(testing::expert_laws<T>(
        shared_a_lora{.rank = 1, .alpha = -2.0, .scaling = lora_scaling::by_root_rank}, {},
        {.tokens = 5, .inputs = 1, .outputs = 1, .experts = 1}));
    if (std::same_as<T, double>) return;  // gradients are in double either way
    support::obeys(
        testing::expert_laws<float>(shared_a_lora{.rank = 2, .init_a = lora_init::gaussian}, {},
                                    {.tokens = 9, .inputs = 2, .outputs = 3, .experts = 33}));
  }
  TEST_CASE_TEMPLATE("laws of shared_b_lora", T, TALPA_SCALARS) {
    support::obeys(testing::expert_laws<T>(shared_b_lora{.rank = 3, .alpha = 4.0}));
    support::obeys(testing::expert_laws<T>(
        shared_b_lora{.rank = 1, .alpha = -2.0, .scaling = lora_scaling::by_root_rank}, {},
        {.tokens = 5, .inputs = 1, .outputs = 1, .experts = 1}));
    if (std::same_as<T, double>) return;  // gradients are in double either way
    support::obeys(
        testing::expert_laws<float>(shared_b_lora{.rank = 2, .init_a = lora_init::gaussian}, {},
                                    {.tokens = 9, .inputs = 2, .outputs = 3, .experts = 33}));
  }

  TEST_CASE("a shared factor is a bank of copies of it") {
    equals_copies(shared_a_lora{.rank = 2, .alpha = 3.0},
                  [](auto& p, lora::params<double, cpu>& whole, index experts) {
                    copy_rows(p.a.value(), whole.a.value(), experts);
                    copy_rows(p.b.value(), whole.b.value(), 1);
                  });
    equals_copies(shared_b_lora{.rank = 2, .alpha = 3.0},
                  [](auto& p, lora::params<double, cpu>& whole, index experts) {
                    copy_rows(p.a.value(), whole.a.value(), 1);
                    copy_rows(p.b.value(), whole.b.value(), experts);
                  });
  }

  TEST_CASE("ranges") {
    CHECK_THROWS_WITH_AS(shared_a_lora{.rank = 0}.validate(),
                         "talpa::shared_a_lora: 'rank' is 0, expected >= 1 = width of the adapter",
                         value_error);
    CHECK_THROWS_WITH_AS(shared_b_lora{.dropout = 1.0}.validate(),
                         "talpa::shared_b_lora: 'dropout' is 1, expected 0 <= dropout < 1",
                         value_error);
  }
}

}  // namespace talpa::shared_lora_test
