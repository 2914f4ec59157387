// SPDX-License-Identifier: Apache-2.0
// The expert of docs/policies/expert.md.
#include <talpa/talpa.hpp>
#include <talpa/testing/expert_laws.hpp>

#include <doctest/doctest.h>

#include <string>
#include <utility>

// [region expert]
/// Expert that is a constant vector: f_e(x) = b_e. A routed bias.
struct bias_vector {
  static constexpr const char* name = "bias_vector";

  template <class T, class B>
  struct params {
    talpa::parameter<T, B> b;  // [E, O]

    template <class F>
    void visit(F f) {
      f(b);
    }
  };

  template <class T, class B>
  struct saved {};

  void validate() const {}
  talpa::index width() const { return 1; }
  double input_dropout() const { return 0.0; }

  template <class T, class B>
  params<T, B> init(talpa::index, talpa::index outputs, talpa::index experts, talpa::generator&,
                    const std::string& prefix) const {
    params<T, B> p;
    p.b = talpa::parameter<T, B>(prefix + "b", talpa::matrix<T, B>(experts, outputs));
    return p;
  }

  // y_s = g_s b_e for each slot s of expert e.
  template <class T, class B>
  saved<T, B> forward_grouped(talpa::context<B>& ctx, const params<T, B>& p,
                              const talpa::segments<B>& slots, talpa::vector_input<T, B> gates,
                              talpa::input<T, B>, talpa::output<T, B> y) const {
    talpa::ops::grouped_gemm(ctx, slots.offsets, column(gates), p.b.value(), talpa::transpose::no,
                             y);
    return {};
  }

  // dg_s = <dy_s, b_e>, db_e += sum over its slots of g_s dy_s, dx = 0.
  template <class T, class B>
  void backward_grouped(talpa::context<B>& ctx, params<T, B>& p, const saved<T, B>&,
                        const talpa::segments<B>& slots, talpa::vector_input<T, B> gates,
                        talpa::input<T, B>, talpa::input<T, B> dy,
                        talpa::vector_output<T, B> dgates, talpa::output<T, B> dx,
                        talpa::grad_mode dx_mode) const {
    talpa::ops::grouped_gemm(ctx, slots.offsets, dy, p.b.value(), talpa::transpose::yes,
                             column(dgates));
    if (p.b.trainable()) {
      talpa::ops::grouped_gemm_gradient(ctx, slots.offsets, column(gates), dy, p.b.trained(),
                                        p.b.grad());
    }
    if (dx_mode != talpa::grad_mode::ignore) talpa::ops::fill(ctx, T{0}, dx);
  }

  // y += gates b: all experts at once. Only for experts that are linear in their gate's ranks.
  template <class T, class B>
  saved<T, B> forward_masked(talpa::context<B>& ctx, const params<T, B>& p,
                             talpa::input<T, B> gates, talpa::input<T, B>,
                             talpa::output<T, B> y) const {
    talpa::ops::gemm(ctx, gates, talpa::transpose::no, p.b.value(), talpa::transpose::no, T{1}, y);
    return {};
  }

  template <class T, class B>
  void backward_masked(talpa::context<B>& ctx, params<T, B>& p, const saved<T, B>&,
                       talpa::input<T, B> gates, talpa::input<T, B>, talpa::input<T, B> dy,
                       talpa::output<T, B> dgates, talpa::output<T, B> dx,
                       talpa::grad_mode dx_mode) const {
    talpa::ops::gemm(ctx, dy, talpa::transpose::no, p.b.value(), talpa::transpose::yes, T{0},
                     dgates);
    for (const talpa::row_run& run : p.b.trained()) {
      talpa::ops::gemm(ctx, gates.col_range(run.first, run.rows), talpa::transpose::yes, dy,
                       talpa::transpose::no, T{1}, p.b.grad().row_range(run.grad_first, run.rows));
    }
    if (dx_mode == talpa::grad_mode::overwrite) talpa::ops::fill(ctx, T{0}, dx);
  }

 private:
  // A vector [S] as a matrix [S, 1].
  template <class T, class B>
  static talpa::matrix_view<T, B> column(talpa::vector_view<T, B> v) {
    return {v.data, v.size, 1};
  }
};
static_assert(talpa::rank_space_expert<bias_vector>);
// [end expert]

namespace {

using talpa::cpu;
using matrix = talpa::matrix<double, cpu>;
using router = talpa::router<talpa::linear_scorer, talpa::dense>;

}  // namespace

TEST_SUITE("docs/policies/expert") {
  TEST_CASE("the example obeys the laws of experts") {
    talpa::testing::report laws;
    laws.add(talpa::testing::expert_laws<float>(bias_vector{}));
    laws.add(talpa::testing::expert_laws<double>(bias_vector{}));
    CHECK_MESSAGE(laws.passed(), laws.text());
  }

  TEST_CASE("in a layer the example adds the gated vectors to the base, by both strategies") {
    talpa::context<cpu> ctx(1);
    matrix x(1, 1), y(1, 2);
    x(0, 0) = 1.0;
    for (const auto execution : {talpa::strategy::dense_masked, talpa::strategy::grouped}) {
      const talpa::mole_linear<router, bias_vector> layer{.experts = 2, .execution = execution};
      talpa::generator random(1);
      auto base = talpa::linear{.bias = false}.init<double, cpu>(1, 2, random, "base.");
      base.weight.value()(0, 0) = 10.0;
      base.weight.value()(1, 0) = 20.0;
      auto p = layer.init(std::move(base), random);
      // Equal logits: both gates are one half. b_0 = (2, 0), b_1 = (4, -6).
      p.router.scorer.weight.value()(0, 0) = p.router.scorer.weight.value()(1, 0) = 0.0;
      const double b[2][2] = {{2.0, 0.0}, {4.0, -6.0}};
      for (talpa::index e = 0; e < 2; ++e) {
        for (talpa::index o = 0; o < 2; ++o) p.expert.b.value()(e, o) = b[e][o];
      }
      talpa::infer(ctx, layer, p, x, y);
      CHECK(y(0, 0) == 10.0 + 0.5 * 2.0 + 0.5 * 4.0);
      CHECK(y(0, 1) == 20.0 + 0.5 * 0.0 + 0.5 * -6.0);
    }
  }
}
