// SPDX-License-Identifier: Apache-2.0
// The scorer of docs/policies/scorer.md.
#include <talpa/talpa.hpp>
#include <talpa/testing/scorer_laws.hpp>

#include <doctest/doctest.h>

#include <string>

// [region scorer]
/// Scorer with one hidden layer: logits = silu(x V^T + c) W^T.
struct hidden_layer_scorer {
  static constexpr const char* name = "hidden_layer_scorer";

  talpa::index hidden = 16;  ///< H, >= 1

  template <class T, class B>
  struct params {
    talpa::affine_params<T, B> down;  // V [H, D], c [1, H]
    talpa::affine_params<T, B> up;    // W [E, H]

    template <class F>
    void visit(F f) {
      down.visit(f);
      up.visit(f);
    }
  };

  template <class T, class B>
  struct saved {
    talpa::matrix_view<T, B> a;  // [N, H] before silu
    talpa::matrix_view<T, B> h;  // [N, H] after it
  };

  template <class T, class B>
  params<T, B> init(talpa::index inputs, talpa::index experts, talpa::generator& random,
                    const std::string& prefix) const {
    talpa::check_at_least(name, "hidden", hidden, 1, "width of the hidden layer");
    params<T, B> p;
    p.down = talpa::init_affine<T, B>(inputs, hidden, true, true, random, prefix + "down.");
    p.up = talpa::init_affine<T, B>(hidden, experts, false, true, random, prefix + "up.");
    return p;
  }

  template <class T, class B>
  saved<T, B> forward(talpa::context<B>& ctx, const params<T, B>& p, talpa::input<T, B> x,
                      talpa::output<T, B> logits, talpa::mode,
                      const talpa::batch_info<T, B>&) const {
    // What backward reads lives in ctx.memory, until the caller's step ends.
    const saved<T, B> kept{ctx.memory.template take<T>(x.rows, hidden),
                           ctx.memory.template take<T>(x.rows, hidden)};
    talpa::affine_forward(ctx, p.down, x, kept.a);
    talpa::ops::activation(ctx, talpa::silu{}, kept.a, kept.h);
    talpa::affine_forward(ctx, p.up, kept.h, logits);
    return kept;
  }

  template <class T, class B>
  void backward(talpa::context<B>& ctx, params<T, B>& p, const saved<T, B>& kept,
                talpa::input<T, B> x, talpa::input<T, B> dlogits, talpa::output<T, B> dx,
                talpa::grad_mode dx_mode) const {
    // What only this call needs lives in ctx.scratch, until its scope ends.
    const typename talpa::workspace<B>::scope scope(ctx.scratch);
    const auto dh = ctx.scratch.template take<T>(x.rows, hidden);  // [N, H]
    talpa::affine_backward(ctx, p.up, kept.h, dlogits, dh, talpa::grad_mode::overwrite);
    talpa::ops::activation_backward(ctx, talpa::silu{}, kept.a, dh, dh,
                                    talpa::grad_mode::overwrite);
    talpa::affine_backward(ctx, p.down, x, dh, dx, dx_mode);
  }
};
static_assert(talpa::scorer_policy<hidden_layer_scorer>);
// [end scorer]

TEST_SUITE("docs/policies/scorer") {
  // [region laws]
  TEST_CASE("hidden_layer_scorer obeys the laws of scorers") {
    for (const talpa::index hidden : {1, 6}) {
      const hidden_layer_scorer scorer{.hidden = hidden};
      // A score is a sum of H outputs of one map, each times a weight below 4, with twice as many
      // roundings on the way.
      const talpa::testing::scorer_claims claims{.amplification =
                                                     8.0 * static_cast<double>(hidden)};
      talpa::testing::report laws = talpa::testing::scorer_laws<float>(scorer, claims);
      laws.add(talpa::testing::scorer_laws<double>(scorer, claims));
      CHECK_MESSAGE(laws.passed(), laws.text());
    }
  }
  // [end laws]

  TEST_CASE("the example scores as its formula says") {
    // V = 2, c = 1, W = (3, -1): a = 2 x + 1 and logits = (3, -1) silu(a). silu(0) = 0.
    talpa::context<talpa::cpu> ctx(1);
    talpa::generator random(1);
    const hidden_layer_scorer scorer{.hidden = 1};
    auto p = scorer.init<double, talpa::cpu>(1, 2, random, "router.");
    p.down.weight.value()(0, 0) = 2.0;
    p.down.bias.value()(0, 0) = 1.0;
    p.up.weight.value()(0, 0) = 3.0;
    p.up.weight.value()(1, 0) = -1.0;
    talpa::matrix<double, talpa::cpu> x(2, 1), logits(2, 2);
    x(0, 0) = -0.5;
    x(1, 0) = 1.0;
    scorer.forward(ctx, p, x, logits, talpa::mode::training,
                   talpa::batch_info<double, talpa::cpu>{});
    CHECK(logits(0, 0) == 0.0);
    CHECK(logits(0, 1) == 0.0);
    const double h = talpa::math::silu(3.0);
    CHECK(logits(1, 0) == 3.0 * h);
    CHECK(logits(1, 1) == -h);
  }

  TEST_CASE("the example names its parameters and refuses a hidden layer of width 0") {
    talpa::generator random(1);
    auto p = hidden_layer_scorer{}.init<float, talpa::cpu>(3, 2, random, "router.");
    std::string names;
    p.visit([&](const talpa::parameter<float, talpa::cpu>& q) { names += q.name() + " "; });
    CHECK(names == "router.down.weight router.down.bias router.up.weight ");
    CHECK_THROWS_WITH_AS(
        (hidden_layer_scorer{.hidden = 0}.init<float, talpa::cpu>(3, 2, random, "router.")),
        "talpa::hidden_layer_scorer: 'hidden' is 0, expected >= 1 = width of the hidden layer",
        talpa::value_error);
  }
}
