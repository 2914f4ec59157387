// SPDX-License-Identifier: Apache-2.0
// The loss of docs/policies/loss.md.
#include <talpa/talpa.hpp>
#include <talpa/testing/loss_laws.hpp>

#include <doctest/doctest.h>

#include <span>

// [region loss]
/// E sum_e P_e^2 of one group of tokens, P the mean of softmax(logits): 1 when the router likes all
/// experts equally, E when it likes one only.
struct concentration_group {
  static constexpr talpa::used_totals uses{.probability = true};

  template <class G, class T>
  TALPA_HD auto operator()(const G& g, const talpa::totals_row<T>& in,
                           const talpa::totals_derivative_row<T>& out) const
      -> talpa::group_value<typename G::template value<T>> {
    // A group without real tokens gives 0.
    const auto tokens = g.uniform(in.tokens > T{0} ? in.tokens : T{1});
    const auto experts = g.uniform(static_cast<T>(g.experts()));
    const auto mean = [&](auto e) { return g.load(in.probability, e, T{0}) / tokens; };
    // in.probability is the sum over tokens, so that d P_e / d sum = 1 / tokens.
    g.for_each([&](auto e) {
      const auto twice = mean(e) + mean(e);
      g.store(out.probability, e, talpa::math::mul(experts, twice) / tokens);
    });
    const auto squares =
        g.template sum<T>([&](auto e) { return talpa::math::mul(mean(e), mean(e)); });
    return {talpa::math::mul(experts, squares), g.uniform(T{0})};
  }
};

/// Loss that is the concentration of each layer, summed over layers.
struct concentration {
  static constexpr const char* name = "concentration";

  template <class T, class B>
  using saved = talpa::group_loss_saved<T, B>;

  template <class T, class B>
  saved<T, B> forward(talpa::context<B>& ctx,
                      std::span<const talpa::routed_view<T, B>> layers) const {
    return talpa::group_loss_forward(ctx, name, talpa::token_groups::layer, concentration_group{},
                                     layers);
  }

  template <class T, class B>
  void backward(talpa::context<B>& ctx, std::span<const talpa::routed_view<T, B>> layers,
                const talpa::group_loss_saved<T, B>& kept, talpa::input<T, B> dvalue,
                std::span<const talpa::routed_gradient<T, B>> out, talpa::grad_mode mode) const {
    talpa::group_loss_backward<concentration_group>(ctx, name, talpa::token_groups::layer, layers,
                                                    kept, dvalue, out, mode);
  }
};
static_assert(talpa::loss_policy<concentration>);
// [end loss]

namespace {

using talpa::cpu;

/// Value of the loss for one layer of N tokens whose logits `logit(n, e)` gives.
template <class Logit>
double value_of(talpa::index tokens, talpa::index experts, Logit logit) {
  talpa::context<cpu> ctx(1);
  talpa::matrix<double, cpu> logits(tokens, experts);
  talpa::routing<double, cpu> routing(tokens, experts);
  for (talpa::index n = 0; n < tokens; ++n) {
    for (talpa::index e = 0; e < experts; ++e) logits(n, e) = logit(n, e);
  }
  const talpa::routed_view<double, cpu> layer{logits.view(), routing.view()};
  const auto kept = concentration{}.forward(ctx, std::span(&layer, 1));
  return talpa::ops::item(ctx, kept.value);
}

}  // namespace

TEST_SUITE("docs/policies/loss") {
  TEST_CASE("the example obeys the laws of losses") {
    const talpa::testing::loss_claims claims{.at_balance = 1.0};
    for (const talpa::index experts : {1, 2, 5, 33}) {
      talpa::testing::report laws =
          talpa::testing::loss_laws<float>(concentration{}, experts, claims);
      laws.add(talpa::testing::loss_laws<double>(concentration{}, experts, claims));
      CHECK_MESSAGE(laws.passed(), laws.text());
    }
  }

  TEST_CASE("the example is 1 when the router likes all experts equally") {
    CHECK(value_of(8, 4, [](talpa::index, talpa::index) { return 0.25; }) == 1.0);
  }

  TEST_CASE("the example is E when the router likes one expert only") {
    // exp(-1000) is 0 in double: the probabilities are exactly 0 and 1.
    CHECK(value_of(8, 4, [](talpa::index, talpa::index e) { return e == 2 ? 1000.0 : 0.0; }) ==
          4.0);
  }

  TEST_CASE("the example is 1 when tokens spread evenly, each sure of its expert") {
    CHECK(value_of(8, 4, [](talpa::index n, talpa::index e) { return e == n % 4 ? 1e3 : 0.0; }) ==
          1.0);
  }

  TEST_CASE("the example is 0 without tokens") {
    CHECK(value_of(0, 4, [](talpa::index, talpa::index) { return 0.0; }) == 0.0);
  }
}
