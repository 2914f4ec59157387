// SPDX-License-Identifier: Apache-2.0
#include "support/routed.hpp"
#include "support/sanitized.hpp"
#include "support/scalars.hpp"
#include "support/tolerance.hpp"

#include <talpa/cpu/fill.hpp>
#include <talpa/cpu/group_loss.hpp>
#include <talpa/losses/load_balance.hpp>

#include <doctest/doctest.h>

#include <limits>
#include <string>
#include <type_traits>
#include <vector>

namespace talpa::load_balance_test {

using namespace support;

namespace {

/// A form of the loss beside the words of the reference.
template <class Fraction, class Pooling>
struct form {
  using loss = load_balance<Fraction, Pooling>;
  static constexpr share kind = std::is_same_v<Fraction, balance::per_selection>
                                    ? share::per_selection
                                : std::is_same_v<Fraction, balance::per_token> ? share::per_token
                                : std::is_same_v<Fraction, balance::per_rank>  ? share::per_rank
                                                                               : share::soft_mass;
  static constexpr pool pooling = std::is_same_v<Pooling, balance::per_layer> ? pool::per_layer
                                  : std::is_same_v<Pooling, balance::pooled>  ? pool::pooled
                                                                              : pool::per_sequence;
};

/// Calls check(form) for every form.
template <class Check>
void for_each_form(Check check) {
  using namespace talpa::balance;
  const auto each_pooling = [&](auto fraction) {
    using Fraction = decltype(fraction);
    check(form<Fraction, per_layer>{});
    check(form<Fraction, pooled>{});
    check(form<Fraction, per_sequence>{});
  };
  each_pooling(per_selection{});
  each_pooling(per_token{});
  each_pooling(per_rank{});
  each_pooling(soft_mass{});
}

/// Two layers of sequences of 6 tokens, one expert that nobody uses where there are three or more,
/// padding included (a whole sequence of it in the second layer).
template <class T>
std::vector<routed_layer<T>> two_layers(std::uint64_t seed, index experts, index top) {
  test_random random(seed);
  std::vector<routed_layer<T>> layers;
  for (int l = 0; l < 2; ++l) {
    routed_layer<T> layer = random_layer<T>(random, 18, experts, top, 5);
    layer.sequence_length = 6;
    for (index n = 0; n < layer.tokens(); ++n) {
      if (l == 1 && n >= 12) {
        layer.padding[n] = 0;
        for (index w = 0; w < layer.mask.cols(); ++w) layer.mask(n, w) = 0;
        for (index e = 0; e < experts; ++e) layer.gates(n, e) = T{0};
      }
    }
    layers.push_back(std::move(layer));
  }
  return layers;
}

std::vector<routed_layer<double>> widened_all(const std::vector<routed_layer<float>>& layers) {
  std::vector<routed_layer<double>> w;
  for (const auto& layer : layers) w.push_back(widened(layer));
  return w;
}
std::vector<routed_layer<double>> widened_all(const std::vector<routed_layer<double>>& layers) {
  return layers;
}

/// Roundings of a value: softmax, two column sums, their ratio, E products and their sum, the mean
/// over groups.
double value_roundings(const std::vector<routed_layer<double>>& layers) {
  const index tokens = layers[0].tokens(), experts = layers[0].experts();
  return softmax_roundings(experts, spread_of(layers)) +
         2.0 * column_sum_roundings(tokens, static_cast<index>(layers.size())) +
         static_cast<double>(experts) + column_sum_roundings(tokens) + 8.0;
}

index fewest_real_tokens(pool pooling, const std::vector<routed_layer<double>>& layers) {
  index fewest = std::numeric_limits<index>::max();
  for (const auto& layer : layers) {
    const index length = pooling == pool::per_sequence ? layer.sequence_length : layer.tokens();
    for (index first = 0; first < layer.tokens(); first += length) {
      index real = 0;
      for (index n = first; n < first + length; ++n) real += layer.real(n) ? 1 : 0;
      if (real > 0) fewest = std::min(fewest, real);
    }
  }
  return fewest;
}

/// dvalue E / n p_e (f_e - sum p f) is at most 2 E / n for shares of at most 1.
double gradient_magnitude(pool pooling, const std::vector<routed_layer<double>>& layers) {
  return 2.0 * static_cast<double>(layers[0].experts()) /
         static_cast<double>(fewest_real_tokens(pooling, layers));
}

template <class T>
double gradient_bound(pool pooling, const std::vector<routed_layer<double>>& layers, double top) {
  const double magnitude = gradient_magnitude(pooling, layers);
  const double step = central_difference_step(1.0);
  // |p'''| <= 1/4 for a probability by its logit; the shares add up to `top` at most.
  const double third = magnitude * top / 4.0;
  return rounding_bound<T>(2.0 * value_roundings(layers), magnitude) +
         central_difference_bound(step, third, value_roundings(layers), 2.0 * top);
}

}  // namespace

TEST_SUITE("losses/load_balance") {
  TEST_CASE_TEMPLATE("load_balance gives the value and gradient of an example worked by hand", T,
                     TALPA_SCALARS) {
    // p = (1/4, 3/4) for three tokens that use expert 1, (3/4, 1/4) for one that uses expert 0:
    // f = (1/4, 3/4), P = (3/8, 5/8), E sum f P = 2 (3/32 + 15/32) = 9/8.
    routed_layer<T> layer(4, 2);
    for (index n = 0; n < 4; ++n) {
      layer.logits(n, n == 0 ? 0 : 1) = static_cast<T>(std::log(3.0));
      layer.turn_on(n, n == 0 ? 0 : 1, 0.75);
    }
    context<cpu> ctx(1);
    const load_balance<balance::per_selection, balance::per_layer> loss;
    const loss_result<T> result = run_loss<T>(ctx, loss, {layer});
    const double roundings = softmax_roundings(2, std::log(3.0)) + column_sum_roundings(4) + 10.0;
    CHECK(within(result.value, 1.125, rounding_bound<T>(roundings, 1.125)));
    // E / n p_0 (f_0 - p_0 f_0 - p_1 f_1): 1/2 1/4 (1/4 - 10/16) and 1/2 3/4 (1/4 - 6/16).
    const double bound = rounding_bound<T>(roundings, 1.0);
    CHECK(within(result.dlogits[0](1, 0), -3.0 / 64.0, bound));
    CHECK(within(result.dlogits[0](1, 1), 3.0 / 64.0, bound));
    CHECK(within(result.dlogits[0](0, 0), -3.0 / 64.0, bound));
    CHECK(result.dgates[0](0, 0) == T{0});
  }

  TEST_CASE("load_balance has its ideal value at perfect balance") {
    for_each_form([](auto f) {
      using F = decltype(f);
      // Token n uses experts n and n + 1 modulo 4, so each expert is used by 2 of 4 tokens.
      context<cpu> ctx(1);
      for (const index layers : {1, 2}) {
        std::vector<routed_layer<double>> in;
        for (index l = 0; l < layers; ++l) {
          routed_layer<double> layer(8, 4);
          layer.sequence_length = 4;
          for (index n = 0; n < 8; ++n) {
            for (index e = 0; e < 4; ++e) layer.logits(n, e) = e == n % 4 ? 0.5 : -0.25;
            layer.turn_on(n, n % 4, 0.5);
            layer.turn_on(n, (n + 1) % 4, 0.375);
          }
          in.push_back(layer);
        }
        const double ideal = typename F::loss{}.ideal(layers, 2.0, 0.875);
        const double value = run_loss<double>(ctx, typename F::loss{}, in).value;
        CHECK(within(value, ideal, rounding_bound<double>(value_roundings(in), ideal)));
      }
    });
  }

  TEST_CASE("load_balance documents 1, k and the mass of gates as ideal values") {
    using namespace balance;
    CHECK(load_balance<per_selection, pooled>{}.ideal(3, 2.0) == 1.0);
    CHECK(load_balance<per_selection, per_layer>{}.ideal(3, 2.0) == 3.0);
    CHECK(load_balance<per_selection, per_sequence>{}.ideal(1, 2.0) == 1.0);
    CHECK(load_balance<per_token, pooled>{}.ideal(3, 2.0) == 2.0);
    CHECK(load_balance<per_rank, per_layer>{}.ideal(3, 2.0) == 6.0);
    CHECK(load_balance<soft_mass, pooled>{}.ideal(3, 2.0, 0.75) == 0.75);
  }

  TEST_CASE("load_balance is E times its ideal value when one expert has everything") {
    routed_layer<double> layer(3, 5);
    for (index n = 0; n < 3; ++n) {
      for (index e = 0; e < 5; ++e) layer.logits(n, e) = e == 2 ? 0.0 : -1000.0;
      layer.turn_on(n, 2, 1.0);
    }
    context<cpu> ctx(1);
    using namespace balance;
    CHECK(run_loss<double>(ctx, load_balance<per_selection, per_layer>{}, {layer}).value == 5.0);
    CHECK(run_loss<double>(ctx, load_balance<per_rank, pooled>{}, {layer}).value == 5.0);
    CHECK(run_loss<double>(ctx, load_balance<soft_mass, per_sequence>{}, {layer}).value == 5.0);
  }

  TEST_CASE("load_balance agrees with loops in double, values") {
    for_each_form([](auto f) {
      using F = decltype(f);
      context<cpu> ctx(2);
      const auto check = [&](auto zero, std::uint64_t seed, index experts, index top) {
        using T = decltype(zero);
        const std::vector<routed_layer<T>> layers = two_layers<T>(seed, experts, top);
        const auto wide = widened_all(layers);
        const double expected = support::balance(F::kind, F::pooling, wide);
        const T value = run_loss<T>(ctx, typename F::loss{}, layers).value;
        CAPTURE(experts);
        CHECK(expected > 0.1);
        CHECK(within(value, expected, rounding_bound<T>(value_roundings(wide), expected)));
      };
      for (const index experts : {1, 2, 7, 33, 70}) {
        check(float{}, 11, experts, experts < 3 ? 1 : 3);
        check(double{}, 12, experts, experts < 3 ? 1 : 3);
      }
    });
  }

  TEST_CASE("load_balance agrees with loops in double on many blocks of tokens") {
    const auto check_form = [](auto f) {
      using F = decltype(f);
      test_random random(5);
      context<cpu> ctx(2);
      for (const index tokens : {127, 128, 129, 1000, 128 * 128 + 1}) {
        std::vector<routed_layer<float>> layers = {random_layer<float>(random, tokens, 4, 2, 9)};
        const auto wide = widened_all(layers);
        const double expected = support::balance(F::kind, F::pooling, wide);
        CAPTURE(tokens);
        CHECK(within(run_loss<float>(ctx, typename F::loss{}, layers).value, expected,
                     rounding_bound<float>(value_roundings(wide), expected)));
      }
    };
    check_form(form<balance::per_selection, balance::pooled>{});
    check_form(form<balance::soft_mass, balance::per_layer>{});
  }

  TEST_CASE("load_balance has the gradients of central differences") {
    for_each_form([](auto f) {
      using F = decltype(f);
      context<cpu> ctx(2);
      const auto check = [&](auto zero, index experts, index top) {
        using T = decltype(zero);
        const std::vector<routed_layer<T>> layers = two_layers<T>(21, experts, top);
        const auto wide = widened_all(layers);
        const loss_result<T> found = run_loss<T>(ctx, typename F::loss{}, layers);
        const double bound = gradient_bound<T>(F::pooling, wide, static_cast<double>(top));
        for (std::size_t l = 0; l < layers.size(); ++l) {
          const layer_gradient expected = numeric_gradient(
              wide, l, central_difference_step(1.0),
              [](const auto& at) { return support::balance(F::kind, F::pooling, at); });
          CHECK(difference(found.dlogits[l].view(), expected.dlogits, bound) == "");
          if (F::kind == share::soft_mass) {
            CHECK(difference(found.dgates[l].view(), expected.dgates, bound) == "");
          } else {
            CHECK(largest(to_table(found.dgates[l].view())) == 0.0);
          }
          CHECK(largest(expected.dlogits) > 100.0 * bound);
        }
      };
      check(float{}, 4, 2);
      check(double{}, 4, 2);
      // One difference for each logit, of loops over all of them.
      if (!support::sanitized) check(double{}, 34, 2);
    });
  }

  TEST_CASE("per_rank, summed over ranks, is per_token") {
    // The reference ranks each token's choices and forms the share of each rank by itself.
    const std::vector<routed_layer<double>> layers = two_layers<double>(31, 6, 3);
    const double by_rank = support::balance(share::per_rank, pool::pooled, layers);
    const double bound = rounding_bound<double>(value_roundings(layers), by_rank);
    CHECK(within(support::balance(share::per_token, pool::pooled, layers), by_rank, bound));
    context<cpu> ctx(1);
    const auto rank =
        run_loss<double>(ctx, load_balance<balance::per_rank, balance::pooled>{}, layers);
    const auto token =
        run_loss<double>(ctx, load_balance<balance::per_token, balance::pooled>{}, layers);
    CHECK(rank.value == token.value);
    CHECK(within(rank.value, by_rank, bound));
    CHECK(same_bits(rank.dlogits[1].view(), token.dlogits[1].view()));
  }

  TEST_CASE("pooled layers cancel opposite imbalances, single layers do not") {
    std::vector<routed_layer<double>> layers;
    for (index l = 0; l < 2; ++l) {
      routed_layer<double> layer(4, 2);
      for (index n = 0; n < 4; ++n) {
        layer.logits(n, l) = 30.0;
        layer.turn_on(n, l, 1.0);
      }
      layers.push_back(layer);
    }
    context<cpu> ctx(1);
    const auto pooled =
        run_loss<double>(ctx, load_balance<balance::per_selection, balance::pooled>{}, layers);
    const auto single =
        run_loss<double>(ctx, load_balance<balance::per_selection, balance::per_layer>{}, layers);
    const double bound = rounding_bound<double>(value_roundings(layers), 4.0);
    CHECK(within(pooled.value, 1.0, bound));
    // Both layers at E P_e = 2 (1 - e^-30).
    CHECK(within(single.value, 4.0, bound + 4.0 * std::exp(-30.0)));
    CHECK(largest(to_table(pooled.dlogits[0].view())) == 0.0);
    CHECK(largest(to_table(single.dlogits[0].view())) > 0.0);
  }

  TEST_CASE("pooled layers may have different numbers of tokens") {
    test_random random(3);
    const std::vector<routed_layer<double>> layers = {random_layer<double>(random, 7, 4, 2),
                                                      random_layer<double>(random, 12, 4, 1)};
    context<cpu> ctx(1);
    const double expected = support::balance(share::per_selection, pool::pooled, layers);
    const load_balance<balance::per_selection, balance::pooled> loss;
    CHECK(within(run_loss<double>(ctx, loss, layers).value, expected,
                 rounding_bound<double>(value_roundings(layers), expected)));
  }

  TEST_CASE("load_balance treats padding as absent") {
    const auto check_form = [](auto f) {
      using F = decltype(f);
      test_random random(77);
      const routed_layer<double> padded = random_layer<double>(random, 300, 5, 2, 3);
      const routed_layer<double> removed = without_padding(padded);
      REQUIRE(removed.tokens() < 250);
      context<cpu> ctx(1);
      const auto with = run_loss<double>(ctx, typename F::loss{}, {padded});
      const auto without = run_loss<double>(ctx, typename F::loss{}, {removed});
      const std::vector<routed_layer<double>> all = {removed};
      const double roundings = 2.0 * value_roundings(all);
      CHECK(within(with.value, without.value, rounding_bound<double>(roundings, without.value)));
      const double bound =
          rounding_bound<double>(2.0 * roundings, gradient_magnitude(pool::per_layer, all));
      index to = 0;
      for (index n = 0; n < padded.tokens(); ++n) {
        for (index e = 0; e < 5; ++e) {
          if (!padded.real(n)) {
            CHECK(with.dlogits[0](n, e) == 0.0);
            CHECK(with.dgates[0](n, e) == 0.0);
          } else {
            CHECK(within(with.dlogits[0](n, e), without.dlogits[0](to, e), bound));
            CHECK(within(with.dgates[0](n, e), without.dgates[0](to, e), bound));
          }
        }
        to += padded.real(n) ? 1 : 0;
      }
    };
    check_form(form<balance::per_selection, balance::per_layer>{});
    check_form(form<balance::per_token, balance::pooled>{});
    check_form(form<balance::soft_mass, balance::per_layer>{});
  }

  TEST_CASE("load_balance is 0 without gradient where there is no real token") {
    for_each_form([](auto f) {
      using F = decltype(f);
      test_random random(8);
      context<cpu> ctx(1);
      routed_layer<float> masked = random_layer<float>(random, 12, 3, 2, 2);
      masked.sequence_length = 4;
      for (index n = 0; n < 12; ++n) {
        masked.padding[n] = 0;
        masked.mask(n, 0) = 0;
        for (index e = 0; e < 3; ++e) masked.gates(n, e) = 0.0f;
      }
      const auto result =
          run_loss<float>(ctx, typename F::loss{}, {masked}, 1.0f, grad_mode::overwrite, 7.0f);
      CHECK(result.value == 0.0f);
      CHECK(largest(to_table(result.dlogits[0].view())) == 0.0);
      CHECK(largest(to_table(result.dgates[0].view())) == 0.0);

      routed_layer<float> empty(0, 3);
      CHECK(run_loss<float>(ctx, typename F::loss{}, {empty}).value == 0.0f);
      CHECK(run_loss<float>(ctx, typename F::loss{}, {}).value == 0.0f);
    });
  }

  TEST_CASE("load_balance without a selection is 0") {
    // Real tokens of which none uses an expert, as a threshold selector may give.
    routed_layer<double> layer(3, 2);
    layer.logits(0, 1) = 1.0;
    context<cpu> ctx(1);
    const auto result =
        run_loss<double>(ctx, load_balance<balance::per_selection, balance::per_layer>{}, {layer});
    CHECK(result.value == 0.0);
    CHECK(largest(to_table(result.dlogits[0].view())) == 0.0);
  }

  TEST_CASE("load_balance of one expert, and of all experts, is ideal without gradient") {
    test_random random(9);
    context<cpu> ctx(1);
    const load_balance<balance::per_token, balance::per_layer> loss;
    for (const index experts : {1, 6}) {
      const std::vector<routed_layer<double>> layers = {
          random_layer<double>(random, 5, experts, experts)};
      const auto result = run_loss<double>(ctx, loss, layers);
      const double ideal = loss.ideal(1, static_cast<double>(experts));
      CHECK(within(result.value, ideal, rounding_bound<double>(value_roundings(layers), ideal)));
      // f is 1 for every expert, so p (f - sum p f) is rounding only.
      CHECK(largest(to_table(result.dlogits[0].view())) <=
            rounding_bound<double>(value_roundings(layers),
                                   gradient_magnitude(pool::per_layer, layers)));
    }
  }

  TEST_CASE("load_balance takes -inf as a masked expert and shows NaN") {
    test_random random(13);
    routed_layer<double> layer = random_layer<double>(random, 6, 4, 2);
    layer.logits(2, ranked(layer, 2)[3]) = -std::numeric_limits<double>::infinity();
    const std::vector<routed_layer<double>> layers = {layer};
    context<cpu> ctx(1);
    const load_balance<balance::per_token, balance::per_layer> loss;
    const auto result = run_loss<double>(ctx, loss, layers);
    const double expected = support::balance(share::per_token, pool::per_layer, layers);
    CHECK(
        within(result.value, expected, rounding_bound<double>(value_roundings(layers), expected)));
    CHECK(result.dlogits[0](2, ranked(layer, 2)[3]) == 0.0);

    layer.logits(4, 1) = std::numeric_limits<double>::quiet_NaN();
    CHECK(std::isnan(run_loss<double>(ctx, loss, {layer}).value));
    for (index e = 0; e < 4; ++e) {
      layer.logits(4, e) = -std::numeric_limits<double>::infinity();
    }
    CHECK(std::isnan(run_loss<double>(ctx, loss, {layer}).value));
  }

  TEST_CASE(
      "load_balance adds in accumulate mode, does nothing in ignore mode and scales with dvalue") {
    for_each_form([](auto f) {
      using F = decltype(f);
      const std::vector<routed_layer<double>> layers = two_layers<double>(41, 5, 2);
      const typename F::loss loss;
      context<cpu> ctx(1);
      const auto once = run_loss<double>(ctx, loss, layers, 1.0);
      const auto half = run_loss<double>(ctx, loss, layers, 0.5, grad_mode::overwrite, 99.0);
      const auto added = run_loss<double>(ctx, loss, layers, 1.0, grad_mode::accumulate, 2.0);
      const auto ignored = run_loss<double>(ctx, loss, layers, 1.0, grad_mode::ignore, 2.0);
      for (std::size_t l = 0; l < layers.size(); ++l) {
        for (index n = 0; n < layers[l].tokens(); ++n) {
          for (index e = 0; e < 5; ++e) {
            CHECK(half.dlogits[l](n, e) == 0.5 * once.dlogits[l](n, e));
            CHECK(half.dgates[l](n, e) == 0.5 * once.dgates[l](n, e));
            CHECK(added.dlogits[l](n, e) == 2.0 + once.dlogits[l](n, e));
            CHECK(added.dgates[l](n, e) == 2.0 + once.dgates[l](n, e));
            CHECK(ignored.dlogits[l](n, e) == 2.0);
            CHECK(ignored.dgates[l](n, e) == 2.0);
          }
        }
      }
    });
  }

  TEST_CASE("load_balance has the same bits for any number of threads") {
    for_each_form([](auto f) {
      using F = decltype(f);
      test_random random(51);
      std::vector<routed_layer<float>> layers;
      for (int l = 0; l < 2; ++l) {
        layers.push_back(random_layer<float>(random, 1500, 12, 3, 7));
        layers.back().sequence_length = 50;
      }
      context<cpu> one(1);
      const auto expected = run_loss<float>(one, typename F::loss{}, layers);
      for (const int threads : {2, 3}) {
        context<cpu> ctx(threads);
        const auto found = run_loss<float>(ctx, typename F::loss{}, layers);
        CHECK(found.value == expected.value);
        for (std::size_t l = 0; l < layers.size(); ++l) {
          CHECK(same_bits(found.dlogits[l].view(), expected.dlogits[l].view()));
          CHECK(same_bits(found.dgates[l].view(), expected.dgates[l].view()));
        }
      }
    });
  }

  TEST_CASE("load_balance has the same bits for every lane group") {
    test_random random(81);
    for (const index experts : {1, 3, 32, 33, 70}) {
      CAPTURE(experts);
      CHECK(lane_group_difference<float>(detail::balance_group<balance::per_selection>{}, random,
                                         experts) == "");
      CHECK(lane_group_difference<double>(detail::balance_group<balance::per_rank>{}, random,
                                          experts) == "");
      CHECK(lane_group_difference<float>(detail::balance_group<balance::soft_mass>{}, random,
                                         experts) == "");
    }
  }

  TEST_CASE("load_balance takes one layer without a list, and no new memory in a second step") {
    test_random random(61);
    const routed_layer<double> layer = random_layer<double>(random, 400, 6, 2, 8);
    const load_balance<balance::soft_mass, balance::per_layer> loss;
    context<cpu> ctx(2);
    const auto listed = run_loss<double>(ctx, loss, {layer});
    matrix<double, cpu> dvalue(1, 1), dlogits(400, 6), dgates(400, 6);
    dvalue(0, 0) = 1.0;
    const index allocations = ctx.memory.allocations() + ctx.scratch.allocations();
    const workspace<cpu>::scope scope(ctx.memory);
    const auto saved = loss.forward(ctx, layer.view());
    loss.backward(ctx, layer.view(), saved, dvalue, {dlogits, dgates}, grad_mode::overwrite);
    CHECK(saved.value(0, 0) == listed.value);
    CHECK(same_bits(dlogits.view(), listed.dlogits[0].view()));
    CHECK(same_bits(dgates.view(), listed.dgates[0].view()));
    CHECK(ctx.memory.allocations() + ctx.scratch.allocations() == allocations);
  }

  TEST_CASE("load_balance refuses what does not fit") {
    test_random random(71);
    context<cpu> ctx(1);
    const std::vector<routed_layer<float>> unequal = {random_layer<float>(random, 4, 3, 1),
                                                      random_layer<float>(random, 4, 5, 1)};
    const load_balance<balance::per_token, balance::pooled> pooled;
    CHECK_THROWS_WITH_AS(run_loss<float>(ctx, pooled, unequal),
                         "talpa::load_balance: 'layers[1].logits' has shape [4, 5], expected [4, "
                         "3] = tokens, experts "
                         "of the first of the pooled layers",
                         shape_error);
    const load_balance<balance::per_token, balance::per_sequence> loss;
    CHECK_NOTHROW(run_loss<float>(ctx, loss, unequal));

    routed_layer<float> layer = random_layer<float>(random, 8, 3, 1);
    layer.sequence_length = 3;
    CHECK_THROWS_WITH_AS(run_loss<float>(ctx, loss, {layer}),
                         "talpa::load_balance: 'sequence_length' is 3, expected a divisor of 8 = "
                         "tokens, or 0",
                         value_error);
    layer.sequence_length = 0;
    layer.padding = vector<std::uint8_t, cpu>(7);
    CHECK_THROWS_WITH_AS(
        run_loss<float>(ctx, loss, {layer}),
        "talpa::load_balance: 'padding_mask' has shape [7], expected [8] = one flag a token",
        shape_error);
    layer.padding = vector<std::uint8_t, cpu>();
    layer.gates = matrix<float, cpu>(8, 2);
    CHECK_THROWS_WITH_AS(
        run_loss<float>(ctx, loss, {layer}),
        "talpa::load_balance: 'layers[0].gates' has shape [8, 2], expected [8, 3] = "
        "shape of logits",
        shape_error);
    layer.gates = matrix<float, cpu>(8, 3);
    layer.mask = matrix<std::uint32_t, cpu>(8, 2);
    CHECK_THROWS_WITH_AS(
        run_loss<float>(ctx, loss, {layer}),
        "talpa::load_balance: 'layers[0].mask' has shape [8, 2], expected [8, 1] = "
        "tokens, mask words of the experts",
        shape_error);
    layer.mask = matrix<std::uint32_t, cpu>(8, 1);

    const std::vector<routed_layer<float>> layers = {layer};
    const auto in = views(layers);
    const std::span<const routed_view<float, cpu>> span(in);
    const auto saved = loss.forward(ctx, span);
    matrix<float, cpu> dvalue(1, 1), right(8, 3), wrong(3, 8);
    std::vector<routed_gradient<float, cpu>> out;
    const auto backward = [&] {
      loss.backward(ctx, span, saved, dvalue, out, grad_mode::overwrite);
    };
    CHECK_THROWS_WITH_AS(backward(),
                         "talpa::load_balance: 'out' has shape [0], expected [1] = one pair of "
                         "gradients a layer",
                         shape_error);
    out = {{wrong, right}};
    CHECK_THROWS_WITH_AS(
        backward(),
        "talpa::load_balance: 'out[0].dlogits' has shape [3, 8], expected [8, 3] = "
        "shape of logits",
        shape_error);
    out = {{right, wrong}};
    CHECK_THROWS_WITH_AS(backward(),
                         "talpa::load_balance: 'out[0].dgates' has shape [3, 8], expected [8, 3] = "
                         "shape of logits",
                         shape_error);
    out = {{right, right}};
    dvalue = matrix<float, cpu>(1, 2);
    CHECK_THROWS_WITH_AS(
        backward(), "talpa::load_balance: 'dvalue' has shape [1, 2], expected [1, 1] = one number",
        shape_error);
    dvalue = matrix<float, cpu>(1, 1);
    CHECK_NOTHROW(backward());
    const auto shorter = loss.forward(ctx, span.first(0));
    CHECK_THROWS_WITH_AS(loss.backward(ctx, span, shorter, dvalue, out, grad_mode::overwrite),
                         "talpa::load_balance: 'saved' has shape [0], expected [3] = groups and "
                         "experts of layers",
                         shape_error);
  }

  TEST_CASE("totals that a forward left are read where they are those of the groups") {
    test_random random(57);
    routed_layer<double> layer = random_layer<double>(random, 8, 3, 2, 4);
    layer.sequence_length = 4;
    context<cpu> ctx(1);
    const auto value = [&](const auto& loss, const routed_view<double, cpu>& view) {
      return loss.forward(ctx, view).value(0, 0);
    };
    const load_balance<balance::per_selection, balance::per_layer> whole;
    const load_balance<balance::per_selection, balance::per_sequence> sequences;
    const load_balance<balance::per_selection, balance::pooled> pooled;
    const load_balance<balance::soft_mass, balance::per_layer> soft;
    // Totals of a routing that uses expert 0 alone, so that who reads them is seen by the value.
    vector<index, cpu> tokens(1);
    matrix<index, cpu> counts(1, 3);
    matrix<double, cpu> probability(1, 3);
    tokens[0] = counts(0, 0) = 8;
    probability(0, 0) = 8.0;
    routed_view<double, cpu> known = layer.view();
    known.totals.out.tokens = tokens;
    known.totals.out.counts = counts;
    known.totals.out.probability = probability;
    CHECK(value(whole, layer.view()) < 2.0);
    CHECK(value(whole, known) == 3.0);
    CHECK(value(sequences, known) == value(sequences, layer.view()));
    CHECK(value(pooled, known) == value(pooled, layer.view()));
    CHECK(value(soft, known) == value(soft, layer.view()));
    known.totals.mode = grad_mode::accumulate;
    CHECK(value(whole, known) == value(whole, layer.view()));
  }
}

}  // namespace talpa::load_balance_test
