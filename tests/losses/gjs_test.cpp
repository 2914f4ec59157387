// SPDX-License-Identifier: Apache-2.0
#include "support/routed.hpp"
#include "support/scalars.hpp"
#include "support/tolerance.hpp"

#include <talpa/cpu/fill.hpp>
#include <talpa/cpu/group_loss.hpp>
#include <talpa/losses/gjs.hpp>

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace talpa::gjs_test {

using namespace support;

namespace {

/// The loss of one layer by plain loops.
double slow_gjs(const gjs& loss, const routed_layer<double>& layer) {
  const auto size = static_cast<std::size_t>(layer.experts());
  if (size == 1) return 0.0;
  const double greatest = std::log(static_cast<double>(size));
  const auto entropy_of = [&](const std::vector<double>& p) {
    double h = 0.0;
    for (const double x : p) h -= x > 0.0 ? x * std::log(x + loss.epsilon) : 0.0;
    return h;
  };
  std::vector<double> mean(size, 0.0);
  double certain = 0.0, real = 0.0;
  for (index n = 0; n < layer.tokens(); ++n) {
    if (!layer.real(n)) continue;
    const std::vector<double> p = probabilities(layer, n);
    for (std::size_t e = 0; e < size; ++e) mean[e] += p[e];
    certain += std::max(entropy_of(p), loss.certainty * greatest);
    real += 1.0;
  }
  if (real == 0.0) return 0.0;
  for (double& x : mean) x /= real;
  const double found = std::min(entropy_of(mean), loss.balance * greatest) - certain / real;
  return std::max(0.0, (loss.balance - loss.certainty) * greatest - found) / greatest;
}

/// Entropies as parts of ln E >= ln 2, each wrong by (|ln p| + 1) p times the relative error of p:
/// at most (ln E + 1) / ln E < 3, and three of them.
template <class T>
double bound_of(index tokens, index experts, double spread) {
  return rounding_bound<T>(column_sum_roundings(tokens, 1) + softmax_roundings(experts, spread) +
                               static_cast<double>(experts) + 20.0,
                           9.0);
}

}  // namespace

TEST_SUITE("losses/gjs") {
  TEST_CASE_TEMPLATE("gjs gives the value and gradient of an example worked by hand", T,
                     TALPA_SCALARS) {
    // E = 2, both tokens p = (3/4, 1/4), balance 1, certainty 0: mean and token have the same
    // entropy, so the value is 1 and moves only as the two differ: not at all to first order.
    routed_layer<T> same(2, 2);
    same.logits(0, 0) = same.logits(1, 0) = static_cast<T>(std::log(3.0));
    const gjs plain{.balance = 1.0, .certainty = 0.0, .epsilon = 0.0};
    context<cpu> ctx(1);
    const double bound = bound_of<T>(2, 2, std::log(3.0));
    const auto alike = run_loss<T>(ctx, plain, {same}, T{1}, grad_mode::overwrite, T{5});
    CHECK(within(alike.value, 1.0, bound));
    CHECK(largest(to_table(alike.dlogits[0].view())) <= bound);
    // p = (3/4, 1/4) and (1/4, 3/4): the mean is even, H = ln 2, the tokens have h = 2 ln 2 -
    // 3/4 ln 3; value (ln 2 - ln 2 + h) / ln 2 = h / ln 2. The mean's gradient is 0; token 0:
    // dh/du_0 = p_0 p_1 (ln p_1 - ln p_0) = -3/16 ln 3, half of it over ln 2.
    routed_layer<T> apart(2, 2);
    apart.logits(0, 0) = apart.logits(1, 1) = static_cast<T>(std::log(3.0));
    const auto r = run_loss<T>(ctx, plain, {apart}, T{1}, grad_mode::overwrite, T{5});
    const double two = std::log(2.0), three = std::log(3.0);
    CHECK(within(r.value, (2.0 * two - 0.75 * three) / two, bound));
    CHECK(within(r.dlogits[0](0, 0), -3.0 / 32.0 * three / two, bound));
    CHECK(within(r.dlogits[0](0, 1), 3.0 / 32.0 * three / two, bound));
    CHECK(largest(to_table(r.dgates[0].view())) == 0.0);
  }

  TEST_CASE_TEMPLATE("gjs agrees with loops in double for thousands of rows", T, TALPA_SCALARS) {
    test_random random(421);
    context<cpu> ctx(2);
    for (int trial = 0; trial < 60; ++trial) {
      const index experts = 1 + random.below(40), tokens = 1 + random.below(200);
      const std::vector<routed_layer<T>> layers = {random_layer<T>(random, tokens, experts, 1, 4)};
      const auto wide = all_widened(layers);
      const double b = random.uniform(0.3, 1.0);
      const gjs loss{.balance = b, .certainty = random.uniform(0.0, b)};
      CAPTURE(trial);
      CHECK(within(run_loss<T>(ctx, loss, layers).value, slow_gjs(loss, wide[0]),
                   bound_of<T>(tokens, experts, spread_of(wide))));
    }
  }

  TEST_CASE("gjs is 0 for sure tokens used evenly, b for sure tokens of one expert, at most that") {
    routed_layer<double> even(4, 4), one(4, 4);
    for (index n = 0; n < 4; ++n) even.logits(n, n) = one.logits(n, 1) = 2000.0;
    context<cpu> ctx(1);
    const auto best = run_loss<double>(ctx, gjs{}, {even});
    CHECK(best.value == 0.0);
    CHECK(largest(to_table(best.dlogits[0].view())) == 0.0);
    // epsilon makes ln(1 + epsilon) of every logarithm.
    CHECK(within(run_loss<double>(ctx, gjs{}, {one}).value, 0.98, 2e-9));
    test_random random(422);
    for (int trial = 0; trial < 200; ++trial) {
      const routed_layer<double> layer = random_layer<double>(random, 5, 6, 1);
      const double value = run_loss<double>(ctx, gjs{}, {layer}).value;
      CHECK(value >= 0.0);
      CHECK(value <= 0.98);
    }
  }

  TEST_CASE("gjs is NaN for rows that cannot be routed") {
    context<cpu> ctx(1);
    routed_layer<double> layer(2, 3);
    layer.logits(1, 2) = std::nan("");
    CHECK(std::isnan(run_loss<double>(ctx, gjs{}, {layer}).value));
  }

  TEST_CASE("gjs has the same bits for every lane group") {
    test_random random(423);
    for (const index experts : {1, 2, 32, 33, 70}) {
      CAPTURE(experts);
      routed_layer<float> layer = random_layer<float>(random, 21, experts, 1);
      add_control(random, layer);
      CHECK(row_term_difference(detail::floored_entropy_row{0.5, 1e-9}, layer) == "");
      CHECK(lane_group_difference<float>(detail::gjs_group{{0.5, 1e-9}, 0.98}, random, experts) ==
            "");
    }
  }

  TEST_CASE("gjs refuses numbers out of range") {
    context<cpu> ctx(1);
    const routed_layer<double> layer(2, 2);
    CHECK_THROWS_WITH_AS(run_loss<double>(ctx, gjs{.balance = 1.5}, {layer}),
                         "talpa::gjs: 'balance' is 1.5, expected 0..1", value_error);
    CHECK_THROWS_WITH_AS(run_loss<double>(ctx, gjs{.balance = 0.5, .certainty = 0.75}, {layer}),
                         "talpa::gjs: 'certainty' is 0.75, expected 0..balance", value_error);
    CHECK_THROWS_WITH_AS(run_loss<double>(ctx, gjs{.epsilon = -1.0}, {layer}),
                         "talpa::gjs: 'epsilon' is -1, expected 0..1", value_error);
  }
}

}  // namespace talpa::gjs_test
