// SPDX-License-Identifier: Apache-2.0
#include "layers/ffn.hpp"
#include "support/random.hpp"
#include "support/reference.hpp"
#include "support/scalars.hpp"
#include "support/tolerance.hpp"

#include <talpa/cpu/expert_errors.hpp>
#include <talpa/cpu/gemm.hpp>
#include <talpa/cpu/unit_rows.hpp>
#include <talpa/layers/dense_ffn.hpp>
#include <talpa/layers/factored_ffn.hpp>
#include <talpa/selectors/straight_through.hpp>

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <concepts>
#include <vector>

namespace talpa::factored_ffn_test {

using namespace support;

namespace {

using hard_router = router<linear_scorer, top_k<gate::hard>>;
using factored = factored_ffn<hard_router>;
using network = swiglu::params<double, cpu>;

constexpr index neurons = 12, rows = 9;

network make_dense(generator& random, double deviation = 0.7) {
  auto p = dense_ffn<>{}.init<double, cpu>(features, neurons, random, "dense.");
  p.visit([&](parameter<double, cpu>& q) { fill_normal(q.value(), deviation, random); });
  p.freeze();
  return p;
}
factored layer_of(index experts, index k, index shared = 0) {
  return {.router = {.scorer = {.bias = true}, .selector = {.k = k}},
          .experts = experts,
          .shared_experts = shared};
}
neuron_split mixed_up(index experts) {
  return given_split({7, 0, 11, 3, 5, 9, 1, 10, 2, 8, 6, 4}, experts);
}

/// The output of some neurons for each token by loops, and the sums of absolute terms.
table slow_part(const network& p, const matrix<double, cpu>& x, const std::vector<index>& part,
                table* sizes = nullptr) {
  table y(x.rows(), features);
  if (sizes != nullptr) *sizes = table(x.rows(), features);
  for (index n = 0; n < x.rows(); ++n) {
    for (const index f : part) {
      double a = 0.0, b = 0.0, a_size = 0.0, b_size = 0.0;
      for (index d = 0; d < features; ++d) {
        a += p.gate.value()(f, d) * x(n, d);
        b += p.up.value()(f, d) * x(n, d);
        a_size += std::abs(p.gate.value()(f, d) * x(n, d));
        b_size += std::abs(p.up.value()(f, d) * x(n, d));
      }
      for (index d = 0; d < features; ++d) {
        y(n, d) += silu_value(a) * b * p.down.value()(f, d);
        // |silu(u)| <= |u| and |silu'| <= 1.1.
        if (sizes != nullptr) (*sizes)(n, d) += a_size * b_size * std::abs(p.down.value()(f, d));
      }
    }
  }
  return y;
}

std::vector<index> part_of(const neuron_split& split, index block) {
  const auto first = split.order.begin() + block * split.hidden;
  return {first, first + split.hidden};
}

/// Sums over D and H one behind the other, 32 roundings in an activation.
constexpr double output_roundings = features + neurons + 32.0;

matrix<double, cpu> tokens(generator& random) {
  matrix<double, cpu> x(rows, features);
  fill_normal(x.view(), 1.0, random);
  return x;
}

}  // namespace

TEST_SUITE("layers/factored_ffn") {
  TEST_CASE_TEMPLATE("laws of factored_ffn", T, TALPA_SCALARS) {
    const auto check = [](const auto& layer, const neuron_split& split) {
      const auto init = [&]<class U>(generator& random) {
        const auto dense = dense_ffn<>{}.init<U, cpu>(features, neurons, random);
        return layer.split(dense, split, random);
      };
      obeys(testing::layer_laws<T>(layer, init, {}, {.many_tokens = 600}));
    };
    check(layer_of(4, 2), mixed_up(4));
    if (std::same_as<T, double>) return;  // gradients are in double either way
    neuron_split shared = mixed_up(3);
    shared.shared = 1;
    check(
        factored_ffn<raw_router, rescale::none>{
            .router = {.selector = {.k = 1}}, .experts = 2, .shared_experts = 1},
        shared);
  }

  TEST_CASE("two experts of one neuron, by hand") {
    // Neuron 0 is 5 silu(2 x) 3 x, neuron 1 is 7 silu(x) x. Logits (x, 0): x = 1 takes expert 0,
    // x = -1 expert 1, each counted twice.
    generator random(1);
    auto dense = dense_ffn<>{}.init<double, cpu>(1, 2, random);
    const auto set = [](parameter<double, cpu>& p, double first, double second) {
      p.value()(0, 0) = first;
      p.value()(1, 0) = second;
    };
    set(dense.gate, 2.0, 1.0);
    set(dense.up, 3.0, 1.0);
    set(dense.down, 5.0, 7.0);
    const factored layer = layer_of(2, 1);
    auto p = layer.split(dense, contiguous_split(2, 2), random);
    set(p.router.scorer.weight, 1.0, 0.0);
    matrix<double, cpu> x(2, 1), y(2, 1);
    x(0, 0) = 1.0;
    x(1, 0) = -1.0;
    context<cpu> ctx;
    layer.forward(ctx, p, x, y.view(), mode::inference);
    const double bound = testing::gamma<double>(32.0) * 60.0;
    CHECK(std::abs(y(0, 0) - 2.0 * 5.0 * silu_value(2.0) * 3.0) <= bound);
    CHECK(std::abs(y(1, 0) - 2.0 * 7.0 * silu_value(-1.0) * -1.0) <= bound);
  }

  TEST_CASE("the sum of all experts is the dense network, whatever the split") {
    generator random(2);
    auto dense = make_dense(random);
    const matrix<double, cpu> x = tokens(random);
    std::vector<index> all;
    for (index f = 0; f < neurons; ++f) all.push_back(f);
    table sizes;
    const table expected = slow_part(dense, x, all, &sizes);
    const table bounds =
        each(sizes, [](double s) { return rounding_bound<double>(output_roundings, 1.1 * s); });
    matrix<double, cpu> y(rows, features);
    context<cpu> ctx;
    dense_ffn<>{}.forward(ctx, dense, x, y.view(), mode::inference);
    CHECK(difference(y.view(), expected, bounds) == "");
    for (const index experts : {1, 2, 4, 12}) {
      for (const neuron_split& split : {contiguous_split(neurons, experts), mixed_up(experts)}) {
        const factored layer = layer_of(experts, experts);
        const auto p = layer.split(dense, split, random);
        layer.forward(ctx, p, x, y.view(), mode::inference);
        CHECK(difference(y.view(), expected, bounds) == "");
      }
    }
    neuron_split split = mixed_up(6);
    split.shared = 2;
    const factored layer = layer_of(4, 4, 2);
    const auto p = layer.split(dense, split, random);
    CHECK(p.shared.gate.rows() == 4);
    layer.forward(ctx, p, x, y.view(), mode::inference);
    CHECK(difference(y.view(), expected, bounds) == "");
  }

  TEST_CASE("k of E experts: the chosen slices times E / k, and work for k alone") {
    generator random(3);
    const auto dense = make_dense(random);
    const matrix<double, cpu> x = tokens(random);
    const neuron_split split = mixed_up(4);
    const factored exact = layer_of(4, 3);
    const factored_ffn<hard_router, rescale::floored> floored{.router = exact.router};
    const factored_ffn<hard_router, rescale::none> none{.router = exact.router};
    CHECK(exact.scale() == 4.0 / 3.0);
    CHECK(floored.scale() == 1.0);
    CHECK(none.scale() == 1.0);
    const auto p = exact.split(dense, split, random);
    matrix<double, cpu> y(rows, features), unscaled(rows, features);
    context<cpu> ctx;
    const auto kept = exact.forward(ctx, p, x, y.view(), mode::training);
    CHECK(kept.mixed.sorted.slots.capacity() == rows * 3);
    table expected(rows, features), bounds(rows, features);
    for (index e = 0; e < 4; ++e) {
      table sizes;
      const table part = slow_part(dense, x, part_of(split, e), &sizes);
      for (index n = 0; n < rows; ++n) {
        if (!kept.routed.routing.on(n, e)) continue;
        for (index d = 0; d < features; ++d) {
          expected(n, d) += 4.0 / 3.0 * part(n, d);
          bounds(n, d) +=
              rounding_bound<double>(output_roundings + 4.0, 4.0 / 3.0 * 1.1 * sizes(n, d));
        }
      }
    }
    CHECK(difference(y.view(), expected, bounds) == "");
    floored.forward(ctx, p, x, y.view(), mode::inference);
    none.forward(ctx, p, x, unscaled.view(), mode::inference);
    CHECK(same_bits(y.view(), unscaled.view()));
    CHECK(difference(y.view(), each(expected, [](double v) { return 0.75 * v; }), bounds) == "");
  }

  TEST_CASE("borrowed experts are the memory of the dense network, split ones are not") {
    generator random(4);
    auto dense = make_dense(random);
    const matrix<double, cpu> x = tokens(random);
    const factored layer = layer_of(3, 3);
    context<cpu> ctx;
    matrix<double, cpu> whole(rows, features), y(rows, features);
    dense_ffn<>{}.forward(ctx, dense, x, whole.view(), mode::inference);
    const matrix<double, cpu> gate(dense.gate.value());
    const neuron_split split = mixed_up(3);
    auto owned = layer.split(dense, split, random);
    reorder_neurons(dense, split);
    CHECK(dense.gate.value()(0, 0) == gate(7, 0));
    auto p = layer.borrow(dense, random, "student.");
    CHECK(p.expert.gate.value().data == dense.gate.value().data);
    CHECK(p.expert.up.value().data == dense.up.value().data);
    CHECK(p.expert.down.value().data == dense.down.value().data);
    CHECK(p.expert.down.name() == "student.expert.down");
    CHECK(!p.expert.gate.trainable());
    CHECK(p.router.scorer.weight.trainable());
    // The same neurons in the same order: the same bits as copies of them.
    owned.router = p.router;
    matrix<double, cpu> other(rows, features);
    layer.forward(ctx, p, x, y.view(), mode::inference);
    layer.forward(ctx, owned, x, other.view(), mode::inference);
    CHECK(same_bits(y.view(), other.view()));
    // Reordered it is the function it was; 3 experts of 4 neurons whose shared one is the first.
    table sizes;
    std::vector<index> all;
    for (index f = 0; f < neurons; ++f) all.push_back(f);
    slow_part(dense, x, all, &sizes);
    const table bounds =
        each(sizes, [](double s) { return rounding_bound<double>(output_roundings, 2.2 * s); });
    CHECK(difference(y.view(), to_table(whole.view()), bounds) == "");
    const auto with_shared = layer_of(2, 2, 1).borrow(dense, random);
    CHECK(with_shared.shared.gate.value().data == dense.gate.value().data);
    CHECK(with_shared.expert.gate.value().data == dense.gate.value().row(4));
    // Copies train on their own.
    CHECK(owned.expert.gate.trainable());
    const double before = dense.gate.value()(0, 0);
    owned.expert.gate.value()(0, 0) += 1.0;
    CHECK(dense.gate.value()(0, 0) == before);
  }

  TEST_CASE("labels are the experts that come nearest to their share of the target") {
    generator random(5);
    const auto dense = make_dense(random);
    const neuron_split split = mixed_up(4);
    for (const index k : {1, 2, 3}) {
      CAPTURE(k);
      const factored layer = layer_of(4, k);
      const auto p = layer.split(dense, split, random);
      const matrix<double, cpu> h = tokens(random);
      matrix<double, cpu> teacher(rows, features);
      context<cpu> ctx(2);
      dense_ffn<>{}.forward(ctx, dense, h, teacher.view(), mode::inference);
      const auto found = layer.label(ctx, p, h, teacher);
      table errors(rows, 4), bounds(rows, 4);
      for (index e = 0; e < 4; ++e) {
        table sizes;
        const table part = slow_part(dense, h, part_of(split, e), &sizes);
        for (index n = 0; n < rows; ++n) {
          for (index d = 0; d < features; ++d) {
            const double share = teacher(n, d) * static_cast<double>(k) / 4.0;
            errors(n, e) += std::pow(part(n, d) - share, 2.0) / features;
            const double size = 1.1 * sizes(n, d) + std::abs(share);
            // Twice the error of the difference, squared, summed over D.
            bounds(n, e) +=
                rounding_bound<double>(2.0 * output_roundings + features + 8.0, size * size);
          }
        }
      }
      CHECK(difference(found.errors, errors, bounds) == "");
      bool nearest = true;
      for (index n = 0; n < rows; ++n) {
        std::vector<double> order(4);
        for (index e = 0; e < 4; ++e) order[static_cast<std::size_t>(e)] = found.errors(n, e);
        std::sort(order.begin(), order.end());
        for (index e = 0; e < 4; ++e) {
          const bool among = found.errors(n, e) <= order[static_cast<std::size_t>(k - 1)];
          nearest = nearest && found.chosen.on(n, e) == among;
        }
      }
      CHECK(nearest);
      // What is kept is the errors, gates and mask, and all else is free again.
      CHECK(ctx.scratch.used() == 0);
    }
  }

  TEST_CASE("straight_through gives the output of hard gates, and the router a gradient") {
    generator random(6);
    const auto dense = make_dense(random);
    const neuron_split split = mixed_up(4);
    const matrix<double, cpu> x = tokens(random);
    const factored hard = layer_of(4, 2);
    const factored_ffn<router<linear_scorer, straight_through>> soft{
        .router = {.scorer = {.bias = true}, .selector = {.k = 2}}};
    auto p = hard.split(dense, split, random);
    auto q = soft.split(dense, split, random);
    q.router.scorer.weight = p.router.scorer.weight;
    context<cpu> ctx;
    matrix<double, cpu> y(rows, features), z(rows, features), dy(rows, features),
        dx(rows, features);
    fill_normal(dy.view(), 1.0, random);
    const auto kept = hard.forward(ctx, p, x, y.view(), mode::training);
    hard.backward(ctx, p, kept, x, dy, dx.view(), grad_mode::overwrite);
    CHECK(testing::largest(p.router.scorer.weight.grad()) == 0.0);
    const auto soft_kept = soft.forward(ctx, q, x, z.view(), mode::training);
    CHECK(same_bits(y.view(), z.view()));
    soft.backward(ctx, q, soft_kept, x, dy, dx.view(), grad_mode::overwrite);
    // db_e = sum_n p_e (m_e - sum_j p_j m_j), m_e = 2 <dy, f_e(x)>.
    const table p_all = softmax(to_table(soft_kept.routed.logits));
    table pull(rows, 4);
    for (index e = 0; e < 4; ++e) {
      const table part = slow_part(dense, x, part_of(split, e));
      for (index n = 0; n < rows; ++n) {
        for (index d = 0; d < features; ++d) pull(n, e) += 2.0 * dy(n, d) * part(n, d);
      }
    }
    const table expected = column_sums(softmax_gradient(p_all, pull));
    const double bound =
        rounding_bound<double>(2.0 * output_roundings + 64.0, 4.0 * rows * largest(pull));
    CHECK(difference(q.router.scorer.bias.grad(), expected, bound) == "");
    // At inference k experts a token work.
    const auto used = soft.forward(ctx, q, x, z.view(), mode::inference);
    CHECK(used.mixed.sorted.slots.capacity() == rows * 2);
    CHECK(same_bits(y.view(), z.view()));
  }

  TEST_CASE("a step that repeats the one before takes no new memory") {
    generator random(9);
    const auto dense = make_dense(random);
    const factored layer = layer_of(4, 2);
    auto p = layer.split(dense, mixed_up(4), random);
    const matrix<double, cpu> x = tokens(random);
    matrix<double, cpu> y(rows, features), dx(rows, features);
    context<cpu> ctx(1);
    const auto step = [&] {
      const workspace<cpu>::scope scope(ctx.memory);
      const auto kept = layer.forward(ctx, p, x, y.view(), mode::training);
      layer.label(ctx, p, x, y);
      layer.backward(ctx, p, kept, x, y, dx.view(), grad_mode::overwrite);
    };
    step();
    step();  // what was taken block by block may lie in one block now
    const auto memory = ctx.memory.allocations(), scratch = ctx.scratch.allocations();
    step();
    CHECK(ctx.memory.allocations() == memory);
    CHECK(ctx.scratch.allocations() == scratch);
  }

  TEST_CASE("a split that does not fit is refused and changes nothing") {
    generator random(7);
    auto dense = make_dense(random);
    const matrix<double, cpu> gate(dense.gate.value());
    const factored layer = layer_of(4, 2);
    CHECK_THROWS_WITH_AS(layer_of(5, 2).borrow(dense, random),
                         "talpa::factored_ffn: 'experts' is 5, expected a divisor of 12 = neurons "
                         "of the dense network",
                         value_error);
    CHECK_THROWS_WITH_AS(
        layer.split(dense, contiguous_split(8, 4), random),
        "talpa::factored_ffn: 'order' is 8, expected 12..12 = neurons of the dense "
        "network, each once",
        value_error);
    CHECK_THROWS_WITH_AS(
        layer.split(dense, mixed_up(3), random),
        "talpa::factored_ffn: 'split.hidden' is 4, expected 3..3 = neurons of one expert",
        value_error);
    neuron_split shared = mixed_up(4);
    shared.shared = 1;
    CHECK_THROWS_WITH_AS(layer.split(dense, shared, random),
                         "talpa::factored_ffn: 'split.shared' is 1, expected 0..0 = shared_experts",
                         value_error);
    neuron_split twice = mixed_up(4);
    twice.order[5] = 7;
    CHECK_THROWS_WITH_AS(layer.split(dense, twice, random),
                         "talpa::factored_ffn: 'order' is 7 twice, expected each neuron once",
                         value_error);
    CHECK_THROWS_WITH_AS(reorder_neurons(dense, twice),
                         "talpa::reorder_neurons: 'order' is 7 twice, expected each neuron once",
                         value_error);
    CHECK(testing::first_difference(matrix<double, cpu>(dense.gate.value()), gate) == "");
  }

  TEST_CASE("numbers and shapes that do not fit are refused") {
    generator random(8);
    const auto dense = make_dense(random);
    factored layer = layer_of(4, 2);
    auto p = layer.split(dense, mixed_up(4), random);
    matrix<double, cpu> x(2, features), y(2, 3);
    context<cpu> ctx;
    CHECK_THROWS_WITH_AS(layer.forward(ctx, p, x, y.view(), mode::inference),
                         "talpa::factored_ffn: 'y' has shape [2, 3], expected [2, 5] = shape of x",
                         shape_error);
    CHECK_THROWS_WITH_AS(layer.label(ctx, p, x, y),
                         "talpa::factored_ffn: 'target' has shape [2, 3], expected [2, 5] = shape "
                         "of h",
                         shape_error);
    CHECK_THROWS_WITH_AS(layer.label(ctx, p, 5, x, x),
                         "talpa::factored_ffn: 'k' is 5, expected 1..4 = experts", value_error);
    layer.experts = 5;
    CHECK_THROWS_WITH_AS(layer.forward(ctx, p, x, x.view(), mode::inference),
                         "talpa::factored_ffn: 'experts' is 5, expected a divisor of 12 = neurons "
                         "of the dense network",
                         value_error);
    layer.experts = 0;
    CHECK_THROWS_WITH_AS(layer.split(dense, mixed_up(4), random),
                         "talpa::factored_ffn: 'experts' is 0, expected >= 1 = at least one expert",
                         value_error);
    layer = layer_of(4, 5);
    CHECK_THROWS_WITH_AS(layer.split(dense, mixed_up(4), random),
                         "talpa::top_k: 'k' is 5, expected 1..4 = experts", value_error);
    layer = layer_of(4, 2, -1);
    CHECK_THROWS_WITH_AS(
        layer.split(dense, mixed_up(4), random),
        "talpa::factored_ffn: 'shared_experts' is -1, expected >= 0 = experts that "
        "are always on",
        value_error);
  }
}

}  // namespace talpa::factored_ffn_test
