// SPDX-License-Identifier: Apache-2.0
// The loss of docs/policies/loss.md.
#include <talpa/talpa.hpp>

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
