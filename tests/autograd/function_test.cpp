// SPDX-License-Identifier: Apache-2.0
#include "support/cpu_products.hpp"

#include <talpa/autograd/function.hpp>
#include <talpa/cpu/add.hpp>
#include <talpa/cpu/copy.hpp>
#include <talpa/cpu/fill.hpp>
#include <talpa/cpu/mul.hpp>
#include <talpa/cpu/scale.hpp>

#include <doctest/doctest.h>

#include <array>
#include <span>

namespace talpa::function_test {

namespace {

using view = matrix_view<const double, cpu>;
using targets_type = std::span<const gradient_target<double, cpu>>;

/// y = a b^2 with the saved square of b.
struct kept_square {
  matrix_view<double, cpu> square;
};
kept_square forward(context<cpu>& ctx, const std::array<view, 2>& in, matrix_view<double, cpu> y) {
  const kept_square kept{ctx.memory.take<double>(in[1].rows, in[1].cols)};
  ops::mul(ctx, in[1], in[1], kept.square);
  ops::mul(ctx, in[0], kept.square, y);
  return kept;
}
void backward(context<cpu>& ctx, const kept_square& kept, const std::array<view, 2>& in, view dy,
              targets_type targets) {
  ops::mul(ctx, dy, kept.square, targets[0].grad, targets[0].mode);
  if (targets[1].mode == grad_mode::ignore) return;
  const workspace<cpu>::scope scope(ctx.scratch);
  const auto twice = ctx.scratch.take<double>(dy.rows, dy.cols);
  ops::mul(ctx, in[0], in[1], twice);
  ops::scale(ctx, 2.0, twice, twice);
  ops::mul(ctx, dy, twice, targets[1].grad, targets[1].mode);
}

}  // namespace

TEST_SUITE("autograd/function") {
  TEST_CASE("a pair of free functions becomes a node, with what forward saved") {
    context<cpu> ctx(1);
    tape<double, cpu> t(ctx);
    matrix<double, cpu> a(1, 2), b(1, 2), dy(1, 2);
    a(0, 0) = 2.0;
    b(0, 0) = 3.0;
    a(0, 1) = -1.0;
    b(0, 1) = 5.0;
    dy(0, 0) = 1.0;
    dy(0, 1) = 10.0;
    const auto va = t.leaf(a), vb = t.leaf(b);
    const auto y = function(t, {va, vb}, 1, 2, forward, backward);
    CHECK(y.value()(0, 0) == 18.0);
    CHECK(y.value()(0, 1) == -25.0);
    t.backward(y, dy);
    CHECK(va.grad()(0, 0) == 9.0);
    CHECK(va.grad()(0, 1) == 250.0);
    CHECK(vb.grad()(0, 0) == 12.0);
    CHECK(vb.grad()(0, 1) == -100.0);
    // Cubed: both gradients meet in one variable.
    const auto cube = function(t, {va, va}, 1, 2, forward, backward);
    t.backward(cube, dy);
    CHECK(va.grad()(0, 0) == 12.0);
    CHECK(va.grad()(0, 1) == 30.0);
    // A constant is left out.
    const auto half = function(t, {va, t.constant(b)}, 1, 2, forward, backward);
    t.backward(half, dy);
    CHECK(va.grad()(0, 0) == 9.0);
  }

  TEST_CASE("a forward that saves nothing needs no saved in backward") {
    context<cpu> ctx(1);
    tape<double, cpu> t(ctx);
    matrix<double, cpu> x(1, 1), dy(1, 1);
    x(0, 0) = 4.0;
    dy(0, 0) = 1.0;
    const double factor = 0.5;
    const auto v = t.leaf(x);
    const auto y = function(
        t, {v}, 1, 1,
        [factor](context<cpu>& c, const std::array<view, 1>& in, matrix_view<double, cpu> out) {
          ops::scale(c, factor, in[0], out);
        },
        [factor](context<cpu>& c, const std::array<view, 1>&, view d, targets_type targets) {
          if (targets[0].mode == grad_mode::overwrite) ops::scale(c, factor, d, targets[0].grad);
          if (targets[0].mode == grad_mode::accumulate) ops::axpy(c, factor, d, targets[0].grad);
        });
    CHECK(y.value()(0, 0) == 2.0);
    t.backward(y, dy);
    CHECK(v.grad()(0, 0) == 0.5);
  }

  TEST_CASE("function names a handle of another step") {
    context<cpu> ctx(1);
    tape<double, cpu> t(ctx);
    matrix<double, cpu> x(1, 1);
    const auto old = t.leaf(x);
    t.reset();
    CHECK_THROWS_WITH_AS(function(t, {old, old}, 1, 1, forward, backward),
                         "talpa::function: 'inputs' is a handle from before reset, expected a "
                         "handle that this tape made since its last reset",
                         value_error);
    CHECK(ctx.memory.used() == 0);
  }
}

}  // namespace talpa::function_test
