// SPDX-License-Identifier: Apache-2.0
// What docs/pitfalls.md says about memory.
#include <talpa/talpa.hpp>

#include <doctest/doctest.h>

#include <cstddef>
#include <utility>

namespace {

using talpa::cpu;
using matrix = talpa::matrix<float, cpu>;
using router = talpa::router<talpa::linear_scorer, talpa::top_k<talpa::gate::raw>>;
using layer_type = talpa::mole_linear<router, talpa::lora>;

struct setting {
  layer_type layer{.router = {.selector = {.k = 2}}, .expert = {.rank = 2}, .experts = 4};
  layer_type::params<float, cpu> params;
  matrix x{16, 8}, y{16, 6}, dy{16, 6};  // [N, D], [N, O]

  setting() {
    talpa::generator random(3);
    auto base = talpa::linear{}.init<float, cpu>(8, 6, random, "base.");
    base.freeze();
    params = layer.init(std::move(base), random);
    talpa::fill_normal(x.view(), 1.0, random);
    talpa::fill_normal(dy.view(), 1.0, random);
  }
};

}  // namespace

TEST_SUITE("docs/pitfalls") {
  TEST_CASE("a scope around each step keeps the arenas as they are after the first step") {
    setting s;
    // References, not a structured binding: clang 14 does not capture those.
    auto& layer = s.layer;
    auto& params = s.params;
    auto &x = s.x, &y = s.y, &dy = s.dy;
    talpa::context<cpu> ctx(1);
    const auto train_step = [&] {
      // [region scope]
      const talpa::workspace<talpa::cpu>::scope step(ctx.memory);
      const auto saved = layer.forward(ctx, params, x, y, talpa::mode::training);
      layer.backward(ctx, params, saved, x, dy, {}, talpa::grad_mode::ignore);
      // [end scope]
      CHECK(ctx.memory.used() > 0);
    };
    train_step();
    const talpa::index blocks = ctx.memory.allocations() + ctx.scratch.allocations();
    for (int repeat = 0; repeat < 4; ++repeat) {
      train_step();
      CHECK(ctx.memory.allocations() + ctx.scratch.allocations() == blocks);
    }
    CHECK(ctx.memory.used() == 0);
  }

  TEST_CASE("without a scope every step keeps what it saved") {
    setting s;
    talpa::context<cpu> ctx(1);
    std::size_t before = 0;
    for (int step = 0; step < 5; ++step) {
      s.layer.forward(ctx, s.params, s.x, s.y, talpa::mode::training);
      CHECK(ctx.memory.used() > before);
      before = ctx.memory.used();
    }
  }

  TEST_CASE("infer keeps nothing") {
    setting s;
    talpa::context<cpu> ctx(1);
    talpa::infer(ctx, s.layer, s.params, s.x, s.y);
    CHECK(ctx.memory.used() == 0);
  }

  TEST_CASE("a fresh adapter gives no gradient to A and to the router") {
    setting s;
    talpa::context<cpu> ctx(1);
    const auto saved = s.layer.forward(ctx, s.params, s.x, s.y, talpa::mode::training);
    s.layer.backward(ctx, s.params, saved, s.x, s.dy, {}, talpa::grad_mode::ignore);
    const auto all_zero = [](const talpa::parameter<float, cpu>& p) {
      bool zero = true;
      for (talpa::index i = 0; i < p.trained_size(); ++i) zero = zero && p.grad().data[i] == 0.0F;
      return zero;
    };
    CHECK(all_zero(s.params.expert.a));
    CHECK(all_zero(s.params.router.scorer.weight));
    CHECK_FALSE(all_zero(s.params.expert.b));
  }

  TEST_CASE("dropout in training without a generator is an error") {
    setting s;
    s.layer.expert.dropout = 0.5;
    talpa::context<cpu> ctx(1);
    CHECK_THROWS_WITH_AS(
        s.layer.forward(ctx, s.params, s.x, s.y, talpa::mode::training),
        "talpa::mole_linear: 'batch.random' is null, expected a generator = source of the "
        "dropout mask in training",
        talpa::value_error);
    CHECK_NOTHROW(s.layer.forward(ctx, s.params, s.x, s.y, talpa::mode::inference));
  }
}
