// SPDX-License-Identifier: Apache-2.0
// The placement of docs/policies/placement.md.
#include <talpa/talpa.hpp>
#include <talpa/testing/layer_laws.hpp>

#include <doctest/doctest.h>

#include <string>
#include <utility>

// [region placement]
/// Every adapter is on for every token, with gates that are learned numbers:
/// y = base(x) + sum_j v_j f_j(x).
struct learned_weights {
  static constexpr const char* name = "learned_weights";

  template <class T, class B>
  struct params {
    talpa::parameter<T, B> v;  // [1, M]

    template <class F>
    void visit(F f) {
      f(v);
    }
  };

  template <class T, class B>
  struct saved {
    talpa::routing_view<const T, B> routing;  // [N, M]
  };

  void validate(talpa::index, talpa::index) const {}
  talpa::index max_selected(talpa::index adapters, talpa::index) const { return adapters; }

  template <class T, class B>
  params<T, B> init(talpa::index, talpa::index adapters, talpa::generator&,
                    const std::string& prefix) const {
    params<T, B> p;
    p.v = talpa::parameter<T, B>(prefix + "v", talpa::matrix<T, B>(1, adapters));
    return p;
  }

  // c_nj = v_j.
  template <class T, class B>
  saved<T, B> forward(talpa::context<B>& ctx, const params<T, B>& p,
                      const talpa::routing_view<const T, B>&, talpa::index adapters,
                      talpa::input<T, B> x, talpa::mode, const talpa::batch_info<T, B>&) const {
    const auto on = talpa::always_on<T>(ctx, ctx.memory, x.rows, adapters);
    talpa::ops::fill(ctx, T{0}, on.gates);
    talpa::ops::add_bias(ctx, on.gates, p.v.value(), on.gates);
    return {on};
  }

  // dv_j += sum over tokens of dc_nj.
  template <class T, class B>
  void backward(talpa::context<B>& ctx, params<T, B>& p, const saved<T, B>&, talpa::input<T, B>,
                talpa::output<T, B> dgates, talpa::output<T, B>, talpa::output<T, B>,
                talpa::grad_mode, const talpa::routed_gradient<T, B>*) const {
    if (p.v.trainable()) talpa::ops::column_sum(ctx, dgates, T{1}, p.v.grad());
  }
};
// [end placement]

static_assert(talpa::placement_policy<learned_weights>);

TEST_SUITE("docs/policies/placement") {
  TEST_CASE("a block with the example obeys the laws of layers") {
    using base =
        talpa::moe_ffn<talpa::router<talpa::linear_scorer, talpa::top_k<talpa::gate::raw>>>;
    const talpa::perft_block<base, learned_weights, talpa::lora> layer{
        .base = {.router = {.selector = {.k = 2}}, .expert = {.hidden = 3}, .experts = 4},
        .adapter = {.rank = 2},
        .adapters = 3};
    const auto init = [&]<class T>(talpa::generator& random) {
      return layer.init<T, talpa::cpu>(layer.base.init<T, talpa::cpu>(5, random), random);
    };
    talpa::testing::report laws = talpa::testing::layer_laws<float>(layer, init);
    laws.add(talpa::testing::layer_laws<double>(layer, init));
    CHECK_MESSAGE(laws.passed(), laws.text());
  }
}
