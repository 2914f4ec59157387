// SPDX-License-Identifier: Apache-2.0
#include "support/count_allocations.hpp"
#include "support/random.hpp"
#include "support/scalars.hpp"
#include "support/tolerance.hpp"

#include <talpa/cpu/adamw.hpp>
#include <talpa/cpu/fill.hpp>
#include <talpa/optim/adamw.hpp>

#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <utility>
#include <vector>

namespace talpa::adamw_test {

using support::gamma_bound;
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

TEST_SUITE("optim/adamw") {
  TEST_CASE_TEMPLATE("adamw follows the reference over many steps", T, TALPA_SCALARS) {
    constexpr index rows = 6, cols = 5, steps = 200;
    constexpr double rate = 0.01, decay = 0.1, beta1 = 0.9, beta2 = 0.999, epsilon = 1e-8;
    test_random random(43);
    parameter<T, cpu> p("p", random_matrix<T>(random, rows, cols));
    table expected = to_table(std::as_const(p).value());
    support::adamw_reference reference{rate, beta1, beta2, epsilon, decay};
    adamw<T, cpu> optimiser(
        {{.name = "all", .parameters = {&p}, .learning_rate = 2.0 * rate, .weight_decay = decay}});
    context<cpu> ctx(2);
    const double u = unit_roundoff<T>() + unit_roundoff<double>();
    // Error of the first moment, an average of signed terms: beta1 times the last one and 4
    // roundings, those of beta1 and 1 - beta1 included, on terms no larger than the largest
    // gradient.
    double first_error = 0.0, largest_gradient = 0.0;
    table bounds(rows, cols);
    for (index step = 1; step <= steps; ++step) {
      const matrix<T, cpu> gradient = random_matrix<T>(random, rows, cols);
      set_grad(p, gradient);
      largest_gradient = std::max(largest_gradient, support::largest(to_table(gradient.view())));
      const table before = expected;
      reference.step(expected, to_table(gradient.view()));
      optimiser.step(ctx, 0.5);
      first_error = beta1 * first_error + 4.0 * u * largest_gradient;
      const double correction1 = 1.0 - std::pow(beta1, static_cast<double>(step));
      const double correction2 = 1.0 - std::pow(beta2, static_cast<double>(step));
      for (index i = 0; i < bounds.size(); ++i) {
        const auto at = static_cast<std::size_t>(i);
        const double root = std::sqrt(reference.second.values[at] / correction2) + epsilon;
        const double moved = rate * std::abs(reference.first.values[at]) / correction1 / root;
        // The second moment is a sum of positive terms, 5 roundings a step; its root has half their
        // error. Then 8 roundings of the quotient and its factors, and two of the difference.
        bounds.values[at] += rate * first_error / correction1 / root +
                             gamma_bound<T>(2.5 * static_cast<double>(step) + 8.0) * moved +
                             gamma_bound<T>(4.0) * rate * decay * std::abs(before.values[at]) +
                             2.0 * u * std::abs(before.values[at]) + 2.0 * u * moved;
      }
    }
    CHECK(optimiser.steps() == steps);
    CHECK(support::difference(std::as_const(p).value(), expected, bounds) == "");
    CHECK(support::difference(optimiser.state(p).first, reference.first, first_error) == "");
    const table second_bounds = support::each(reference.second, [&](double v) {
      return support::rounding_bound<T>(5.0 * static_cast<double>(steps), v);
    });
    CHECK(support::difference(optimiser.state(p).second, reference.second, second_bounds) == "");
  }

  TEST_CASE("adamw moves trained rows only and keeps state for them only") {
    test_random random(44);
    const matrix<double, cpu> start = random_matrix<double>(random, 6, 3);
    parameter<double, cpu> all("all", start), some("some", start), frozen("frozen", start);
    some.train_blocks(2, std::vector<index>{0, 2});
    frozen.freeze();
    adamw<double, cpu> optimiser(
        {{.name = "g", .parameters = {&all, &some, &frozen}, .weight_decay = 0.1}});
    CHECK(optimiser.state(some).first.rows == 4);
    CHECK(optimiser.state(some).second.rows == 4);
    CHECK(optimiser.state(frozen).first.rows == 0);
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
    CHECK(support::same_bits(optimiser.state(some).second.row_range(2, 2),
                             optimiser.state(all).second.row_range(4, 2)));
  }

  TEST_CASE("adamw decays weights whose gradient is zero, by the group's own decay") {
    parameter<double, cpu> a("a", matrix<double, cpu>(1, 1)), b("b", matrix<double, cpu>(1, 1));
    a.value()(0, 0) = b.value()(0, 0) = 8.0;
    adamw<double, cpu> optimiser(
        {{.name = "decays", .parameters = {&a}, .learning_rate = 0.5, .weight_decay = 0.25},
         {.name = "stays", .parameters = {&b}, .learning_rate = 0.5}});
    context<cpu> ctx(1);
    optimiser.step(ctx);
    CHECK(a.value()(0, 0) == 7.0);
    CHECK(b.value()(0, 0) == 8.0);
    optimiser.step(ctx, warmup_constant{.warmup_steps = 4});  // update 1: factor 1/2
    CHECK(a.value()(0, 0) == 6.5625);
  }

  TEST_CASE("a stored run of adamw goes on with the same bits") {
    test_random random(45);
    const matrix<float, cpu> start = random_matrix<float>(random, 4, 3);
    std::vector<matrix<float, cpu>> gradients;
    for (int step = 0; step < 6; ++step) gradients.push_back(random_matrix<float>(random, 4, 3));
    context<cpu> ctx(1);
    parameter<float, cpu> whole("whole", start), half("half", start);
    adamw<float, cpu> first({{.name = "g", .parameters = {&whole}}});
    for (const auto& gradient : gradients) {
      set_grad(whole, gradient);
      first.step(ctx);
    }
    adamw<float, cpu> before({{.name = "g", .parameters = {&half}}});
    for (int step = 0; step < 3; ++step) {
      set_grad(half, gradients[static_cast<std::size_t>(step)]);
      before.step(ctx);
    }
    const matrix<float, cpu> m(before.state(half).first), v(before.state(half).second);
    adamw<float, cpu> after({{.name = "g", .parameters = {&half}}});
    for (index i = 0; i < m.size(); ++i) {
      after.state(half).first.data[i] = m.data()[i];
      after.state(half).second.data[i] = v.data()[i];
    }
    after.resume(before.steps());
    for (int step = 3; step < 6; ++step) {
      set_grad(half, gradients[static_cast<std::size_t>(step)]);
      after.step(ctx);
    }
    CHECK(support::same_bits(half.value(), whole.value()));
  }

  TEST_CASE("a step of adamw allocates nothing") {
    if (!support::allocations_are_counted()) return;
    parameter<float, cpu> a("a", matrix<float, cpu>(300, 70));
    a.train_blocks(100, std::vector<index>{0, 2});
    adamw<float, cpu> optimiser({{.name = "g", .parameters = {&a}}});
    context<cpu> ctx(2);
    CHECK(support::allocations_of([&] {
            optimiser.step(ctx);
            optimiser.step(ctx, warmup_cosine{.total_steps = 10});
            optimiser.zero_grad(ctx);
          }) == 0);
  }

  TEST_CASE("adamw names what is outside its range or has changed") {
    parameter<float, cpu> a("layer.a", matrix<float, cpu>(2, 2));
    const std::vector<parameter_group<float, cpu>> groups{{.name = "g", .parameters = {&a}}};
    using optimiser_type = adamw<float, cpu>;
    CHECK_THROWS_WITH_AS(optimiser_type(groups, {.beta1 = 1.0}),
                         "talpa::adamw: 'beta1' is 1, expected a number in [0, 1)", value_error);
    CHECK_THROWS_WITH_AS(optimiser_type(groups, {.beta2 = -0.5}),
                         "talpa::adamw: 'beta2' is -0.5, expected a number in [0, 1)", value_error);
    CHECK_THROWS_WITH_AS(optimiser_type(groups, {.epsilon = 0.0}),
                         "talpa::adamw: 'epsilon' is 0, expected a number > 0", value_error);
    CHECK_THROWS_AS(optimiser_type(groups, {.epsilon = 1e-50}), value_error);
    optimiser_type optimiser(groups);
    context<cpu> ctx(1);
    CHECK_THROWS_WITH_AS(optimiser.step(ctx, std::numeric_limits<double>::infinity()),
                         "talpa::adamw::step: 'factor' is inf, expected a finite number >= 0",
                         value_error);
    CHECK_THROWS_WITH_AS(optimiser.resume(-1),
                         "talpa::adamw::resume: 'steps' is -1, expected >= 0 = updates so far",
                         value_error);
    parameter<float, cpu> stranger("stranger", matrix<float, cpu>(1, 1));
    CHECK_THROWS_WITH_AS(
        optimiser.state(stranger),
        "talpa::adamw::state: 'stranger' is in no group, expected a parameter of this optimiser",
        value_error);
    a.freeze();
    CHECK_THROWS_WITH_AS(optimiser.step(ctx),
                         "talpa::adamw::step: 'layer.a' is trained in rows none, expected [0, 2) = "
                         "rows that trained when the optimiser was made; make a new one after "
                         "freeze, train or train_blocks",
                         value_error);
    CHECK(optimiser.steps() == 0);
  }
}

}  // namespace talpa::adamw_test
