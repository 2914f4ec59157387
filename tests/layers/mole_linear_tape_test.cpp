// SPDX-License-Identifier: Apache-2.0
#include "layers/slow_mole.hpp"
#include "support/scalars.hpp"

#include <talpa/autograd/tape.hpp>
#include <talpa/cpu/activation.hpp>
#include <talpa/cpu/cross_entropy.hpp>
#include <talpa/cpu/group_loss.hpp>
#include <talpa/cpu/layer_norm.hpp>
#include <talpa/cpu/mse.hpp>
#include <talpa/cpu/mul.hpp>
#include <talpa/cpu/routing_sums.hpp>
#include <talpa/cpu/scale.hpp>
#include <talpa/cpu/softmax.hpp>
#include <talpa/losses/load_balance.hpp>

#include <doctest/doctest.h>

#include <vector>

namespace talpa::mole_linear_tape_test {

TEST_SUITE("layers/mole_linear_tape") {
  TEST_CASE_TEMPLATE("a step on the tape is forward and backward by hand, bit for bit", T,
                     TALPA_SCALARS) {
    using loss = load_balance<balance::per_selection, balance::per_layer>;
    const T weight = T{0.25};
    const support::mole_sizes s{.tokens = 29, .inputs = 9, .outputs = 6, .experts = 5, .rank = 2};
    support::test_random random(61);
    const matrix<T, cpu> x = support::random_matrix<T>(random, s.tokens, s.inputs);
    const matrix<T, cpu> goal = support::random_matrix<T>(random, s.tokens, s.outputs);
    vector<std::uint8_t, cpu> real(s.tokens);
    for (index n = 0; n < s.tokens; ++n) real[n] = n % 5 == 2 ? 0 : 1;
    for (const strategy execution : {strategy::dense_masked, strategy::grouped}) {
      CAPTURE(strategy_name(execution));
      const auto layer = support::make_mole(s, top_k<gate::renormalised>{.k = 2}, execution, 0.25);
      auto by_hand = support::make_params<T>(layer, s, 12, false), on_tape = by_hand;
      context<cpu> ctx(2);

      matrix<T, cpu> y(s.tokens, s.outputs), dy(s.tokens, s.outputs), dx(s.tokens, s.inputs);
      matrix<T, cpu> dlogits(s.tokens, s.experts), dgates(s.tokens, s.experts), one(1, 1);
      generator first(13);
      testing::detail::fill_gradients<T>(by_hand, T{0});
      {
        const workspace<cpu>::scope step(ctx.memory);
        const auto kept = layer.forward(ctx, by_hand, x, y.view(), mode::training,
                                        {.padding_mask = real.view(), .random = &first});
        const auto value = loss{}.forward(ctx, kept.routed);
        const routed_gradient<T, cpu> from_losses{dlogits.view(), dgates.view()};
        one(0, 0) = weight;
        loss{}.backward(ctx, kept.routed, value, one, from_losses, grad_mode::overwrite);
        one(0, 0) = T{1};
        ops::mse_backward(ctx, y, goal, one, dy.view(), grad_mode::overwrite);
        layer.backward(ctx, by_hand, kept, x, dy, dx.view(), grad_mode::overwrite, &from_losses);
      }

      generator second(13);
      testing::detail::fill_gradients<T>(on_tape, T{0});
      tape<T, cpu> t(ctx);
      const auto input = t.leaf(x);
      const auto applied = t.apply(layer, on_tape, input, mode::training,
                                   {.padding_mask = real.view(), .random = &second});
      t.backward(t.weighted_sum({{t.mse(applied.y, t.constant(goal)), T{1}},
                                 {t.apply_loss(loss{}, {applied.routed}), weight}}));

      CHECK(testing::first_difference<T>(applied.y.value(), y) == "");
      CHECK(testing::first_difference<T>(input.grad(), dx) == "");
      CHECK(testing::largest(dx.view()) > 0.0);
      const auto found = testing::detail::gradients_of<T>(on_tape),
                 expected = testing::detail::gradients_of<T>(by_hand);
      // Weight and bias of base and router, A and B.
      REQUIRE(expected.size() == 6);
      CHECK(testing::detail::first_difference(found, expected) == "");
      for (const matrix<T, cpu>& gradient : expected) {
        CHECK(testing::largest(gradient.view()) > 0.0);
      }
    }
  }
}

}  // namespace talpa::mole_linear_tape_test
