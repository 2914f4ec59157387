// SPDX-License-Identifier: Apache-2.0
#include "support/count_allocations.hpp"
#include "support/random.hpp"
#include "support/scalars.hpp"
#include "support/tolerance.hpp"

#include <talpa/cpu/fill.hpp>
#include <talpa/cpu/sgd.hpp>
#include <talpa/optim/sgd.hpp>

#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <utility>
#include <vector>

namespace talpa::sgd_test {

using support::random_matrix;
using support::table;
using support::test_random;
using support::to_table;
using support::unit_roundoff;

namespace {

template <class T>
void set_grad(parameter<T, cpu>& p, const matrix<T, cpu>& gradient) {
  for (const row_run& run : p.trained()) {
    for (index r = 0; r < run.rows; ++r) {
      for (index c = 0; c < p.cols(); ++c) {
        p.grad()(run.grad_first + r, c) = gradient(run.first + r, c);
      }
    }
  }
}

}  // namespace

TEST_SUITE("optim/sgd") {
  TEST_CASE_TEMPLATE("sgd follows the reference over many steps", T, TALPA_SCALARS) {
    constexpr index rows = 6, cols = 5, steps = 60;
    for (const double momentum : {0.0, 0.875}) {
      for (const bool nesterov : {false, true}) {
        if (nesterov && momentum == 0.0) continue;
        CAPTURE(momentum);
        CAPTURE(nesterov);
        test_random random(41);
        parameter<T, cpu> p("p", random_matrix<T>(random, rows, cols));
        table expected = to_table(std::as_const(p).value());
        support::sgd_reference reference{0.03125, momentum, 0.125, nesterov};
        sgd<T, cpu> optimiser(
            {{.name = "all", .parameters = {&p}, .learning_rate = 0.0625, .weight_decay = 0.125}},
            {.momentum = momentum, .nesterov = nesterov});
        context<cpu> ctx(2);
        // Errors of velocity and weight, by the recursions of the updates with absolute values:
        // each takes its own roundings, at most 6 on terms of the given sizes.
        const double u = unit_roundoff<T>() + unit_roundoff<double>();
        double velocity_error = 0.0, error = 0.0;
        for (index step = 0; step < steps; ++step) {
          const matrix<T, cpu> gradient = random_matrix<T>(random, rows, cols);
          set_grad(p, gradient);
          const double size = support::largest(expected);
          reference.step(expected, to_table(gradient.view()));
          optimiser.step(ctx, 0.5);
          const double slope = support::largest(to_table(gradient.view())) + 0.125 * size;
          const double speed = support::largest(reference.velocity) + slope;
          const double slope_error = 0.125 * error + 6.0 * u * slope;
          velocity_error = momentum * velocity_error + slope_error + 6.0 * u * speed;
          error +=
              0.03125 * (slope_error + velocity_error) + 6.0 * u * (0.03125 * 2.0 * speed + size);
        }
        CHECK(optimiser.steps() == steps);
        CHECK(support::difference(std::as_const(p).value(), expected, error) == "");
        if (momentum > 0.0) {
          CHECK(support::difference(optimiser.velocity(p), reference.velocity, velocity_error) ==
                "");
        } else {
          CHECK(optimiser.velocity(p).data == nullptr);
        }
      }
    }
  }

  TEST_CASE("sgd moves trained rows only and keeps a velocity for them only") {
    test_random random(42);
    const matrix<double, cpu> start = random_matrix<double>(random, 6, 3);
    parameter<double, cpu> all("all", start), some("some", start), frozen("frozen", start);
    some.train_blocks(2, std::vector<index>{0, 2});
    frozen.freeze();
    sgd<double, cpu> optimiser({{.name = "g", .parameters = {&all, &some, &frozen}}},
                               {.momentum = 0.5});
    CHECK(optimiser.velocity(some).rows == 4);
    CHECK(optimiser.velocity(frozen).rows == 0);
    CHECK(optimiser.parameters().size() == 3);
    context<cpu> ctx(1);
    for (int step = 0; step < 3; ++step) {
      const matrix<double, cpu> gradient = random_matrix<double>(random, 6, 3);
      set_grad(all, gradient);
      set_grad(some, gradient);
      optimiser.step(ctx);
    }
    const auto whole = std::as_const(all).value(), part = std::as_const(some).value();
    CHECK(support::same_bits(part.row_range(0, 2), whole.row_range(0, 2)));
    CHECK(support::same_bits(part.row_range(2, 2), start.view().row_range(2, 2)));
    CHECK(support::same_bits(part.row_range(4, 2), whole.row_range(4, 2)));
    CHECK(!support::same_bits(part.row_range(4, 2), start.view().row_range(4, 2)));
    CHECK(support::same_bits(std::as_const(frozen).value(), start.view()));
    optimiser.zero_grad(ctx);
    CHECK(all.grad()(5, 2) == 0.0);
  }

  TEST_CASE("sgd takes learning rates from groups, a factor and a schedule") {
    parameter<double, cpu> a("a", matrix<double, cpu>(1, 1)), b("b", matrix<double, cpu>(1, 1));
    a.grad()(0, 0) = b.grad()(0, 0) = 1.0;
    sgd<double, cpu> optimiser({{.name = "fast", .parameters = {&a}, .learning_rate = 1.0},
                                {.name = "slow", .parameters = {&b}, .learning_rate = 0.25}});
    context<cpu> ctx(1);
    optimiser.step(ctx);
    CHECK(a.value()(0, 0) == -1.0);
    CHECK(b.value()(0, 0) == -0.25);
    optimiser.step(ctx, 0.5);
    CHECK(a.value()(0, 0) == -1.5);
    CHECK(b.value()(0, 0) == -0.375);
    optimiser.step(ctx, warmup_constant{.warmup_steps = 6});  // update 2: factor 1/2
    CHECK(a.value()(0, 0) == -2.0);
    optimiser.resume(1);
    optimiser.step(ctx, warmup_constant{.warmup_steps = 4});  // update 1: factor 1/2
    CHECK(a.value()(0, 0) == -2.5);
    CHECK(optimiser.steps() == 2);
  }

  TEST_CASE("a step of sgd allocates nothing") {
    if (!support::allocations_are_counted()) return;
    parameter<float, cpu> a("a", matrix<float, cpu>(300, 70));
    a.train_blocks(100, std::vector<index>{0, 2});
    sgd<float, cpu> optimiser({{.name = "g", .parameters = {&a}}}, {.momentum = 0.9});
    context<cpu> ctx(2);
    CHECK(support::allocations_of([&] {
            optimiser.step(ctx);
            optimiser.step(ctx, warmup_linear{.total_steps = 10});
            optimiser.zero_grad(ctx);
          }) == 0);
  }

  TEST_CASE("sgd names what is outside its range or has changed") {
    parameter<float, cpu> a("layer.a", matrix<float, cpu>(2, 2));
    const std::vector<parameter_group<float, cpu>> groups{{.name = "g", .parameters = {&a}}};
    using optimiser_type = sgd<float, cpu>;
    CHECK_THROWS_WITH_AS(optimiser_type(groups, {.momentum = 1.0}),
                         "talpa::sgd: 'momentum' is 1, expected a number in [0, 1)", value_error);
    CHECK_THROWS_WITH_AS(
        optimiser_type(groups, {.nesterov = true}),
        "talpa::sgd: 'momentum' is 0, expected a number in (0, 1) = what nesterov looks along",
        value_error);
    CHECK_THROWS_AS(optimiser_type({}), value_error);
    optimiser_type optimiser(groups);
    context<cpu> ctx(1);
    CHECK_THROWS_WITH_AS(optimiser.step(ctx, -1.0),
                         "talpa::sgd::step: 'factor' is -1, expected a finite number >= 0",
                         value_error);
    CHECK_THROWS_AS(optimiser.step(ctx, std::numeric_limits<double>::quiet_NaN()), value_error);
    CHECK_THROWS_WITH_AS(optimiser.resume(-1),
                         "talpa::sgd::resume: 'steps' is -1, expected >= 0 = updates so far",
                         value_error);
    a.train_blocks(1, std::vector<index>{1});
    CHECK_THROWS_WITH_AS(optimiser.step(ctx),
                         "talpa::sgd::step: 'layer.a' is trained in rows [1, 2), expected [0, 2) = "
                         "rows that trained when the optimiser was made; make a new one after "
                         "freeze, train or train_blocks",
                         value_error);
    CHECK(optimiser.steps() == 0);
  }
}

}  // namespace talpa::sgd_test
