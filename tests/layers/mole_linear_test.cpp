// SPDX-License-Identifier: Apache-2.0
#include "layers/slow_mole.hpp"
#include "support/count_allocations.hpp"
#include "support/laws.hpp"
#include "support/padded.hpp"
#include "support/refused.hpp"
#include "support/scalars.hpp"

#include <talpa/cpu/group_loss.hpp>
#include <talpa/cpu/routing_sums.hpp>
#include <talpa/experts/shared_lora.hpp>
#include <talpa/layers/infer.hpp>
#include <talpa/layers/lora_linear.hpp>
#include <talpa/losses/load_balance.hpp>
#include <talpa/routing/record.hpp>

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <span>
#include <string>
#include <type_traits>
#include <vector>

namespace talpa::mole_linear_test {

namespace {

using support::make_mole;
using support::make_params;
using support::mole_sizes;
using support::run_mole;
using support::table;
using support::to_table;
using support::weighing;

constexpr strategy executions[] = {strategy::dense_masked, strategy::grouped, strategy::indexed};

std::string name_of(strategy s) { return strategy_name(s); }

/// One flag a token, 0 for tokens first, first + every, ... Not inlined: gcc 12 unrolls the loop
/// for a known number of tokens and then warns of a write beyond them that does not happen.
[[gnu::noinline]] vector<std::uint8_t, cpu> padding(index tokens, index first, index every) {
  vector<std::uint8_t, cpu> real(tokens);
  for (index n = 0; n < tokens; ++n) real[n] = n % every == first ? 0 : 1;
  return real;
}

using raw = top_k<gate::raw>;
using renormalised = top_k<gate::renormalised>;

/// The slow twin of a selector.
support::slow_row slow(const raw& s, const std::vector<double>& u) {
  return support::slow_top_k(u, s.k, weighing::raw);
}
support::slow_row slow(const renormalised& s, const std::vector<double>& u) {
  return support::slow_top_k(u, s.k, weighing::renormalised);
}
support::slow_row slow(const dense&, const std::vector<double>& u) {
  return support::slow_top_k(u, static_cast<index>(u.size()), weighing::raw);
}

/// Distance of the last chosen logit to the first that is not, over all tokens: where rounding
/// could choose otherwise, the test's inputs are to blame.
double margin(const table& x, const table& wr, const table& br, index k) {
  double least = std::numeric_limits<double>::infinity();
  for (index n = 0; n < x.rows; ++n) {
    std::vector<double> u;
    for (index e = 0; e < wr.rows; ++e) {
      u.push_back(br(0, e));
      for (index d = 0; d < x.cols; ++d) u.back() += x(n, d) * wr(e, d);
    }
    std::sort(u.rbegin(), u.rend());
    if (k < wr.rows) {
      const auto last = static_cast<std::size_t>(k);
      least = std::min(least, u[last - 1] - u[last]);
    }
  }
  return least;
}

/// Turns on all experts and says one.
struct liar : dense {
  index max_selected(index) const { return 1; }
};

template <class T, class Selector>
void compare_forward(const mole_sizes& s, const Selector& selector, std::uint64_t seed,
                     int threads) {
  CAPTURE(s.tokens);
  CAPTURE(s.experts);
  CAPTURE(seed);
  support::test_random random(seed);
  const matrix<T, cpu> x = support::random_matrix<T>(random, s.tokens, s.inputs);
  for (const strategy execution : executions) {
    CAPTURE(name_of(execution));
    const auto layer = make_mole(s, selector, execution);
    auto p = make_params<T>(layer, s, seed);
    const table wr = to_table(p.router.scorer.weight.value()),
                br = to_table(p.router.scorer.bias.value());
    const double error = support::mole_error<T>(s, to_table(x.view()), wr, br);
    REQUIRE(margin(to_table(x.view()), wr, br, selector.max_selected(s.experts)) > error);
    const support::slow_mole expected = support::slow_forward(
        p, layer.expert, s.experts, to_table(x.view()),
        [&](const std::vector<double>& u, index) { return slow(selector, u); });
    matrix<T, cpu> y(s.tokens, s.outputs);
    testing::poison<T>(y.view());
    context<cpu> ctx(threads);
    const auto kept = layer.forward(ctx, p, x, y.view(), mode::training);
    CHECK(kept.mixed.used == execution);
    bool same = true;
    for (index n = 0; n < s.tokens; ++n) {
      for (index e = 0; e < s.experts; ++e) {
        same = same && kept.routed.routing.on(n, e) ==
                           expected.on[static_cast<std::size_t>(n)][static_cast<std::size_t>(e)];
      }
    }
    CHECK(same);
    CHECK(testing::first_excess(
              y.view(),
              matrix_view<const double, cpu>(expected.y.values.data(), s.tokens, s.outputs),
              [&](index n, index o) { return error * expected.magnitude(n, o); }) == "");
    // The adapters matter.
    CHECK(support::largest(to_table(y.view())) > 0.0);
  }
}

/// Gradients of everything, by central differences. With a loss, its value is one more output.
template <class Selector>
void check_gradients(const mole_sizes& s, const Selector& selector, strategy execution,
                     bool frozen_base, bool with_loss, batch_info<double, cpu> batch,
                     double dropout = 0.0) {
  CAPTURE(name_of(execution));
  using loss = load_balance<balance::per_selection, balance::per_layer>;
  const auto layer = make_mole(s, selector, execution, dropout);
  auto p = make_params<double>(layer, s, 3, frozen_base);
  support::test_random random(4);
  matrix<double, cpu> x = support::random_matrix<double>(random, s.tokens, s.inputs, 0.5);
  matrix<double, cpu> dx(s.tokens, s.inputs);
  // Row N holds the loss, where there is one.
  const index rows = s.tokens + (with_loss ? 1 : 0);
  matrix<double, cpu> out(rows, s.outputs);
  matrix<double, cpu> upstream = testing::cotangent(rows, s.outputs, 8);
  const auto y = out.view().row_range(0, s.tokens);
  context<cpu> ctx(1);
  std::vector<std::uint32_t> signature;
  const auto forward = [&] {
    const workspace<cpu>::scope scope(ctx.memory);
    generator same(17);
    batch.random = &same;
    const auto kept = layer.forward(ctx, p, x, y, mode::training, batch);
    signature = support::signature_of(kept.routed);
    if (with_loss) out(s.tokens, 0) = loss{}.forward(ctx, kept.routed).value(0, 0);
    return out.view();
  };

  generator same(17);
  batch.random = &same;
  const auto kept = layer.forward(ctx, p, x, y, mode::training, batch);
  matrix<double, cpu> dlogits(s.tokens, s.experts), dgates(s.tokens, s.experts), one(1, 1);
  const routed_gradient<double, cpu> from_losses{dlogits.view(), dgates.view()};
  if (with_loss) {
    one(0, 0) = upstream(s.tokens, 0);
    const auto value = loss{}.forward(ctx, kept.routed);
    loss{}.backward(ctx, kept.routed, value, one, from_losses, grad_mode::overwrite);
  }
  testing::detail::fill_gradients<double>(p, 0.0);
  layer.backward(ctx, p, kept, x, upstream.view().row_range(0, s.tokens), dx.view(),
                 grad_mode::overwrite, with_loss ? &from_losses : nullptr);

  std::vector<testing::gradient_probe> probes{{"x", x.view(), dx.view()}};
  p.visit([&](parameter<double, cpu>& q) {
    if (q.trainable()) probes.push_back({q.name(), q.value(), q.grad()});
  });
  const double d = static_cast<double>(s.inputs), e = static_cast<double>(s.experts);
  const double r = static_cast<double>(s.rank);
  const double weight = std::max(1.0, testing::detail::largest_weight<double>(p));
  const double scale = layer.expert.scale() / (1.0 - dropout);
  // Base d terms, adapters e r d, of products of at most x, two weights and the scale.
  const double magnitude = static_cast<double>(out.size()) *
                           std::max(1.0, testing::largest(x.view())) *
                           (d * weight + e * r * d * weight * weight * scale);
  support::obeys(testing::gradient_check(
      "mole_linear", probes, upstream,
      {.roundings = 2.0 * d + e * r + 4.0 * e + 32.0, .magnitude = magnitude}, forward,
      [&] { return signature; }));
}

}  // namespace

TEST_SUITE("layers/mole_linear") {
  TEST_CASE("two experts of rank 1 on two features, by hand") {
    // Both routers and experts see x = (1, 2). W = [1 1], b = 0: base 3. Logits (1, 2) choose
    // expert 1 with gate 1. A_1 = [0 1], B_1 = [5], s = 2: 2 * 5 * 2 = 20. A_0 and B_0 must not
    // matter.
    for (const strategy execution : executions) {
      CAPTURE(name_of(execution));
      const mole_linear<router<linear_scorer, renormalised>, lora> layer{
          .router = {.scorer = {}, .selector = {.k = 1}},
          .expert = {.rank = 1, .alpha = 2.0},
          .experts = 2,
          .execution = execution};
      generator random(1);
      auto base = linear{.bias = false}.init<float, cpu>(2, 1, random, "");
      auto p = layer.init<float, cpu>(std::move(base), random);
      const auto set = [](parameter<float, cpu>& q, std::vector<float> values) {
        std::copy(values.begin(), values.end(), q.value().data);
      };
      set(p.base.weight, {1, 1});
      set(p.router.scorer.weight, {1, 0, 0, 1});
      set(p.expert.a, {7, 7, 0, 1});
      set(p.expert.b, {9, 5});
      matrix<float, cpu> x(1, 2), y(1, 1), dy(1, 1), dx(1, 2);
      x(0, 0) = 1.0f;
      x(0, 1) = 2.0f;
      dy(0, 0) = 1.0f;
      context<cpu> ctx(1);
      const auto kept = layer.forward(ctx, p, x, y.view(), mode::training);
      CHECK(y(0, 0) == 23.0f);
      CHECK(kept.routed.logits(0, 1) == 2.0f);
      CHECK(kept.routed.routing.gates(0, 0) == 0.0f);
      CHECK(kept.routed.routing.gates(0, 1) == 1.0f);
      // dx = W + 2 * 5 * A_1; a gate of constant 1 gives the router nothing.
      layer.backward(ctx, p, kept, x, dy, dx.view(), grad_mode::overwrite);
      CHECK(dx(0, 0) == 1.0f);
      CHECK(dx(0, 1) == 11.0f);
      CHECK(p.base.weight.grad()(0, 1) == 2.0f);
      CHECK(p.expert.a.grad()(0, 0) == 0.0f);
      CHECK(p.expert.a.grad()(1, 0) == 10.0f);  // s g B_1 x_0
      CHECK(p.expert.a.grad()(1, 1) == 20.0f);
      CHECK(p.expert.b.grad()(0, 0) == 0.0f);
      CHECK(p.expert.b.grad()(1, 0) == 4.0f);  // s g A_1 x
      CHECK(testing::largest(p.router.scorer.weight.grad()) == 0.0);
    }
  }

  TEST_CASE_TEMPLATE("forward agrees with a slow reference over random shapes", T, TALPA_SCALARS) {
    support::test_random random(50);
    for (std::uint64_t i = 0; i < 12; ++i) {
      const mole_sizes s{.tokens = 1 + random.below(30),
                         .inputs = 1 + random.below(20),
                         .outputs = 1 + random.below(20),
                         .experts = 1 + random.below(9),
                         .rank = 1 + random.below(5)};
      const index k = 1 + random.below(std::min<index>(s.experts, 3));
      const int threads = 1 + static_cast<int>(i % 3);
      compare_forward<T>(s, raw{.k = k}, 900 + i, threads);
      compare_forward<T>(s, renormalised{.k = k}, 930 + i, threads);
      compare_forward<T>(s, dense{}, 960 + i, threads);
    }
    // More experts than tokens use, more than a word of the mask.
    compare_forward<T>({.tokens = 3, .inputs = 6, .outputs = 4, .experts = 40, .rank = 2},
                       renormalised{.k = 2}, 77, 2);
  }

  TEST_CASE("gradients equal differences, whatever trains and whatever executes") {
    const mole_sizes s{};
    for (const strategy execution : executions) {
      check_gradients(s, raw{.k = 2}, execution, true, false, {});
      check_gradients(s, renormalised{.k = 2}, execution, false, false, {});
      check_gradients(s, dense{}, execution, true, false, {});
      check_gradients(s, top_k<gate::softmax_selected>{.k = 3}, execution, true, true, {});
    }
    check_gradients({.tokens = 3, .inputs = 4, .outputs = 2, .experts = 9, .rank = 1}, raw{.k = 1},
                    strategy::grouped, true, true, {});
    check_gradients({.tokens = 5, .inputs = 3, .outputs = 2, .experts = 1, .rank = 2}, dense{},
                    strategy::dense_masked, false, false, {});
  }

  TEST_CASE("gradients equal differences with padding, dropout and a recorded mask") {
    const mole_sizes s{};
    const vector<std::uint8_t, cpu> real = padding(s.tokens, 2, 4);
    // A mask that no selection would give: one to three experts, one token without any.
    matrix<std::uint32_t, cpu> mask(s.tokens, 1);
    for (index n = 0; n < s.tokens; ++n) mask(n, 0) = static_cast<std::uint32_t>(n % 8 * 2 % 16);
    for (const strategy execution : executions) {
      check_gradients(s, renormalised{.k = 2}, execution, false, true,
                      {.padding_mask = real.view()});
      check_gradients(s, raw{.k = 2}, execution, true, false, {}, 0.25);
      check_gradients(s, renormalised{.k = 3}, execution, false, true,
                      {.padding_mask = real.view()}, 0.5);
      check_gradients(s, raw{.k = 3}, execution, true, false, {.replay = mask.view()});
      check_gradients(s, renormalised{.k = 3}, execution, true, false, {.replay = mask.view()});
    }
  }

  TEST_CASE_TEMPLATE("all strategies agree within rounding", T, TALPA_SCALARS) {
    support::test_random random(51);
    for (std::uint64_t i = 0; i < 10; ++i) {
      CAPTURE(i);
      // Often fewer tokens than experts, so that some have none.
      const mole_sizes s{.tokens = 1 + random.below(40),
                         .inputs = 2 + random.below(12),
                         .outputs = 2 + random.below(12),
                         .experts = 2 + random.below(20),
                         .rank = 1 + random.below(6)};
      const renormalised selector{.k = std::min<index>(2, s.experts)};
      const matrix<T, cpu> x = support::random_matrix<T>(random, s.tokens, s.inputs);
      const matrix<T, cpu> dy = support::random_matrix<T>(random, s.tokens, s.outputs);
      const auto masked = make_mole(s, selector, strategy::dense_masked);
      auto p = make_params<T>(masked, s, 700 + i, false);
      const auto b = run_mole<T>(masked, p, x, dy);
      for (const strategy execution : {strategy::grouped, strategy::indexed}) {
        CAPTURE(name_of(execution));
        const auto a = run_mole<T>(make_mole(s, selector, execution), p, x, dy);
        CHECK(testing::first_difference(a.gates, b.gates) == "");
        // Both round every sum of at most N + D + O + E R + 2 E terms in their own order.
        const auto size = support::magnitudes(masked, p, to_table(x.view()), to_table(dy.view()),
                                              to_table(a.gates.view()));
        const double roundings =
            static_cast<double>(s.tokens + s.inputs + s.outputs + s.experts * (s.rank + 2) + 16);
        const double relative = 2.0 * testing::gamma<T>(roundings);
        const auto agree = [&](const matrix<T, cpu>& found, const matrix<T, cpu>& expected,
                               const table& terms) {
          return testing::first_excess(found.view(), expected.view(),
                                       [&](index r, index c) { return relative * terms(r, c); });
        };
        CHECK(agree(a.y, b.y, size.y) == "");
        CHECK(agree(a.dx, b.dx, size.dx) == "");
        REQUIRE(a.gradients.size() == size.gradients.size());
        for (std::size_t q = 0; q < a.gradients.size(); ++q) {
          CAPTURE(q);
          CHECK(agree(a.gradients[q], b.gradients[q], size.gradients[q]) == "");
          // The bound does not let zeros pass for a gradient.
          CHECK(testing::largest(a.gradients[q].view()) >
                4.0 * relative * support::largest(size.gradients[q]));
        }
      }
    }
  }

  TEST_CASE_TEMPLATE("a packed base stays packed in a step and changes the base alone", T,
                     TALPA_SCALARS) {
    const mole_sizes s{.tokens = 31, .inputs = 21, .outputs = 18, .experts = 4, .rank = 3};
    support::test_random random(64);
    const matrix<T, cpu> x = support::random_matrix<T>(random, s.tokens, s.inputs);
    const matrix<T, cpu> dy = support::random_matrix<T>(random, s.tokens, s.outputs);
    for (const strategy execution : executions) {
      CAPTURE(name_of(execution));
      const auto layer = make_mole(s, renormalised{.k = 2}, execution);
      auto p = make_params<T>(layer, s, 20);
      const auto plain = run_mole<T>(layer, p, x, dy);
      context<cpu> ctx(1);
      p.base.pack(ctx);
      const auto packed = run_mole<T>(layer, p, x, dy);
      CHECK(p.base.weight.packed() != nullptr);
      CHECK(p.base.weight.packed_transpose() != nullptr);
      CHECK(testing::detail::first_difference(packed.gradients, plain.gradients) == "");
      // Both round the sums of base and experts, of D + E R or O + E R terms and a few more.
      const auto size = support::magnitudes(layer, p, to_table(x.view()), to_table(dy.view()),
                                            to_table(plain.gates.view()));
      const double relative = 2.0 * testing::gamma<T>(static_cast<double>(
                                        s.inputs + s.outputs + s.experts * (s.rank + 2) + 16));
      const auto agree = [&](const matrix<T, cpu>& found, const matrix<T, cpu>& expected,
                             const table& terms) {
        return testing::first_excess(found.view(), expected.view(),
                                     [&](index r, index c) { return relative * terms(r, c); });
      };
      CHECK(agree(packed.y, plain.y, size.y) == "");
      CHECK(agree(packed.dx, plain.dx, size.dx) == "");
    }
  }

  TEST_CASE_TEMPLATE("an adapter onto somebody else's y has the bits of the layer", T,
                     TALPA_SCALARS) {
    const mole_sizes s{.tokens = 31, .inputs = 21, .outputs = 18, .experts = 4, .rank = 3};
    support::test_random random(66);
    const matrix<T, cpu> x = support::random_matrix<T>(random, s.tokens, s.inputs);
    const matrix<T, cpu> dy = support::random_matrix<T>(random, s.tokens, s.outputs);
    for (const strategy execution : executions) {
      CAPTURE(name_of(execution));
      const auto layer = make_mole(s, renormalised{.k = 2}, execution);
      auto whole = make_params<T>(layer, s, 21);
      const auto expected = run_mole<T>(layer, whole, x, dy);

      generator start(1);
      auto p = layer.template init_adapter<T, cpu>(s.inputs, s.outputs, start, "mole.");
      index parameters = 0;
      p.visit([&](parameter<T, cpu>&) { ++parameters; });
      CHECK(parameters == 4);  // weight and bias of the router, A and B
      CHECK(p.expert.a.name() == "mole.expert.A");
      std::vector<matrix_view<const T, cpu>> values;
      whole.router.visit([&](parameter<T, cpu>& q) { values.push_back(q.value()); });
      whole.expert.visit([&](parameter<T, cpu>& q) { values.push_back(q.value()); });
      std::size_t next = 0;
      p.visit([&](parameter<T, cpu>& q) {
        const matrix_view<const T, cpu> from = values[next++];
        REQUIRE(q.value().rows == from.rows);
        std::copy_n(from.data, from.rows * from.cols, q.value().data);
      });
      context<cpu> ctx(1);
      matrix<T, cpu> y(s.tokens, s.outputs), dx(s.tokens, s.inputs);
      affine_forward<cpu, T>(ctx, whole.base, x, y.view());
      const auto kept = layer.add_adapter(ctx, p, x, y.view(), mode::training);
      CHECK(testing::first_difference(y, expected.y) == "");
      affine_backward<cpu, T>(ctx, whole.base, x, dy, dx.view(), grad_mode::overwrite);
      layer.add_adapter_backward(ctx, p, kept, x, dy, dx.view(), grad_mode::accumulate);
      CHECK(testing::first_difference(dx, expected.dx) == "");
      const auto same = [](const parameter<T, cpu>& a, const parameter<T, cpu>& b) {
        return testing::first_difference(matrix<T, cpu>(a.grad()), matrix<T, cpu>(b.grad()));
      };
      CHECK(same(p.expert.a, whole.expert.a) == "");
      CHECK(same(p.expert.b, whole.expert.b) == "");
      CHECK(same(p.router.scorer.weight, whole.router.scorer.weight) == "");

      matrix<T, cpu> wide(s.tokens, s.outputs + 1), few(s.tokens - 1, s.outputs);
      CHECK_THROWS_AS(layer.add_adapter(ctx, p, x, wide.view(), mode::training), shape_error);
      CHECK(testing::first_difference(wide, matrix<T, cpu>(s.tokens, s.outputs + 1)) == "");
      CHECK_THROWS_WITH_AS(layer.add_adapter(ctx, p, x, few.view(), mode::training),
                           "talpa::mole_linear: 'y' has shape [30, 18], expected [31, 18] = tokens "
                           "of x",
                           shape_error);
    }
  }

  TEST_CASE_TEMPLATE("one pass over the tokens has the bits of one op after the other", T,
                     TALPA_SCALARS) {
    const mole_sizes s{.tokens = 129, .inputs = 70, .outputs = 66, .experts = 5, .rank = 3};
    support::test_random random(65);
    const matrix<T, cpu> x = support::random_matrix<T>(random, s.tokens, s.inputs);
    const matrix<T, cpu> dy = support::random_matrix<T>(random, s.tokens, s.outputs);
    for (const bool biased : {false, true}) {
      CAPTURE(biased);
      auto layer = make_mole(s, renormalised{.k = 2}, strategy::indexed);
      layer.router.scorer.bias = biased;
      generator parameters(21);
      auto base = linear{.bias = biased}.init<T, cpu>(s.inputs, s.outputs, parameters, "base.");
      base.freeze();
      auto p = layer.template init<T, cpu>(std::move(base), parameters);
      testing::detail::shake<T>(p, parameters, 0.5);
      context<cpu> ctx(1);
      p.base.pack(ctx);
      vector<std::uint8_t, cpu> padding(s.tokens);
      for (index n = 0; n < s.tokens; ++n) padding[n] = n % 4 != 1 ? 1 : 0;
      const auto joined = [&](bool checked, const batch_info<T, cpu>& batch) {
        ctx.checked = checked;
        const workspace<cpu>::scope scope(ctx.memory);
        matrix<T, cpu> y(s.tokens, s.outputs);
        return layer.forward(ctx, p, x, y.view(), mode::training, batch).mixed.joined;
      };
      for (const grad_mode mode : {grad_mode::overwrite, grad_mode::accumulate}) {
        for (const bool other : {false, true}) {
          batch_info<T, cpu> batch;
          generator stream(4);
          if (other) batch.padding_mask = padding.view();
          layer.expert.dropout = other ? 0.25 : 0.0;
          batch.random = &stream;
          const auto run = [&](int threads, bool checked) {
            stream = generator(4);
            return run_mole<T>(layer, p, x, dy, threads, batch, mode, T{1}, checked);
          };
          // A context that looks at the logits first takes one op after the other.
          REQUIRE(joined(false, batch));
          REQUIRE_FALSE(joined(true, batch));
          const auto apart = run(1, true);
          for (const int threads : {1, 2, 3}) {
            CHECK(support::step_difference(run(threads, false), apart) == "");
          }
        }
      }
      layer.expert.dropout = 0.0;
      // Few loops are handed to other threads: the bank's copy and the product, backward the three
      // gradients as well.
      int loops = 0;
      const auto count = [](void* host, int, index tasks, executor::task call, void* state) {
        ++*static_cast<int*>(host);
        for (index i = 0; i < tasks; ++i) call(state, i, 0);
      };
      context<cpu> counting(2, executor{count, &loops});
      matrix<T, cpu> y(s.tokens, s.outputs), dx(s.tokens, s.inputs);
      const auto kept = layer.forward(counting, p, x, y.view(), mode::training);
      CHECK(loops >= 1);
      CHECK(loops <= 2);
      loops = 0;
      layer.backward(counting, p, kept, x, dy, dx.view(), grad_mode::overwrite);
      CHECK(loops >= 1);
      CHECK(loops <= 5);
      // What does not go through together: a recorded mask, another strategy.
      matrix<std::uint32_t, cpu> mask(s.tokens, 1);
      std::fill_n(mask.data(), mask.size(), 3u);
      CHECK_FALSE(joined(false, {.replay = mask.view()}));
      layer.execution = strategy::grouped;
      CHECK_FALSE(joined(false, {}));
    }
  }

  TEST_CASE("a selector that chooses more experts than it says is refused") {
    const mole_sizes s{.tokens = 20, .inputs = 70, .outputs = 66, .experts = 4, .rank = 2};
    support::test_random random(66);
    const matrix<float, cpu> x = support::random_matrix<float>(random, s.tokens, s.inputs);
    matrix<float, cpu> y(s.tokens, s.outputs);
    for (const bool packed : {false, true}) {
      mole_linear<router<linear_scorer, liar>, lora> layer{
          .expert = {.rank = 2}, .experts = 4, .execution = strategy::indexed};
      generator parameters(22);
      auto base = linear{.bias = false}.init<float, cpu>(s.inputs, s.outputs, parameters, "base.");
      base.freeze();
      auto p = layer.init<float, cpu>(std::move(base), parameters);
      context<cpu> ctx(2);
      if (packed) p.base.pack(ctx);
      CHECK_THROWS_WITH_AS(layer.forward(ctx, p, x, y.view(), mode::training),
                           "talpa::ops::build_segments: 'token_of_slot' has shape [20], expected "
                           "[80] = set bits of mask, or more",
                           shape_error);
    }
  }

  TEST_CASE_TEMPLATE("any number of threads and any repetition gives the same bits", T,
                     TALPA_SCALARS) {
    const mole_sizes s{.tokens = 1100, .inputs = 9, .outputs = 8, .experts = 5, .rank = 3};
    support::test_random random(52);
    const matrix<T, cpu> x = support::random_matrix<T>(random, s.tokens, s.inputs);
    const matrix<T, cpu> dy = support::random_matrix<T>(random, s.tokens, s.outputs);
    for (const strategy execution : executions) {
      CAPTURE(name_of(execution));
      const auto layer = make_mole(s, renormalised{.k = 2}, execution, 0.25);
      auto p = make_params<T>(layer, s, 6, false);
      generator first(3);
      const auto one = run_mole<T>(layer, p, x, dy, 1, {.random = &first});
      for (const int threads : {1, 2, 4}) {
        generator again(3);
        CHECK(support::step_difference(run_mole<T>(layer, p, x, dy, threads, {.random = &again}),
                                       one) == "");
      }
    }
  }

  TEST_CASE_TEMPLATE("rows that lie inside longer ones, at odd addresses, give the same bits", T,
                     TALPA_SCALARS) {
    support::test_random random(64);
    for (const index width : {20, 130}) {
      const mole_sizes s{
          .tokens = 70, .inputs = width, .outputs = width + 3, .experts = 6, .rank = 2};
      const matrix<T, cpu> x = support::random_matrix<T>(random, s.tokens, s.inputs);
      const matrix<T, cpu> dy = support::random_matrix<T>(random, s.tokens, s.outputs);
      for (const strategy execution : executions) {
        for (const bool packed : {false, true}) {
          CAPTURE(name_of(execution));
          CAPTURE(packed);
          const auto layer = make_mole(s, renormalised{.k = 2}, execution);
          auto p = make_params<T>(layer, s, 18);
          context<cpu> ctx(1);
          if (packed) p.base.pack(ctx);
          const auto expected = run_mole<T>(layer, p, x, dy);
          support::padded<T> x_in(x), dy_in(dy), y(s.tokens, s.outputs), dx(s.tokens, s.inputs);
          testing::detail::fill_gradients<T>(p, T{0});
          const auto kept = layer.forward(ctx, p, x_in.view(), y.view(), mode::training);
          layer.backward(ctx, p, kept, x_in.view(), dy_in.view(), dx.view(), grad_mode::overwrite);
          CHECK(testing::first_difference<T>(y.view(), expected.y.view()) == "");
          CHECK(testing::first_difference<T>(dx.view(), expected.dx.view()) == "");
          CHECK(testing::detail::first_difference(testing::detail::gradients_of<T>(p),
                                                  expected.gradients) == "");
          CHECK(y.intact());
          CHECK(dx.intact());
        }
      }
    }
  }

  TEST_CASE_TEMPLATE("one expert with gate 1 is lora_linear, bit for bit", T, TALPA_SCALARS) {
    const auto compare = [](const mole_sizes& s, const auto& selector, strategy execution,
                            double dropout) {
      CAPTURE(s.tokens);
      CAPTURE(name_of(execution));
      CAPTURE(dropout);
      support::test_random random(53);
      const matrix<T, cpu> x = support::random_matrix<T>(random, s.tokens, s.inputs);
      const matrix<T, cpu> dy = support::random_matrix<T>(random, s.tokens, s.outputs);
      const auto mixture = make_mole(s, selector, execution, dropout);
      auto p = make_params<T>(mixture, s, 7, false);
      const lora_linear plain{.adapter = mixture.expert};
      lora_linear::params<T, cpu> q{p.base, p.expert};
      generator one(4), two(4);
      const auto routed = run_mole<T>(mixture, p, x, dy, 2, {.random = &one});
      context<cpu> ctx(2);
      matrix<T, cpu> y(s.tokens, s.outputs), dx(s.tokens, s.inputs);
      testing::detail::fill_gradients<T>(q, T{0});
      const auto kept = plain.forward(ctx, q, x, y.view(), mode::training, {.random = &two});
      plain.backward(ctx, q, kept, x, dy, dx.view(), grad_mode::overwrite);
      CHECK(testing::first_difference(routed.y, y) == "");
      CHECK(testing::first_difference(routed.dx, dx) == "");
      CHECK(testing::first_difference<T>(p.expert.a.grad(), q.adapter.a.grad()) == "");
      CHECK(testing::first_difference<T>(p.expert.b.grad(), q.adapter.b.grad()) == "");
      CHECK(testing::first_difference<T>(p.base.weight.grad(), q.base.weight.grad()) == "");
      CHECK(testing::largest(p.router.scorer.weight.grad()) == 0.0);
    };
    // One tile a product, and several: sizes at which both strategies cut products alike.
    for (const mole_sizes& s :
         {mole_sizes{.tokens = 23, .inputs = 11, .outputs = 7, .experts = 1, .rank = 4},
          mole_sizes{.tokens = 513, .inputs = 40, .outputs = 33, .experts = 1, .rank = 8}}) {
      for (const strategy execution : {strategy::dense_masked, strategy::grouped}) {
        for (const double dropout : {0.0, 0.3}) {
          compare(s, dense{}, execution, dropout);
          compare(s, raw{.k = 1}, execution, dropout);
          compare(s, renormalised{.k = 1}, execution, dropout);
        }
      }
    }
  }

  TEST_CASE("fresh adapters leave the base as it is") {
    const mole_sizes s{};
    support::test_random random(54);
    const matrix<float, cpu> x = support::random_matrix<float>(random, s.tokens, s.inputs);
    for (const strategy execution : executions) {
      const auto layer = make_mole(s, renormalised{.k = 2}, execution);
      generator g(1);
      auto base = linear{}.init<float, cpu>(s.inputs, s.outputs, g, "");
      const auto alone = base;
      auto p = layer.init<float, cpu>(std::move(base), g);
      context<cpu> ctx(1);
      matrix<float, cpu> y(s.tokens, s.outputs), expected(s.tokens, s.outputs);
      layer.forward(ctx, p, x, y.view(), mode::training);
      linear{}.forward(ctx, alone, x, expected.view(), mode::training);
      CHECK(testing::first_difference(y, expected) == "");
    }
  }

  TEST_CASE("the same stream drops the same elements, inference none") {
    const mole_sizes s{.tokens = 40, .inputs = 30, .outputs = 6, .experts = 3, .rank = 2};
    support::test_random random(55);
    const matrix<double, cpu> x = support::random_matrix<double>(random, s.tokens, s.inputs);
    const matrix<double, cpu> dy = support::random_matrix<double>(random, s.tokens, s.outputs);
    for (const strategy execution : executions) {
      const auto layer = make_mole(s, dense{}, execution, 0.4);
      auto p = make_params<double>(layer, s, 8);
      generator one(5), two(5), three(6);
      const auto a = run_mole<double>(layer, p, x, dy, 1, {.random = &one});
      const auto b = run_mole<double>(layer, p, x, dy, 1, {.random = &two});
      const auto c = run_mole<double>(layer, p, x, dy, 1, {.random = &three});
      const auto d = run_mole<double>(layer, p, x, dy, 1, {.random = &one});
      CHECK(support::step_difference(a, b) == "");
      CHECK(testing::first_difference(a.y, c.y) != "");
      CHECK(testing::first_difference(a.y, d.y) != "");
      CHECK(one.next_stream() == 2);
      // The router sees all of x.
      CHECK(testing::first_difference(a.gates, c.gates) == "");
      auto undropped = layer;
      undropped.expert.dropout = 0.0;
      context<cpu> ctx(1);
      matrix<double, cpu> y(s.tokens, s.outputs), expected(s.tokens, s.outputs);
      layer.forward(ctx, p, x, y.view(), mode::inference);
      undropped.forward(ctx, p, x, expected.view(), mode::training);
      CHECK(testing::first_difference(y, expected) == "");
    }
  }

  TEST_CASE("all experts of a call share one mask, and its mean is x") {
    // A_e selects the sum of x, B_e hands it on: y is the sum of the kept elements over the share
    // that is kept, and equal for all experts only if they share the mask.
    const mole_sizes s{.tokens = 400, .inputs = 50, .outputs = 3, .experts = 3, .rank = 1};
    const double dropped = 0.2;
    auto layer = make_mole(s, raw{.k = 3}, strategy::dense_masked, dropped);
    layer.expert.alpha = 1.0;
    auto p = make_params<double>(layer, s, 9);
    std::fill_n(p.base.weight.value().data, p.base.weight.size(), 0.0);
    std::fill_n(p.base.bias.value().data, p.base.bias.size(), 0.0);
    std::fill_n(p.router.scorer.weight.value().data, p.router.scorer.weight.size(), 0.0);
    std::fill_n(p.router.scorer.bias.value().data, p.router.scorer.bias.size(), 0.0);
    std::fill_n(p.expert.a.value().data, p.expert.a.size(), 1.0);
    std::fill_n(p.expert.b.value().data, p.expert.b.size(), 0.0);
    for (index e = 0; e < 3; ++e) p.expert.b.value()(e, e) = 3.0;  // gates are 1 / 3
    matrix<double, cpu> x(s.tokens, s.inputs), y(s.tokens, s.outputs);
    std::fill_n(x.data(), x.size(), 1.0);
    context<cpu> ctx(1);
    generator random(7);
    layer.forward(ctx, p, x, y.view(), mode::training, {.random = &random});
    double mean = 0.0;
    const double elements = static_cast<double>(x.size());
    for (index n = 0; n < s.tokens; ++n) {
      CHECK(y(n, 0) == y(n, 1));
      CHECK(y(n, 0) == y(n, 2));
      mean += y(n, 0) / elements;
    }
    // A kept element is 1 / q with probability q = 1 - dropped: variance (1 - q) / q each. Five
    // standard deviations.
    const double q = 1.0 - dropped;
    CHECK(std::abs(mean - 1.0) <= 5.0 * std::sqrt((1.0 - q) / q / elements));
    CHECK(mean != 1.0);
  }

  TEST_CASE("a recorded routing can be replayed") {
    const mole_sizes s{};
    support::test_random random(56);
    const matrix<double, cpu> x = support::random_matrix<double>(random, s.tokens, s.inputs);
    const matrix<double, cpu> dy = support::random_matrix<double>(random, s.tokens, s.outputs);
    for (const strategy execution : executions) {
      CAPTURE(name_of(execution));
      const auto layer = make_mole(s, renormalised{.k = 2}, execution);
      auto p = make_params<double>(layer, s, 10);
      context<cpu> ctx(1);
      matrix<double, cpu> y(s.tokens, s.outputs);
      const auto kept = layer.forward(ctx, p, x, y.view(), mode::training);
      const routing<double, cpu> recorded = record(kept.routed.routing);
      const auto first = run_mole<double>(layer, p, x, dy);
      CHECK(support::step_difference(
                run_mole<double>(layer, p, x, dy, 1, replay<double, cpu>({}, recorded)), first) ==
            "");

      // Another router would choose otherwise: the mask stays, the gates follow the new logits.
      for (index i = 0; i < p.router.scorer.weight.size(); ++i)
        p.router.scorer.weight.value().data[i] *= -1.0;
      const auto chosen = layer.forward(ctx, p, x, y.view(), mode::training);
      REQUIRE(testing::first_difference<std::uint32_t>(chosen.routed.routing.mask,
                                                       recorded.mask.view()) != "");
      const auto again =
          layer.forward(ctx, p, x, y.view(), mode::training, replay<double, cpu>({}, recorded));
      CHECK(testing::first_difference<std::uint32_t>(again.routed.routing.mask,
                                                     recorded.mask.view()) == "");
      const auto expected = support::slow_forward(p, layer.expert, s.experts, to_table(x.view()),
                                                  [&](const std::vector<double>& u, index n) {
                                                    support::slow_row row = slow(dense{}, u);
                                                    double mass = 0.0;
                                                    for (index e = 0; e < s.experts; ++e) {
                                                      const auto i = static_cast<std::size_t>(e);
                                                      row.on[i] = recorded.view().on(n, e);
                                                      if (!row.on[i]) row.gates[i] = 0.0;
                                                      mass += row.gates[i];
                                                    }
                                                    for (double& g : row.gates) g /= mass;
                                                    return row;
                                                  });
      const double error = support::mole_error<double>(s, to_table(x.view()),
                                                       to_table(p.router.scorer.weight.value()),
                                                       to_table(p.router.scorer.bias.value()));
      CHECK(testing::first_excess(
                y.view(),
                matrix_view<const double, cpu>(expected.y.values.data(), s.tokens, s.outputs),
                [&](index n, index o) { return error * expected.magnitude(n, o); }) == "");
    }
  }

  TEST_CASE("padding gets the base alone and gives gradients to the base alone") {
    const mole_sizes s{};
    support::test_random random(57);
    const matrix<double, cpu> x = support::random_matrix<double>(random, s.tokens, s.inputs);
    const matrix<double, cpu> dy = support::random_matrix<double>(random, s.tokens, s.outputs);
    const vector<std::uint8_t, cpu> real = padding(s.tokens, 0, 3);
    for (const strategy execution : executions) {
      CAPTURE(name_of(execution));
      const auto layer = make_mole(s, renormalised{.k = 2}, execution);
      auto p = make_params<double>(layer, s, 11, false);
      const auto padded = run_mole<double>(layer, p, x, dy, 1, {.padding_mask = real.view()});
      const auto whole = run_mole<double>(layer, p, x, dy);
      // Upstream gradients of padding reach nothing but base and dx.
      matrix<double, cpu> changed = dy;
      for (index n = 0; n < s.tokens; n += 3) {
        for (index o = 0; o < s.outputs; ++o) changed(n, o) = -3.0;
      }
      const auto other = run_mole<double>(layer, p, x, changed, 1, {.padding_mask = real.view()});
      context<cpu> ctx(1);
      matrix<double, cpu> base(s.tokens, s.outputs);
      linear{}.forward(ctx, p.base, x, base.view(), mode::training);
      for (index n = 0; n < s.tokens; ++n) {
        const auto found = padded.y.view().row_range(n, 1);
        if (real[n] == 0) {
          CHECK(testing::first_difference<double>(found, base.view().row_range(n, 1)) == "");
          CHECK(testing::largest(padded.gates.view().row_range(n, 1)) == 0.0);
        } else {
          CHECK(testing::first_difference<double>(found, whole.y.view().row_range(n, 1)) == "");
        }
      }
      // Parameters in visiting order: base weight, base bias, router weight, router bias, A, B.
      // Sums over tokens may take zeros in or leave them out, which changes no bit of theirs.
      for (const std::size_t q : {2, 3, 4, 5}) {
        CHECK(testing::first_difference(padded.gradients[q], other.gradients[q]) == "");
      }
      CHECK(testing::first_difference(padded.gradients[0], other.gradients[0]) != "");
    }
  }

  TEST_CASE("no tokens at all is legal, forward and backward") {
    const mole_sizes s{.tokens = 0};
    for (const strategy execution : executions) {
      const auto layer = make_mole(s, renormalised{.k = 2}, execution, 0.5);
      auto p = make_params<float>(layer, s, 12, false);
      const matrix<float, cpu> x(0, s.inputs), dy(0, s.outputs);
      generator random(1);
      const auto step = run_mole<float>(layer, p, x, dy, 2, {.random = &random});
      for (const auto& g : step.gradients) CHECK(testing::largest(g.view()) == 0.0);
    }
  }

  TEST_CASE("experts without tokens and frozen parts get nothing, trained experts their part") {
    const mole_sizes s{.tokens = 6, .inputs = 4, .outputs = 3, .experts = 8, .rank = 2};
    support::test_random random(58);
    const matrix<double, cpu> x = support::random_matrix<double>(random, s.tokens, s.inputs);
    const matrix<double, cpu> dy = support::random_matrix<double>(random, s.tokens, s.outputs);
    for (const strategy execution : executions) {
      CAPTURE(name_of(execution));
      const auto layer = make_mole(s, raw{.k = 1}, execution);
      auto p = make_params<double>(layer, s, 13);
      const auto all = run_mole<double>(layer, p, x, dy);
      index unused = 0;
      for (index e = 0; e < s.experts; ++e) {
        bool used = false;
        for (index n = 0; n < s.tokens; ++n) used = used || all.gates(n, e) != 0.0;
        if (used) continue;
        ++unused;
        CHECK(testing::largest(p.expert.a.grad().row_range(e * s.rank, s.rank)) == 0.0);
        CHECK(testing::largest(p.expert.b.grad().row_range(e * s.rank, s.rank)) == 0.0);
      }
      CHECK(unused >= 2);

      const index chosen[] = {0, 3, 4};
      layer.expert.train_experts(p.expert, std::span<const index>(chosen));
      const auto some = run_mole<double>(layer, p, x, dy);
      CHECK(testing::first_difference(some.dx, all.dx) == "");
      CHECK(p.expert.a.grad().rows == 3 * s.rank);
      p.visit([](parameter<double, cpu>& q) { q.freeze(); });
      const auto none = run_mole<double>(layer, p, x, dy);
      CHECK(testing::first_difference(none.dx, all.dx) == "");
      CHECK(p.expert.a.grad().size() == 0);
      CHECK(p.router.scorer.weight.grad().size() == 0);
    }
  }

  TEST_CASE("dx can be left out or added to") {
    const mole_sizes s{};
    support::test_random random(59);
    const matrix<double, cpu> x = support::random_matrix<double>(random, s.tokens, s.inputs);
    const matrix<double, cpu> dy = support::random_matrix<double>(random, s.tokens, s.outputs);
    for (const strategy execution : executions) {
      for (const double dropout : {0.0, 0.5}) {
        CAPTURE(name_of(execution));
        CAPTURE(dropout);
        const auto layer = make_mole(s, renormalised{.k = 2}, execution, dropout);
        auto p = make_params<double>(layer, s, 14, false);
        const auto step = [&](grad_mode mode, double before) {
          generator random_(2);
          return run_mole<double>(layer, p, x, dy, 1, {.random = &random_}, mode, before);
        };
        const auto over = step(grad_mode::overwrite, 9.0);
        const auto added = step(grad_mode::accumulate, 2.0);
        const auto ignored = step(grad_mode::ignore, 7.0);
        CHECK(testing::detail::first_difference(ignored.gradients, over.gradients) == "");
        CHECK(testing::detail::first_difference(added.gradients, over.gradients) == "");
        // A handful of partial sums that add up to dx and 2.
        const double bound =
            testing::gamma<double>(32.0) * (2.0 + 32.0 * testing::largest(over.dx.view()));
        for (index i = 0; i < over.dx.size(); ++i) {
          CHECK(ignored.dx.data()[i] == 7.0);
          CHECK(std::abs(added.dx.data()[i] - (2.0 + over.dx.data()[i])) <= bound);
        }
        // Nobody needs to bring memory for what is left out.
        context<cpu> ctx(1);
        generator random_(2);
        matrix<double, cpu> y(s.tokens, s.outputs);
        const auto kept = layer.forward(ctx, p, x, y.view(), mode::training, {.random = &random_});
        CHECK_NOTHROW(layer.backward(ctx, p, kept, x, dy, {}, grad_mode::ignore));
      }
    }
  }

  TEST_CASE("inference leaves no trace in memory and equals forward in inference mode") {
    const mole_sizes s{};
    support::test_random random(60);
    const matrix<float, cpu> x = support::random_matrix<float>(random, s.tokens, s.inputs);
    for (const strategy execution : executions) {
      const auto layer = make_mole(s, renormalised{.k = 2}, execution, 0.5);
      auto p = make_params<float>(layer, s, 15);
      context<cpu> ctx(1);
      matrix<float, cpu> y(s.tokens, s.outputs), expected(s.tokens, s.outputs);
      ctx.memory.take<float>(10);
      const auto before = ctx.memory.used();
      infer(ctx, layer, p, x, y.view());
      CHECK(ctx.memory.used() == before);
      CHECK(ctx.scratch.used() == 0);
      layer.forward(ctx, p, x, expected.view(), mode::inference);
      CHECK(ctx.memory.used() > before);
      CHECK(ctx.scratch.used() == 0);
      CHECK(testing::first_difference(y, expected) == "");
    }
  }

  TEST_CASE("a plan is an upper bound of what forward saves, and exact where routing is full") {
    support::test_random random(61);
    for (int i = 0; i < 12; ++i) {
      const mole_sizes s{.tokens = random.below(60),
                         .inputs = 1 + random.below(12),
                         .outputs = 1 + random.below(12),
                         .experts = 1 + random.below(40),
                         .rank = 1 + random.below(6)};
      const matrix<float, cpu> x = support::random_matrix<float>(random, s.tokens, s.inputs);
      for (const strategy execution : executions) {
        CAPTURE(name_of(execution));
        CAPTURE(s.tokens);
        const auto layer =
            make_mole(s, renormalised{.k = std::min<index>(3, s.experts)}, execution);
        auto p = make_params<float>(layer, s, 16);
        const auto plan = layer.plan(p, s.tokens);
        CHECK(plan.used == execution);
        context<cpu> ctx(1);
        ctx.memory.reserve(plan.saved_bytes);
        matrix<float, cpu> y(s.tokens, s.outputs);
        layer.forward(ctx, p, x, y.view(), mode::training);
        // Finite logits: every token uses all of its k experts.
        CHECK(ctx.memory.used() == plan.saved_bytes);
        CHECK(ctx.memory.allocations() <= 1);
        // Padding uses less, in no more memory.
        vector<std::uint8_t, cpu> real(s.tokens);
        const workspace<cpu>::scope scope(ctx.memory);
        ctx.memory.rewind({});
        layer.forward(ctx, p, x, y.view(), mode::training, {.padding_mask = real.view()});
        CHECK(ctx.memory.used() <= plan.saved_bytes);
      }
    }
  }

  TEST_CASE("the second and later steps of training allocate nothing") {
    const mole_sizes s{.tokens = 70, .inputs = 20, .outputs = 12, .experts = 6, .rank = 2};
    support::test_random random(62);
    const matrix<float, cpu> dy = support::random_matrix<float>(random, s.tokens, s.outputs);
    for (const strategy execution : executions) {
      for (const double dropout : {0.0, 0.2}) {
        CAPTURE(name_of(execution));
        const auto layer = make_mole(s, renormalised{.k = 2}, execution, dropout);
        auto p = make_params<float>(layer, s, 17, false);
        context<cpu> ctx(1);
        generator dropping(1);
        matrix<float, cpu> y(s.tokens, s.outputs), dx(s.tokens, s.inputs);
        for (int step = 0; step < 4; ++step) {
          // Another batch each time: other selections, the same sizes.
          const matrix<float, cpu> x = support::random_matrix<float>(random, s.tokens, s.inputs);
          const long allocated = support::allocations_of([&] {
            const workspace<cpu>::scope scope(ctx.memory);
            const auto kept =
                layer.forward(ctx, p, x, y.view(), mode::training, {.random = &dropping});
            layer.backward(ctx, p, kept, x, dy, dx.view(), grad_mode::overwrite);
          });
          CAPTURE(step);
          if (step > 0) CHECK(allocated == 0);
          if (step == 0 && support::allocations_are_counted()) CHECK(allocated > 0);
        }
      }
    }
  }

  TEST_CASE("a step in memory of the caller's has the bits of one that grows") {
    const mole_sizes s{.tokens = 70, .inputs = 20, .outputs = 12, .experts = 6, .rank = 2};
    support::test_random random(63);
    const matrix<float, cpu> x = support::random_matrix<float>(random, s.tokens, s.inputs);
    const matrix<float, cpu> dy = support::random_matrix<float>(random, s.tokens, s.outputs);
    for (const strategy execution : executions) {
      CAPTURE(name_of(execution));
      const auto layer = make_mole(s, renormalised{.k = 2}, execution, 0.2);
      const auto step = [&](context<cpu>& ctx, matrix<float, cpu>& y, matrix<float, cpu>& dx) {
        auto p = make_params<float>(layer, s, 17, false);
        generator dropping(1);
        const workspace<cpu>::scope scope(ctx.memory);
        const auto kept = layer.forward(ctx, p, x, y.view(), mode::training, {.random = &dropping});
        layer.backward(ctx, p, kept, x, dy, dx.view(), grad_mode::overwrite);
      };
      context<cpu> grows(2), lent(2);
      matrix<float, cpu> y(s.tokens, s.outputs), dx(s.tokens, s.inputs), y2 = y, dx2 = dx;
      step(grows, y, dx);
      const std::size_t saved = grows.memory.peak(), scratch = grows.scratch.peak();
      vector<std::byte, cpu> mine(static_cast<index>(saved + scratch));
      const auto lend = [&](std::size_t less_saved, std::size_t less_scratch) {
        lent.memory = workspace<cpu>(mine.data(), saved - less_saved);
        lent.scratch = workspace<cpu>(mine.data() + saved, scratch - less_scratch);
        return support::refused([&] { step(lent, y2, dx2); });
      };
      CHECK(lend(0, 0) == "");
      CHECK(testing::first_difference(y2, y) == "");
      CHECK(testing::first_difference(dx2, dx) == "");
      CHECK(lent.memory.allocations() + lent.scratch.allocations() == 0);
      // One byte too few of either.
      const auto starts = [](const std::string& text, std::size_t bytes) {
        return text.starts_with(detail::concat("talpa::workspace: 'bytes' is ",
                                               std::to_string(bytes), ", expected >= "));
      };
      CHECK(starts(lend(1, 0), saved - 1));
      CHECK(lent.memory.used() + lent.scratch.used() == 0);
      CHECK(starts(lend(0, 1), scratch - 1));
      CHECK(lent.memory.used() + lent.scratch.used() == 0);
    }
  }

  TEST_CASE("parameters are visited in one order under their names") {
    const mole_sizes s{};
    const auto layer = make_mole(s, renormalised{.k = 2}, strategy::automatic);
    generator random(1);
    auto p = layer.init<float, cpu>(linear{}.init<float, cpu>(7, 5, random, "proj."), random,
                                    "layers.3.");
    std::vector<std::string> names;
    p.visit([&](parameter<float, cpu>& q) { names.push_back(q.name()); });
    CHECK(names == std::vector<std::string>{"proj.weight", "proj.bias", "layers.3.router.weight",
                                            "layers.3.router.bias", "layers.3.expert.A",
                                            "layers.3.expert.B"});
    CHECK(p.base.trainable());
    CHECK(layer.output_width(p) == 5);
  }

  TEST_CASE("arguments that do not fit are refused before any work") {
    const mole_sizes s{};
    auto layer = make_mole(s, renormalised{.k = 2}, strategy::dense_masked);
    auto p = make_params<float>(layer, s, 18);
    context<cpu> ctx(1);
    const matrix<float, cpu> x(s.tokens, s.inputs);
    matrix<float, cpu> y(s.tokens, s.outputs);
    const auto forward = [&](const batch_info<float, cpu>& batch = {}) {
      layer.forward(ctx, p, x, y.view(), mode::training, batch);
    };
    CHECK_THROWS_WITH_AS(layer.forward(ctx, p, matrix<float, cpu>(3, 6), y.view(), mode::training),
                         "talpa::mole_linear: 'x' has shape [3, 6], expected [3, 7] = tokens, "
                         "input width of the base",
                         shape_error);
    CHECK_THROWS_WITH_AS(
        layer.forward(ctx, p, x, matrix<float, cpu>(13, 4).view(), mode::training),
        "talpa::mole_linear: 'y' has shape [13, 4], expected [13, 5] = tokens, output width of the "
        "base",
        shape_error);
    const vector<std::uint8_t, cpu> flags(4);
    CHECK_THROWS_WITH_AS(forward({.padding_mask = flags.view()}),
                         "talpa::top_k: 'padding_mask' has shape [4], expected [13] = one flag a "
                         "token",
                         shape_error);
    CHECK_THROWS_WITH_AS(forward({.sequence_length = 5}),
                         "talpa::top_k: 'sequence_length' is 5, expected a divisor of 13 = tokens, "
                         "or 0",
                         value_error);
    const matrix<std::uint32_t, cpu> mask(13, 2);
    CHECK_THROWS_WITH_AS(
        forward({.replay = mask.view()}),
        "talpa::top_k: 'replay' has shape [13, 2], expected [13, 1] = tokens, mask "
        "words of the experts",
        shape_error);
    CHECK(ctx.memory.used() == 0);

    const auto kept = layer.forward(ctx, p, x, y.view(), mode::training);
    matrix<float, cpu> dx(s.tokens, s.inputs);
    const matrix<float, cpu> dy(s.tokens, s.outputs);
    CHECK_THROWS_WITH_AS(
        layer.backward(ctx, p, kept, matrix<float, cpu>(12, 7), dy, dx.view(),
                       grad_mode::overwrite),
        "talpa::mole_linear: 'x' has shape [12, 7], expected [13, 7] = tokens of forward, input "
        "width of the base",
        shape_error);
    CHECK_THROWS_WITH_AS(
        layer.backward(ctx, p, kept, x, matrix<float, cpu>(13, 6), dx.view(), grad_mode::overwrite),
        "talpa::mole_linear: 'dy' has shape [13, 6], expected [13, 5] = tokens, output width of "
        "the "
        "base",
        shape_error);
    CHECK_THROWS_WITH_AS(
        layer.backward(ctx, p, kept, x, dy, matrix<float, cpu>(13, 5).view(),
                       grad_mode::accumulate),
        "talpa::mole_linear: 'dx' has shape [13, 5], expected [13, 7] = shape of x", shape_error);

    layer.router.selector.k = 5;
    CHECK_THROWS_WITH_AS(forward(), "talpa::top_k: 'k' is 5, expected 1..4 = experts", value_error);
    layer.router.selector.k = 2;
    layer.expert.rank = 0;
    CHECK_THROWS_WITH_AS(
        forward(), "talpa::lora: 'rank' is 0, expected >= 1 = width of the adapter", value_error);
    layer.expert.rank = s.rank;
    layer.expert.dropout = 0.1;
    CHECK_THROWS_WITH_AS(
        forward(),
        "talpa::mole_linear: 'batch.random' is null, expected a generator = source "
        "of the dropout mask in training",
        value_error);
    CHECK_NOTHROW(infer(ctx, layer, p, x, y.view()));
    layer.experts = 0;
    CHECK_THROWS_WITH_AS(forward(),
                         "talpa::mole_linear: 'experts' is 0, expected >= 1 = at least one expert",
                         value_error);
    generator random(1);
    CHECK_THROWS_WITH_AS(
        (layer.init<float, cpu>(linear{}.init<float, cpu>(2, 2, random, ""), random)),
        "talpa::mole_linear: 'experts' is 0, expected >= 1 = at least one expert", value_error);
  }

  TEST_CASE("a checked context refuses logits that are not numbers") {
    const mole_sizes s{};
    const auto layer = make_mole(s, renormalised{.k = 2}, strategy::dense_masked);
    auto p = make_params<float>(layer, s, 19);
    matrix<float, cpu> x(s.tokens, s.inputs), y(s.tokens, s.outputs);
    x(4, 0) = std::numeric_limits<float>::quiet_NaN();
    context<cpu> ctx(1);
    CHECK_NOTHROW(infer(ctx, layer, p, x, y.view()));
    CHECK(std::isnan(y(4, 0)));
    CHECK_FALSE(std::isnan(y(3, 0)));
    ctx.checked = true;
    CHECK_THROWS_WITH_AS(infer(ctx, layer, p, x, y.view()),
                         "talpa::top_k: 'logits' is nan at [4, 0], expected finite values, or -inf "
                         "= expert masked for this token",
                         value_error);
  }
}

TEST_SUITE("layers/strategy") {
  TEST_CASE("the strategy with the smallest documented cost is chosen") {
    int times[2][4] = {};
    for (const index d : {1, 64, 4096}) {
      for (const index o : {1, 64, 11008}) {
        for (const index e : {1, 2, 8, 64}) {
          for (const index r : {1, 8, 63}) {
            for (const index k : {1, 2, 8}) {
              if (k > e) continue;
              routed_cost c{.inputs = d, .outputs = o, .experts = e, .width = r, .max_selected = k};
              // (21 E R / 16 + 7 E / 8 + 36), (K (27 R / 16 + 76) + 21 E / 16) and (2 K R' +
              // 5 E R / 32 + 9 E / 8 + 10) times D + O with R' = R rounded up to a multiple of 4;
              // on a device (49 E R / 16 + 366), (K (33 R / 8 + 352) + 29 E / 8 + 523) and
              // (K (15 R / 2 + 215) + 29 E / 8 + 553): 32 times as much is a whole number below
              // 2^53.
              const double widths = static_cast<double>(d + o) / 32.0;
              for (const bool device : {false, true}) {
                c.on_device = device;
                c.can_index = false;
                const index of_masked = device ? 98 * e * r + 11712 : 42 * e * r + 28 * e + 1152;
                const index of_grouped =
                    device ? k * (132 * r + 11264) + 116 * e + 16736 : k * (54 * r + 2432) + 42 * e;
                const index of_indexed =
                    device ? k * (240 * r + 6880) + 116 * e + 17696
                           : 64 * k * ceil_div(r, 4) * 4 + 5 * e * r + 36 * e + 320;
                const double masked = static_cast<double>(of_masked) * widths;
                const double grouped = static_cast<double>(of_grouped) * widths;
                const double indexed = static_cast<double>(of_indexed) * widths;
                CHECK(dense_masked_cost(c) == masked);
                CHECK(grouped_cost(c) == grouped);
                CHECK(indexed_cost(c) == indexed);
                CHECK(choose_strategy(c) ==
                      (grouped < masked ? strategy::grouped : strategy::dense_masked));
                c.can_index = true;
                const double least = std::min({masked, grouped, indexed});
                const strategy best =
                    least == masked ? strategy::dense_masked
                                    : (least == indexed ? strategy::indexed : strategy::grouped);
                CHECK(choose_strategy(c) == best);
                ++times[device ? 1 : 0][static_cast<int>(best)];
              }
            }
          }
        }
      }
    }
    for (const auto& chosen : times) {
      CHECK(chosen[static_cast<int>(strategy::dense_masked)] > 0);
      CHECK(chosen[static_cast<int>(strategy::indexed)] > 0);
    }
  }

  TEST_CASE("many experts of which few are used are not masked, soft routing is") {
    routed_cost sparse{
        .inputs = 1024, .outputs = 1024, .experts = 64, .width = 8, .max_selected = 2};
    CHECK(choose_strategy(sparse) == strategy::grouped);
    sparse.can_index = true;
    CHECK(choose_strategy(sparse) == strategy::indexed);
    // A slot whose ranks outweigh the copies of its rows.
    sparse.width = 512;
    CHECK(choose_strategy(sparse) == strategy::grouped);
    routed_cost soft = sparse;
    soft.width = 8;
    soft.max_selected = 64;
    CHECK(choose_strategy(soft) == strategy::dense_masked);
    // At a tie nothing is moved: 21 * 256 / 16 + 7 * 32 / 8 + 36 = 4 (27 * 8 / 16 + 76) + 42.
    constexpr routed_cost tie{
        .inputs = 8, .outputs = 8, .experts = 32, .width = 8, .max_selected = 4};
    static_assert(dense_masked_cost(tie) == grouped_cost(tie));
    static_assert(choose_strategy(tie) == strategy::dense_masked);
  }

  TEST_CASE("a layer does as it is told, or as the costs say") {
    auto layer = make_mole({.experts = 64, .rank = 8}, renormalised{.k = 2}, strategy::automatic);
    CHECK(layer.choose(1024, 1024) == strategy::indexed);
    CHECK(layer.choose<gpu>(1024, 1024) == strategy::indexed);
    layer.expert.rank = 2;
    CHECK(layer.choose<gpu>(1024, 1024) == strategy::dense_masked);
    layer.execution = strategy::dense_masked;
    CHECK(layer.choose(1024, 1024) == strategy::dense_masked);
    auto soft = make_mole({.experts = 64, .rank = 16}, dense{}, strategy::automatic);
    CHECK(soft.choose(1024, 1024) == strategy::dense_masked);
    soft.execution = strategy::grouped;
    CHECK(soft.choose(1024, 1024) == strategy::grouped);
    CHECK(std::string(strategy_name(strategy::automatic)) == "automatic");
    CHECK(std::string(strategy_name(strategy::grouped)) == "grouped");
    CHECK(std::string(strategy_name(strategy::indexed)) == "indexed");
    CHECK(std::string(strategy_name(strategy::dense_masked)) == "dense_masked");
  }

  TEST_CASE("indexed is refused where experts do not have it") {
    CHECK_NOTHROW(make_mole({}, renormalised{.k = 2}, strategy::indexed).validate());
    const mole_linear<router<linear_scorer, renormalised>, shared_a_lora> shared{
        .execution = strategy::indexed};
    CHECK_THROWS_WITH_AS(shared.validate(),
                         "talpa::mole_linear: 'execution' is indexed, expected dense_masked, "
                         "grouped or automatic = what experts of kind shared_a_lora can do",
                         value_error);
  }
}

}  // namespace talpa::mole_linear_test
