// SPDX-License-Identifier: Apache-2.0
#include "support/routed.hpp"
#include "support/scalars.hpp"
#include "support/tolerance.hpp"

#include <talpa/cpu/fill.hpp>
#include <talpa/cpu/group_loss.hpp>
#include <talpa/losses/entropy.hpp>

#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <vector>

namespace talpa::entropy_test {

using namespace support;

namespace {

/// H of a row by plain loops, from its definition; `shift` is the epsilon of DynMoLE's code.
enum class kind { shannon, tsallis, renyi };
double slow_entropy(kind k, double q, double shift, const std::vector<double>& p) {
  const auto e = static_cast<double>(p.size());
  if (p.size() == 1 && shift == 0.0) return 0.0;
  double plain = 0.0, power = 0.0;
  for (const double x : p) {
    if (x + shift > 0.0) plain -= (x + shift) * std::log(x + shift);
    if (x + shift > 0.0) power += std::pow(x + shift, q);
  }
  if (k == kind::shannon || q == 1.0) return plain / std::log(e);
  if (k == kind::tsallis) return (1.0 - power) / (1.0 - std::pow(e, 1.0 - q));
  return std::log(power + (shift > 0.0 ? 1e-10 : 0.0)) / (1.0 - q) / std::log(e);
}

/// Error of a mean entropy. A relative error d of a probability changes p ln p by (|ln p| + 1) p d
/// and p^q by q p^q d. For q in 1/2 .. 2 and E >= 2 the sums of these over experts, divided by the
/// greatest entropy, stay below 8. Where 1 - sum p^q is formed, it is divided by q - 1 >= 1/10.
template <class T>
double bound_of(index tokens, index experts, double spread) {
  return rounding_bound<T>(column_sum_roundings(tokens, 2) + softmax_roundings(experts, spread) +
                               static_cast<double>(experts) + 16.0,
                           80.0);
}

}  // namespace

TEST_SUITE("losses/entropy") {
  TEST_CASE_TEMPLATE("entropy_loss gives the value and gradient of an example worked by hand", T,
                     TALPA_SCALARS) {
    // p = (1/2, 1/2) and (3/4, 1/4). Tsallis of q = 2: (1 - sum p^2) / (1 - 1/2): 1 and
    // 2 (1 - 10/16) = 3/4; mean 7/8. dH/dp_e = -4 p_e; token 1: sum p dH/dp = -4 10/16 = -5/2,
    // dH/du_0 = 3/4 (-3 + 5/2) = -3/8, dH/du_1 = 1/4 (-1 + 5/2) = 3/8; half of it for the mean.
    routed_layer<T> layer(2, 2);
    layer.logits(1, 0) = static_cast<T>(std::log(3.0));
    context<cpu> ctx(1);
    const auto r = run_loss<T>(ctx, entropy_loss<entropy::tsallis>{.entropy = {.q = 2.0}}, {layer},
                               T{1}, grad_mode::overwrite, T{5});
    const double bound = bound_of<T>(2, 2, std::log(3.0));
    CHECK(within(r.value, 0.875, bound));
    CHECK(within(r.dlogits[0](0, 0), 0.0, bound));
    CHECK(within(r.dlogits[0](1, 0), -3.0 / 16.0, bound));
    CHECK(within(r.dlogits[0](1, 1), 3.0 / 16.0, bound));
    CHECK(largest(to_table(r.dgates[0].view())) == 0.0);
  }

  TEST_CASE_TEMPLATE("entropy_loss agrees with loops in double for thousands of rows", T,
                     TALPA_SCALARS) {
    test_random random(401);
    context<cpu> ctx(2);
    for (int trial = 0; trial < 40; ++trial) {
      const index experts = 2 + random.below(40), tokens = 1 + random.below(300);
      const std::vector<routed_layer<T>> layers = {
          random_layer<T>(random, tokens, experts, 1 + random.below(experts), 4),
          random_layer<T>(random, tokens, experts, 1)};
      const auto wide = all_widened(layers);
      const double bound = bound_of<T>(tokens, experts, spread_of(wide));
      const double q = trial % 4 == 0 ? 0.5 : trial % 4 == 1 ? 1.0 : trial % 4 == 2 ? 1.1 : 2.0;
      const double shift = trial % 3 == 0 ? 1e-5 : 0.0;
      const auto slow = [&](kind k) {
        return mean_over_tokens(wide, [&](const auto& layer, index n) {
          return slow_entropy(k, q, shift, probabilities(layer, n));
        });
      };
      CAPTURE(trial);
      CHECK(
          within(run_loss<T>(ctx, entropy_loss<entropy::shannon>{{.epsilon = shift}}, layers).value,
                 slow(kind::shannon), 2.0 * bound));
      CHECK(within(
          run_loss<T>(ctx, entropy_loss<entropy::tsallis>{{.q = q, .epsilon = shift}}, layers)
              .value,
          slow(kind::tsallis), 2.0 * bound));
      CHECK(within(
          run_loss<T>(ctx, entropy_loss<entropy::renyi>{{.q = q, .epsilon = shift}}, layers).value,
          slow(kind::renyi), 2.0 * bound));
    }
  }

  TEST_CASE("entropy_loss pools layers, or means over the sequences that live") {
    // Layer 0: three tokens of entropy 1; layer 1: one sure token. Sum of means 1, pooled 3/4.
    routed_layer<double> even(3, 2), sure(1, 2);
    sure.logits(0, 0) = 2000.0;
    context<cpu> ctx(1);
    const double bound = rounding_bound<double>(20.0, 1.0);
    const std::vector<routed_layer<double>> layers = {even, sure};
    CHECK(
        within(run_loss<double>(ctx, entropy_loss<entropy::shannon>{}, layers).value, 1.0, bound));
    CHECK(within(
        run_loss<double>(ctx, entropy_loss<entropy::shannon, balance::pooled>{}, layers).value,
        0.75, bound));
    // Sequences of two: means 1 and 1/2, the third is padding.
    routed_layer<double> cut(6, 2);
    cut.logits(2, 1) = 2000.0;
    cut.sequence_length = 2;
    cut.padding = vector<std::uint8_t, cpu>(6);
    for (index n = 0; n < 4; ++n) cut.padding[n] = 1;
    CHECK(within(
        run_loss<double>(ctx, entropy_loss<entropy::shannon, balance::per_sequence>{}, {cut}).value,
        0.75, bound));
  }

  TEST_CASE("entropy_loss leaves padding out, or counts it as the code of DynMoLE does") {
    // Real: entropy 0; padding: three tokens of entropy 1.
    routed_layer<double> layer(4, 2);
    layer.logits(0, 0) = 2000.0;
    layer.logits(1, 0) = 1.0;
    layer.padding = vector<std::uint8_t, cpu>(4);
    layer.padding[0] = 1;
    context<cpu> ctx(1);
    const auto out = run_loss<double>(ctx, entropy_loss<entropy::shannon>{}, {layer});
    CHECK(out.value == 0.0);
    CHECK(out.dlogits[0](1, 0) == 0.0);
    const double p = 1.0 / (1.0 + std::exp(-1.0));
    const double h = -(p * std::log(p) + (1.0 - p) * std::log(1.0 - p)) / std::log(2.0);
    const auto in =
        run_loss<double>(ctx, entropy_loss<entropy::shannon>{.include_padding = true}, {layer});
    CHECK(within(in.value, (h + 2.0) / 4.0, rounding_bound<double>(40.0, 1.0)));
    // dH/du_0 = p (1 - p) (ln(1 - p) - ln p) / ln 2 = -p (1 - p) / ln 2, a quarter of it.
    CHECK(within(in.dlogits[0](1, 0), -p * (1.0 - p) / std::log(2.0) / 4.0,
                 rounding_bound<double>(40.0, 1.0)));
  }

  TEST_CASE("entropy_loss is NaN for rows that cannot be routed") {
    context<cpu> ctx(1);
    for (const double bad : {std::nan(""), std::numeric_limits<double>::infinity()}) {
      routed_layer<double> layer(2, 3);
      layer.logits(1, 2) = bad;
      CHECK(std::isnan(run_loss<double>(ctx, entropy_loss<entropy::shannon>{}, {layer}).value));
    }
  }

  TEST_CASE("entropy_loss has the same bits for every lane group") {
    test_random random(402);
    for (const index experts : {1, 2, 32, 33, 70}) {
      CAPTURE(experts);
      routed_layer<float> layer = random_layer<float>(random, 21, experts, 1);
      add_control(random, layer);
      CHECK(row_term_difference(detail::entropy_row<entropy::tsallis>{}, layer) == "");
      // With epsilon one expert has no entropy but 0 / 0.
      if (experts == 1) continue;
      CHECK(row_term_difference(detail::entropy_row<entropy::shannon>{{.epsilon = 1e-5}}, layer) ==
            "");
    }
  }

  TEST_CASE("entropy_loss refuses numbers out of range") {
    context<cpu> ctx(1);
    const routed_layer<double> layer(2, 2);
    CHECK_THROWS_WITH_AS(
        run_loss<double>(ctx, entropy_loss<entropy::tsallis>{.entropy = {.q = 0.0}}, {layer}),
        "talpa::entropy_loss: 'entropy.q' is 0, expected a finite number > 0", value_error);
    CHECK_THROWS_WITH_AS(
        run_loss<double>(ctx, entropy_loss<entropy::shannon>{.entropy = {.epsilon = -1.0}},
                         {layer}),
        "talpa::entropy_loss: 'entropy.epsilon' is -1, expected a finite number >= 0", value_error);
  }
}

}  // namespace talpa::entropy_test
