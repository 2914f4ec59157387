// SPDX-License-Identifier: Apache-2.0
#include "support/count_allocations.hpp"
#include "support/cpu_products.hpp"
#include "support/laws.hpp"
#include "support/random.hpp"
#include "support/scalars.hpp"
#include "support/tolerance.hpp"

#include <talpa/autograd/tape.hpp>
#include <talpa/cpu/activation.hpp>
#include <talpa/cpu/add.hpp>
#include <talpa/cpu/bias.hpp>
#include <talpa/cpu/copy.hpp>
#include <talpa/cpu/cross_entropy.hpp>
#include <talpa/cpu/dropout.hpp>
#include <talpa/cpu/fill.hpp>
#include <talpa/cpu/gemm.hpp>
#include <talpa/cpu/layer_norm.hpp>
#include <talpa/cpu/mse.hpp>
#include <talpa/cpu/mul.hpp>
#include <talpa/cpu/reduce.hpp>
#include <talpa/cpu/scale.hpp>
#include <talpa/cpu/softmax.hpp>
#include <talpa/testing/gradient_check.hpp>

#include <doctest/doctest.h>

#include <array>
#include <cmath>
#include <limits>
#include <span>
#include <string>
#include <utility>
#include <vector>

namespace talpa::tape_test {
using support::random_matrix;
using support::table;
using support::test_random;
using support::to_table;

namespace {

template <class T>
parameter<T, cpu> random_parameter(test_random& random, std::string name, index rows, index cols,
                                   double scale = 1.0) {
  return {std::move(name), random_matrix<T>(random, rows, cols, scale)};
}

/// Checks every gradient of y = build(tape, leaves) against central differences: those of leaves of
/// the given shapes, and those of `parameters` where they train.
template <class Build>
void check_gradients(const char* what, const std::vector<std::pair<index, index>>& shapes,
                     const std::vector<parameter<double, cpu>*>& parameters, double roundings,
                     double magnitude, Build build) {
  test_random random(77);
  std::vector<matrix<double, cpu>> inputs;
  for (const auto& [rows, cols] : shapes) {
    inputs.push_back(random_matrix<double>(random, rows, cols, 0.5));
  }
  context<cpu> ctx(1);
  tape<double, cpu> t(ctx);
  std::vector<variable<double, cpu>> leaves;
  const auto record = [&] {
    t.reset();
    leaves.clear();
    for (const auto& input : inputs) leaves.push_back(t.leaf(input));
    return build(t, leaves);
  };
  variable<double, cpu> y = record();
  const matrix<double, cpu> upstream = testing::cotangent(y.value().rows, y.value().cols, 5);
  for (parameter<double, cpu>* p : parameters) p->zero_grad(ctx);
  t.backward(y, upstream);

  std::vector<matrix<double, cpu>> gradients;
  for (const auto& leaf : leaves) gradients.emplace_back(leaf.grad());
  std::vector<testing::gradient_probe> probes;
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    probes.push_back({"input " + std::to_string(i), inputs[i].view(), gradients[i].view()});
  }
  for (parameter<double, cpu>* p : parameters) {
    for (const row_run& run : p->trained()) {
      probes.push_back({p->name(), p->value().row_range(run.first, run.rows),
                        p->grad().row_range(run.grad_first, run.rows)});
    }
  }
  support::obeys(testing::gradient_check(
      what, probes, upstream, {.roundings = roundings, .magnitude = magnitude},
      [&] { return record().value(); }, [] { return 0; }));
}

}  // namespace

TEST_SUITE("autograd/tape") {
  TEST_CASE("a product of sums worked by hand") {
    // f = mean((3 (x + 2) x - 5)^2) at x = 1: y = 9, f = 16, f' = 2 (9 - 5) 3 (2 x + 2) = 96.
    context<cpu> ctx(1);
    tape<double, cpu> t(ctx);
    matrix<double, cpu> x(1, 1), two(1, 1), five(1, 1);
    x(0, 0) = 1.0;
    two(0, 0) = 2.0;
    five(0, 0) = 5.0;
    const auto v = t.leaf(x);
    const auto y = t.scale(t.mul(t.add(v, t.constant(two)), v), 3.0);
    const auto loss = t.mse(y, t.constant(five));
    CHECK(loss.value()(0, 0) == 16.0);
    t.backward(loss);
    CHECK(v.grad()(0, 0) == 96.0);
    CHECK(y.grad()(0, 0) == 8.0);
    CHECK(loss.grad()(0, 0) == 1.0);
  }

  TEST_CASE_TEMPLATE("linear agrees with the reference, adds to parameters and overwrites inputs",
                     T, TALPA_SCALARS) {
    test_random random(20);
    constexpr index tokens = 37, inputs = 11, outputs = 6;
    const matrix<T, cpu> x = random_matrix<T>(random, tokens, inputs);
    const matrix<T, cpu> dy = random_matrix<T>(random, tokens, outputs);
    parameter<T, cpu> w = random_parameter<T>(random, "w", outputs, inputs);
    parameter<T, cpu> b = random_parameter<T>(random, "b", 1, outputs);
    const table xt = to_table(x.view()), dyt = to_table(dy.view()), wt = to_table(w.value());
    table y = support::matmul(xt, support::transposed(wt));
    table y_mass =
        support::matmul(support::absolute(xt), support::transposed(support::absolute(wt)));
    for (index n = 0; n < tokens; ++n) {
      for (index o = 0; o < outputs; ++o) {
        y(n, o) += static_cast<double>(b.value()(0, o));
        y_mass(n, o) += std::abs(static_cast<double>(b.value()(0, o)));
      }
    }
    const auto sums = [](index terms) {
      return [terms](double mass) { return support::sum_bound<T>(terms, mass); };
    };
    const table dw = support::matmul(support::transposed(dyt), xt);
    const table dw_mass =
        support::matmul(support::transposed(support::absolute(dyt)), support::absolute(xt));
    const table db = support::column_sums(dyt);
    const table db_mass = support::column_sums(support::absolute(dyt));
    const table dx = support::matmul(dyt, wt);
    const table dx_mass = support::matmul(support::absolute(dyt), support::absolute(wt));

    context<cpu> ctx(2);
    tape<T, cpu> t(ctx);
    for (const int times : {1, 2}) {
      const auto v = t.leaf(x);
      const auto result = t.linear(v, w, b);
      CHECK(support::difference(result.value(), y, each(y_mass, sums(inputs + 1))) == "");
      t.backward(result, dy);
      const auto times_table = [&](const table& a) {
        return each(a, [&](double value) { return times * value; });
      };
      CHECK(support::difference(v.grad(), dx, each(dx_mass, sums(outputs))) == "");
      CHECK(support::difference(std::as_const(w).grad(), times_table(dw),
                                times_table(each(dw_mass, sums(2 * tokens)))) == "");
      CHECK(support::difference(std::as_const(b).grad(), times_table(db),
                                times_table(each(db_mass, sums(2 * tokens)))) == "");
      t.reset();
    }
  }

  TEST_CASE(
      "linear trains the chosen rows only, and a frozen weight still passes the gradient on") {
    test_random random(21);
    const matrix<double, cpu> x = random_matrix<double>(random, 5, 3);
    const matrix<double, cpu> dy = random_matrix<double>(random, 5, 6);
    parameter<double, cpu> all = random_parameter<double>(random, "w", 6, 3);
    parameter<double, cpu> some("some", matrix<double, cpu>(std::as_const(all).value()));
    some.train_blocks(2, std::vector<index>{0, 2});
    parameter<double, cpu> frozen("frozen", matrix<double, cpu>(std::as_const(all).value()));
    frozen.freeze();
    context<cpu> ctx(1);
    tape<double, cpu> t(ctx);
    const auto dx_with = [&](parameter<double, cpu>& w) {
      t.reset();
      const auto v = t.leaf(x);
      t.backward(t.linear(v, w), dy);
      return matrix<double, cpu>(v.grad());
    };
    const matrix<double, cpu> dx = dx_with(all);
    CHECK(support::same_bits(dx_with(some).view(), dx.view()));
    CHECK(support::same_bits(dx_with(frozen).view(), dx.view()));
    const matrix_view<const double, cpu> full = std::as_const(all).grad();
    CHECK(support::same_bits(some.grad().row_range(0, 2), full.row_range(0, 2)));
    CHECK(support::same_bits(some.grad().row_range(2, 2), full.row_range(4, 2)));
    CHECK(frozen.grad().data == nullptr);
  }

  TEST_CASE("a parameter that does not exist stands for no bias, a frozen bias gets no gradient") {
    test_random random(22);
    const matrix<double, cpu> x = random_matrix<double>(random, 4, 3);
    parameter<double, cpu> w = random_parameter<double>(random, "w", 2, 3), none;
    parameter<double, cpu> b = random_parameter<double>(random, "b", 1, 2);
    b.freeze();
    context<cpu> ctx(1);
    tape<double, cpu> t(ctx);
    const auto v = t.constant(x);
    CHECK(support::same_bits(t.linear(v, w, none).value(), t.linear(v, w).value()));
    t.backward(t.linear(v, w, b), matrix<double, cpu>(4, 2));
    CHECK(b.grad().data == nullptr);
  }

  TEST_CASE("every operation has the gradient of central differences") {
    test_random random(23);
    // Roundings: at most 40 on a path through sums of up to 7 terms; magnitudes: upstream below 1
    // on at most 21 outputs below 8 each.
    const auto check = [&](const char* what, const std::vector<std::pair<index, index>>& shapes,
                           const std::vector<parameter<double, cpu>*>& parameters, auto build) {
      CAPTURE(what);
      check_gradients(what, shapes, parameters, 40.0, 21.0 * 8.0, build);
    };
    parameter<double, cpu> w = random_parameter<double>(random, "w", 7, 5);
    parameter<double, cpu> b = random_parameter<double>(random, "b", 1, 7);
    parameter<double, cpu> gamma = random_parameter<double>(random, "gamma", 1, 5);
    parameter<double, cpu> beta = random_parameter<double>(random, "beta", 1, 5);
    parameter<double, cpu> blocks = random_parameter<double>(random, "blocks", 3, 5);
    blocks.train_blocks(1, std::vector<index>{0, 2});

    check("add", {{3, 5}, {3, 5}}, {}, [](auto& t, auto& v) { return t.add(v[0], v[1]); });
    check("mul", {{3, 5}, {3, 5}}, {}, [](auto& t, auto& v) { return t.mul(v[0], v[1]); });
    check("scale", {{3, 5}}, {}, [](auto& t, auto& v) { return t.scale(v[0], -1.75); });
    check("linear", {{3, 5}}, {&w, &b}, [&](auto& t, auto& v) { return t.linear(v[0], w, b); });
    check("weight", {{3, 5}}, {&blocks},
          [&](auto& t, auto& v) { return t.mul(v[0], t.weight(blocks)); });
    check("reshape", {{3, 5}}, {}, [](auto& t, auto& v) { return t.reshape(v[0], 5, 3); });
    check("reshape beside another use", {{3, 5}, {5, 3}}, {}, [](auto& t, auto& v) {
      const auto turned = t.reshape(v[0], 5, 3);
      return t.mul(t.add(turned, v[1]), t.reshape(t.scale(v[0], 2.0), 5, 3));
    });
    check("silu", {{3, 5}}, {}, [](auto& t, auto& v) { return t.activation(silu{}, v[0]); });
    check("gelu_tanh", {{3, 5}}, {},
          [](auto& t, auto& v) { return t.activation(gelu_tanh{}, v[0]); });
    check("tanh", {{3, 5}}, {}, [](auto& t, auto& v) { return t.activation(talpa::tanh{}, v[0]); });
    check("sigmoid", {{3, 5}}, {}, [](auto& t, auto& v) { return t.activation(sigmoid{}, v[0]); });
    check("softmax", {{3, 5}}, {}, [](auto& t, auto& v) { return t.softmax(v[0]); });
    check("layer_norm", {{3, 5}}, {&gamma, &beta},
          [&](auto& t, auto& v) { return t.layer_norm(v[0], gamma, beta); });
    check("dropout", {{3, 5}}, {}, [](auto& t, auto& v) {
      return t.dropout(v[0], random_stream{3, 4}, 0.5f);
    });
    vector<std::int32_t, cpu> labels(3);
    labels[0] = 4;
    labels[1] = ignore_label;
    labels[2] = 1;
    check("cross_entropy", {{3, 5}}, {},
          [&](auto& t, auto& v) { return t.cross_entropy(v[0], labels); });
    check("mse", {{3, 5}, {3, 5}}, {}, [](auto& t, auto& v) { return t.mse(v[0], v[1]); });
    check("weighted_sum", {{1, 1}, {1, 1}}, {}, [](auto& t, auto& v) {
      return t.weighted_sum({{v[0], 0.5}, {v[1], -3.0}, {v[0], 1.0}});
    });
  }

  TEST_CASE("reshape shows the numbers of x, row after row, on the same memory") {
    context<cpu> ctx(1);
    tape<float, cpu> t(ctx);
    matrix<float, cpu> x(2, 3);
    for (index i = 0; i < x.size(); ++i) x.data()[i] = static_cast<float>(i);
    const auto y = t.reshape(t.constant(x), 3, 2).value();
    CHECK(y.data == x.data());
    CHECK(y.rows == 3);
    CHECK(y(1, 0) == 2.0F);
    CHECK(y(2, 1) == 5.0F);
    CHECK(
        t.reshape(t.constant(matrix_view<const float, cpu>(nullptr, 0, 3)), 0, 7).value().empty());
  }

  TEST_CASE("a net whose variables fan out has the gradient of central differences") {
    test_random random(24);
    parameter<double, cpu> w1 = random_parameter<double>(random, "w1", 6, 5);
    parameter<double, cpu> b1 = random_parameter<double>(random, "b1", 1, 6);
    parameter<double, cpu> w2 = random_parameter<double>(random, "w2", 6, 6);
    parameter<double, cpu> gamma = random_parameter<double>(random, "gamma", 1, 6);
    parameter<double, cpu> beta = random_parameter<double>(random, "beta", 1, 6);
    // Four sums of at most 6 terms and their functions in a row.
    check_gradients("net", {{4, 5}}, {&w1, &b1, &w2, &gamma, &beta}, 160.0, 24.0 * 32.0,
                    [&](auto& t, auto& v) {
                      const auto h = t.activation(silu{}, t.linear(v[0], w1, b1));
                      const auto n = t.layer_norm(h, gamma, beta);
                      // The same weight twice, h and n three times, a product with itself.
                      const auto u = t.add(t.linear(n, w2), t.mul(n, h));
                      const auto s = t.add(t.mul(u, u), t.linear(h, w2));
                      return t.add(s, t.add(n, n));
                    });
  }

  TEST_CASE("a variable used twice in one operation gets both gradients") {
    context<cpu> ctx(1);
    tape<double, cpu> t(ctx);
    matrix<double, cpu> x(1, 2), dy(1, 2);
    x(0, 0) = 3.0;
    x(0, 1) = -5.0;
    dy(0, 0) = 1.0;
    dy(0, 1) = 10.0;
    const auto v = t.leaf(x);
    t.backward(t.mul(v, v), dy);
    CHECK(v.grad()(0, 0) == 6.0);
    CHECK(v.grad()(0, 1) == -100.0);
    t.backward(t.add(v, v), dy);
    CHECK(v.grad()(0, 1) == 20.0);
    t.backward(t.mse(v, v));
    CHECK(v.grad()(0, 0) == 0.0);
  }

  TEST_CASE("the first consumer overwrites, later ones accumulate, constants are ignored") {
    context<cpu> ctx(1);
    tape<float, cpu> t(ctx);
    matrix<float, cpu> x(1, 1), dy(1, 1);
    dy(0, 0) = 1.0f;
    // What the arena holds beforehand must not matter.
    ops::fill(ctx, std::numeric_limits<float>::quiet_NaN(), t.make(64, 64));
    t.reset();
    std::vector<int> seen;
    std::vector<int>* const log = &seen;
    const auto v = t.leaf(x), c = t.constant(x);
    const auto consumer = [&](const variable<float, cpu>& a, const variable<float, cpu>& b,
                              float share) {
      return t.record(t.make(1, 1), {a, b},
                      [log, share](context<cpu>&, matrix_view<const float, cpu> d,
                                   std::span<const gradient_target<float, cpu>> targets) {
                        for (const auto& target : targets) {
                          log->push_back(static_cast<int>(target.mode));
                          if (target.mode == grad_mode::ignore) {
                            CHECK(target.grad.data == nullptr);
                          } else if (target.mode == grad_mode::overwrite) {
                            target.grad(0, 0) = share * d(0, 0);
                          } else {
                            target.grad(0, 0) += share * d(0, 0);
                          }
                        }
                      });
    };
    const auto first = consumer(v, c, 2.0f);
    const auto second = consumer(c, v, 3.0f);
    const auto both = t.add(first, second);
    t.backward(both, dy);
    const int ignore = static_cast<int>(grad_mode::ignore),
              overwrite = static_cast<int>(grad_mode::overwrite),
              accumulate = static_cast<int>(grad_mode::accumulate);
    // Backwards: second, then first.
    CHECK(seen == std::vector<int>{ignore, overwrite, accumulate, ignore});
    CHECK(v.grad()(0, 0) == 5.0f);
    CHECK(!c.wants_grad());
    CHECK(both.wants_grad());
  }

  TEST_CASE("what depends on constants and frozen parameters only is not run backwards") {
    test_random random(25);
    context<cpu> ctx(1);
    tape<double, cpu> t(ctx);
    const matrix<double, cpu> x = random_matrix<double>(random, 3, 4);
    parameter<double, cpu> frozen = random_parameter<double>(random, "frozen", 4, 4);
    frozen.freeze();
    parameter<double, cpu> w = random_parameter<double>(random, "w", 2, 4);
    int runs = 0;
    int* const count = &runs;
    const auto h = t.linear(t.constant(x), frozen);
    const auto odd = t.record(t.make(3, 4), {h},
                              [count](context<cpu>&, matrix_view<const double, cpu>,
                                      std::span<const gradient_target<double, cpu>>) { ++*count; });
    CHECK(!h.wants_grad());
    CHECK(!odd.wants_grad());
    const auto y = t.linear(h, w);
    CHECK(y.wants_grad());
    const std::size_t before = ctx.memory.used();
    t.backward(y, matrix<double, cpu>(3, 2));
    CHECK(runs == 0);
    // The gradient of y and nothing else.
    CHECK(ctx.memory.used() - before == workspace<cpu>::rounded(3 * 2 * sizeof(double)));
  }

  TEST_CASE("what trains of a layer_norm gets its gradient, whatever x is") {
    test_random random(29);
    const matrix<double, cpu> x = random_matrix<double>(random, 3, 4);
    const matrix<double, cpu> dy = random_matrix<double>(random, 3, 4);
    parameter<double, cpu> gamma = random_parameter<double>(random, "gamma", 1, 4);
    parameter<double, cpu> beta = random_parameter<double>(random, "beta", 1, 4);
    context<cpu> ctx(1);
    tape<double, cpu> t(ctx);
    t.backward(t.layer_norm(t.constant(x), gamma, beta), dy);
    const matrix<double, cpu> dgamma(std::as_const(gamma).grad()),
        dbeta(std::as_const(beta).grad());
    CHECK(dbeta(0, 0) != 0.0);
    beta.freeze();
    gamma.zero_grad(ctx);
    t.backward(t.layer_norm(t.constant(x), gamma, beta), dy);
    CHECK(support::same_bits(std::as_const(gamma).grad(), dgamma.view()));
    gamma.freeze();
    CHECK(!t.layer_norm(t.constant(x), gamma, beta).wants_grad());
    beta.train();
    t.backward(t.layer_norm(t.constant(x), gamma, beta), dy);
    CHECK(support::same_bits(std::as_const(beta).grad(), dbeta.view()));
    CHECK(gamma.grad().data == nullptr);
  }

  TEST_CASE("a variable that the loss does not depend on has a zero gradient") {
    context<cpu> ctx(1);
    tape<float, cpu> t(ctx);
    matrix<float, cpu> x(2, 2), dy(2, 2);
    for (index i = 0; i < 4; ++i) dy.data()[i] = 1.0f;
    const auto used = t.leaf(x), unused = t.leaf(x);
    int runs = 0;
    int* const count = &runs;
    const auto side = t.record(t.make(1, 1), {unused},
                               [count](context<cpu>&, matrix_view<const float, cpu>,
                                       std::span<const gradient_target<float, cpu>>) { ++*count; });
    const auto y = t.scale(used, 2.0f);
    CHECK(used.grad()(1, 1) == 0.0f);  // before backward
    t.backward(y, dy);
    CHECK(used.grad()(1, 1) == 2.0f);
    for (index i = 0; i < 4; ++i) CHECK(unused.grad().data[i] == 0.0f);
    CHECK(side.grad()(0, 0) == 0.0f);
    CHECK(runs == 0);
  }

  TEST_CASE(
      "a second backward writes gradients of variables anew and adds to those of parameters") {
    test_random random(26);
    context<cpu> ctx(1);
    tape<double, cpu> t(ctx);
    const matrix<double, cpu> x = random_matrix<double>(random, 3, 4);
    const matrix<double, cpu> dy = random_matrix<double>(random, 3, 2);
    parameter<double, cpu> w = random_parameter<double>(random, "w", 2, 4);
    const auto v = t.leaf(x);
    const auto h = t.add(v, v);
    const auto y = t.linear(h, w);
    t.backward(y, dy);
    const matrix<double, cpu> dx(v.grad()), dw(std::as_const(w).grad());
    const std::size_t used = ctx.memory.used();
    t.backward(y, dy);
    CHECK(support::same_bits(v.grad(), dx.view()));
    CHECK(ctx.memory.used() == used);
    for (index i = 0; i < dw.size(); ++i) CHECK(w.grad().data[i] == 2.0 * dw.data()[i]);
    // From an earlier variable, what lies behind it is out of play.
    matrix<double, cpu> dh(3, 4);
    dh(2, 3) = 1.0;
    t.backward(h, dh);
    CHECK(v.grad()(2, 3) == 2.0);
    CHECK(v.grad()(0, 0) == 0.0);
    CHECK(y.grad()(0, 0) == 0.0);
    for (index i = 0; i < dw.size(); ++i) CHECK(w.grad().data[i] == 2.0 * dw.data()[i]);
  }

  TEST_CASE("gradients have the same bits for any number of threads") {
    test_random random(27);
    const matrix<float, cpu> x = random_matrix<float>(random, 700, 40);
    vector<std::int32_t, cpu> labels(700);
    for (index n = 0; n < 700; ++n) labels[n] = static_cast<std::int32_t>(random.below(10));
    parameter<float, cpu> w1 = random_parameter<float>(random, "w1", 50, 40);
    parameter<float, cpu> b1 = random_parameter<float>(random, "b1", 1, 50);
    parameter<float, cpu> gamma = random_parameter<float>(random, "gamma", 1, 50);
    parameter<float, cpu> beta = random_parameter<float>(random, "beta", 1, 50);
    parameter<float, cpu> w2 = random_parameter<float>(random, "w2", 10, 50);
    std::vector<matrix<float, cpu>> first;
    for (const int threads : {1, 2, 3}) {
      context<cpu> ctx(threads);
      for (auto* p : {&w1, &b1, &gamma, &beta, &w2}) p->zero_grad(ctx);
      tape<float, cpu> t(ctx);
      const auto v = t.leaf(x);
      const auto h =
          t.dropout(t.activation(gelu_tanh{}, t.linear(v, w1, b1)), random_stream{1, 2}, 0.875f);
      const auto loss = t.cross_entropy(t.linear(t.layer_norm(h, gamma, beta), w2), labels);
      t.backward(loss);
      std::vector<matrix<float, cpu>> found;
      found.emplace_back(loss.value());
      found.emplace_back(v.grad());
      for (auto* p : {&w1, &b1, &gamma, &beta, &w2}) found.emplace_back(std::as_const(*p).grad());
      if (threads == 1) first = found;
      for (std::size_t i = 0; i < first.size(); ++i) {
        CHECK(support::same_bits(found[i].view(), first[i].view()));
      }
    }
  }

  TEST_CASE("the second and later steps allocate nothing, forward or backward") {
    if (!support::allocations_are_counted()) return;
    test_random random(28);
    const matrix<float, cpu> x = random_matrix<float>(random, 300, 40);
    const matrix<float, cpu> target = random_matrix<float>(random, 300, 50);
    vector<std::int32_t, cpu> labels(300);
    parameter<float, cpu> w1 = random_parameter<float>(random, "w1", 50, 40);
    parameter<float, cpu> b1 = random_parameter<float>(random, "b1", 1, 50);
    parameter<float, cpu> gamma = random_parameter<float>(random, "gamma", 1, 50);
    parameter<float, cpu> beta = random_parameter<float>(random, "beta", 1, 50);
    context<cpu> ctx(2);
    tape<float, cpu> t(ctx);
    const auto step = [&] {
      const auto v = t.constant(x);
      auto h = t.linear(v, w1, b1);
      for (int layer = 0; layer < 5; ++layer) {
        h = t.add(h, t.layer_norm(t.activation(silu{}, h), gamma, beta));
        h = t.dropout(t.mul(t.softmax(h), h), random_stream{1, 2}, 0.5f);
      }
      const auto loss = t.weighted_sum(
          {{t.cross_entropy(h, labels), 1.0f}, {t.mse(h, t.constant(target)), 0.5f}});
      t.backward(loss);
      t.reset();
    };
    CHECK(support::allocations_of(step) > 0);
    CHECK(support::allocations_of(step) == 0);
    // Long enough that a leak of closures would fill their first block.
    CHECK(support::allocations_of([&] {
            for (int i = 0; i < 20; ++i) step();
          }) == 0);
  }

  TEST_CASE("reset and the end of a tape hand its memory back") {
    context<cpu> ctx(1);
    matrix<float, cpu> x(10, 10);
    ctx.memory.take<float>(100);
    const std::size_t before = ctx.memory.used();
    {
      tape<float, cpu> t(ctx);
      t.scale(t.leaf(x), 2.0f);
      CHECK(t.size() == 2);
      CHECK(ctx.memory.used() > before);
      t.reset();
      CHECK(t.size() == 0);
      CHECK(ctx.memory.used() == before);
      t.scale(t.leaf(x), 2.0f);
      CHECK(&t.executor() == &ctx);
    }
    CHECK(ctx.memory.used() == before);
  }

  TEST_CASE("an empty batch is legal") {
    context<cpu> ctx(1);
    tape<float, cpu> t(ctx);
    parameter<float, cpu> w("w", matrix<float, cpu>(3, 2)), b("b", matrix<float, cpu>(1, 3));
    parameter<float, cpu> gamma("gamma", matrix<float, cpu>(1, 3)),
        beta("beta", matrix<float, cpu>(1, 3));
    const auto v = t.leaf(matrix_view<const float, cpu>(nullptr, 0, 2));
    const auto h = t.layer_norm(t.activation(relu{}, t.linear(v, w, b)), gamma, beta);
    const auto loss = t.cross_entropy(h, vector<std::int32_t, cpu>());
    t.backward(loss);
    CHECK(loss.value()(0, 0) == 0.0f);
    CHECK(v.grad().rows == 0);
    for (index i = 0; i < 6; ++i) CHECK(w.grad().data[i] == 0.0f);
    CHECK(t.weighted_sum(std::initializer_list<weighted_term<float, cpu>>{}).value()(0, 0) == 0.0f);
  }

  TEST_CASE("the tape names handles that are not its own") {
    context<cpu> ctx(1);
    tape<float, cpu> t(ctx), other(ctx);
    matrix<float, cpu> x(1, 1);
    const auto old = t.leaf(x);
    CHECK(old.wants_grad());
    t.reset();
    const auto foreign = other.leaf(x);
    const auto v = t.leaf(x);
    CHECK_THROWS_WITH_AS(t.scale(old, 1.0f),
                         "talpa::tape::scale: 'x' is a handle from before reset, expected a handle "
                         "that this tape made since its last reset",
                         value_error);
    CHECK_THROWS_WITH_AS(t.add(v, foreign),
                         "talpa::tape::add: 'b' is a handle of another tape, expected a handle "
                         "that this tape made since its last reset",
                         value_error);
    CHECK_THROWS_WITH_AS(t.mul({}, v),
                         "talpa::tape::mul: 'a' is an empty handle, expected a handle that this "
                         "tape made since its last reset",
                         value_error);
    CHECK_THROWS_WITH_AS(old.value(),
                         "talpa::variable::value: 'variable' is a handle from before reset, "
                         "expected a handle that this tape made since its last reset",
                         value_error);
    CHECK_THROWS_WITH_AS((variable<float, cpu>().value()),
                         "talpa::variable::value: 'variable' is an empty handle, expected one that "
                         "a tape made",
                         value_error);
    CHECK_THROWS_AS((variable<float, cpu>().grad()), value_error);
    CHECK_THROWS_AS((variable<float, cpu>().wants_grad()), value_error);
    CHECK_THROWS_AS((routed_variable<float, cpu>().view()), value_error);
    CHECK_THROWS_WITH_AS(t.constant(x).grad(),
                         "talpa::variable::grad: 'variable' is a constant, expected a variable "
                         "that depends on a leaf or on a parameter that trains",
                         value_error);
    const auto nothing = [](context<cpu>&, matrix_view<const float, cpu>,
                            std::span<const gradient_target<float, cpu>>) {};
    CHECK_THROWS_WITH_AS(t.record(x, {old}, nothing),
                         "talpa::tape::record: 'inputs' is a handle from before reset, expected a "
                         "handle that this tape made since its last reset",
                         value_error);
  }

  TEST_CASE("the tape names arguments that do not fit") {
    context<cpu> ctx(1);
    tape<float, cpu> t(ctx);
    matrix<float, cpu> x(2, 3), other(3, 2);
    parameter<float, cpu> w("w", matrix<float, cpu>(4, 2)), fits("w", matrix<float, cpu>(4, 3));
    const auto v = t.leaf(x), u = t.leaf(other);
    CHECK_THROWS_WITH_AS(t.add(v, u),
                         "talpa::tape::add: 'b' has shape [3, 2], expected [2, 3] = shape of a",
                         shape_error);
    CHECK_THROWS_WITH_AS(t.mul(v, u),
                         "talpa::tape::mul: 'b' has shape [3, 2], expected [2, 3] = shape of a",
                         shape_error);
    CHECK_THROWS_WITH_AS(
        t.reshape(v, 4, 2),
        "talpa::tape::reshape: 'x' has shape [2, 3], expected [4, 2] = as many numbers",
        shape_error);
    CHECK_THROWS_WITH_AS(t.reshape(v, -2, -3),
                         "talpa::tape::reshape: 'rows' is -2, expected >= 0 = rows of the result",
                         value_error);
    CHECK_THROWS_WITH_AS(
        t.reshape(v, 0, -3),
        "talpa::tape::reshape: 'cols' is -3, expected >= 0 = columns of the result", value_error);
    CHECK_THROWS_WITH_AS(t.reshape(t.leaf(x.view().col_range(0, 2)), 4, 1),
                         "talpa::tape::reshape: 'x' is a view of stride 3, expected 2 = columns, "
                         "rows without gaps",
                         value_error);
    CHECK_THROWS_WITH_AS(
        t.linear(v, w),
        "talpa::tape::linear: 'weight' has shape [4, 2], expected [4, 3] = outputs, columns of x",
        shape_error);
    CHECK_THROWS_WITH_AS(
        t.linear(v, fits, w),
        "talpa::tape::linear: 'bias' has shape [4, 2], expected [1, 4] = one row, rows of weight",
        shape_error);
    CHECK_THROWS_WITH_AS(t.layer_norm(v, w, w),
                         "talpa::tape::layer_norm: 'gamma' has shape [4, 2], expected [1, 3] = one "
                         "row, columns of x",
                         shape_error);
    parameter<float, cpu> row("row", matrix<float, cpu>(1, 3));
    CHECK_THROWS_WITH_AS(
        t.layer_norm(v, row, w),
        "talpa::tape::layer_norm: 'beta' has shape [4, 2], expected [1, 3] = one row, columns of x",
        shape_error);
    CHECK_THROWS_WITH_AS(
        t.cross_entropy(v, vector<std::int32_t, cpu>(3)),
        "talpa::tape::cross_entropy: 'labels' has shape [3], expected [2] = rows of logits",
        shape_error);
    CHECK_THROWS_WITH_AS(
        t.mse(v, u), "talpa::tape::mse: 'target' has shape [3, 2], expected [2, 3] = shape of y",
        shape_error);
    CHECK_THROWS_WITH_AS(
        t.weighted_sum({{v, 1.0f}}),
        "talpa::tape::weighted_sum: 'terms' has shape [2, 3], expected [1, 1] = one number",
        shape_error);
    CHECK_THROWS_WITH_AS(
        t.backward(v),
        "talpa::tape::backward: 'loss' has shape [2, 3], expected [1, 1] = one number, or give dy",
        shape_error);
    CHECK_THROWS_WITH_AS(
        t.backward(v, other),
        "talpa::tape::backward: 'dy' has shape [3, 2], expected [2, 3] = shape of y", shape_error);
    CHECK_THROWS_WITH_AS(t.backward(t.mse(t.constant(x), t.constant(x))),
                         "talpa::tape::backward: 'loss' is a constant, expected a variable that "
                         "depends on a leaf or on a parameter that trains",
                         value_error);
    CHECK_THROWS_WITH_AS(t.backward(t.constant(x), x),
                         "talpa::tape::backward: 'y' is a constant, expected a variable that "
                         "depends on a leaf or on a parameter that trains",
                         value_error);
  }
}

}  // namespace talpa::tape_test
