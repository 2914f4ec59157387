// SPDX-License-Identifier: Apache-2.0
#include "products.hpp"
#include "support/parity.hpp"

#include <talpa/autograd/tape.hpp>
#include <talpa/cpu/adamw.hpp>
#include <talpa/cpu/add.hpp>
#include <talpa/cpu/bias.hpp>
#include <talpa/cpu/copy.hpp>
#include <talpa/cpu/cross_entropy.hpp>
#include <talpa/cpu/dropout.hpp>
#include <talpa/cpu/fill.hpp>
#include <talpa/cpu/gather.hpp>
#include <talpa/cpu/gemm.hpp>
#include <talpa/cpu/group_loss.hpp>
#include <talpa/cpu/grouped_gemm.hpp>
#include <talpa/cpu/item.hpp>
#include <talpa/cpu/rank_gate.hpp>
#include <talpa/cpu/reduce.hpp>
#include <talpa/cpu/routed_linear.hpp>
#include <talpa/cpu/routing_sums.hpp>
#include <talpa/cpu/scale.hpp>
#include <talpa/cpu/segments.hpp>
#include <talpa/cpu/select.hpp>
#include <talpa/cuda/adamw.hpp>
#include <talpa/cuda/add.hpp>
#include <talpa/cuda/bias.hpp>
#include <talpa/cuda/copy.hpp>
#include <talpa/cuda/cross_entropy.hpp>
#include <talpa/cuda/dropout.hpp>
#include <talpa/cuda/fill.hpp>
#include <talpa/cuda/gather.hpp>
#include <talpa/cuda/group_loss.hpp>
#include <talpa/cuda/grouped_gemm.hpp>
#include <talpa/cuda/indexed_gemm.hpp>
#include <talpa/cuda/item.hpp>
#include <talpa/cuda/rank_gate.hpp>
#include <talpa/cuda/reduce.hpp>
#include <talpa/cuda/routing_sums.hpp>
#include <talpa/cuda/scale.hpp>
#include <talpa/cuda/segments.hpp>
#include <talpa/cuda/select.hpp>
#include <talpa/experts/lora.hpp>
#include <talpa/layers/mole_linear.hpp>
#include <talpa/losses/load_balance.hpp>
#include <talpa/optim/adamw.hpp>
#include <talpa/routing/statistics.hpp>
#include <talpa/scorers/linear_scorer.hpp>
#include <talpa/selectors/top_k.hpp>

#include <doctest/doctest.h>

#include <cmath>
#include <cstddef>
#include <limits>
#include <string>

namespace talpa::cuda_mole_linear_test {

namespace {

using support::device;
using layer_type = mole_linear<router<linear_scorer, top_k<gate::renormalised>>, lora>;

/// A layer on backend B with numbers that do not depend on B.
template <class T, class B>
typename layer_type::params<T, B> make(const layer_type& layer, index inputs, index outputs) {
  generator random(3);
  auto base = init_affine<T, B>(inputs, outputs, true, false, random, "base.");
  base.freeze();
  auto p = layer.template init<T, B>(std::move(base), random);
  support::test_random numbers(4);
  const auto b = support::random_matrix<T>(numbers, p.expert.b.rows(), outputs, 0.3);
  to_device<T, B>(b.view(), p.expert.b.value());
  return p;
}

/// What `steps` training steps leave behind: y of the last one and the weights.
template <class T>
struct trained {
  matrix<T, cpu> y, a, b, router;
  T balance;
};
template <class T, class B>
trained<T> train(context<B>& ctx, const layer_type& layer, index tokens, int steps) {
  constexpr index inputs = 12, outputs = 10;
  support::test_random numbers(5);
  const auto x_host = support::random_matrix<T>(numbers, tokens, inputs);
  const auto dy_host = support::random_matrix<T>(numbers, tokens, outputs);
  vector<std::uint8_t, cpu> real(tokens);
  for (index n = 0; n < tokens; ++n) real[n] = n % 7 == 3 ? 0 : 1;
  const auto x = to_device<B>(x_host.view());
  const auto dy = to_device<B>(dy_host.view());
  const auto padding = to_device<B>(as_column(real.view()));
  auto p = make<T, B>(layer, inputs, outputs);
  matrix<T, B> y(tokens, outputs), dx(tokens, inputs), dvalue(1, 1);
  ops::fill(ctx, T{0.5}, dvalue.view());
  matrix<T, B> dlogits(tokens, layer.experts), dgates(tokens, layer.experts);
  parameter_group<T, B> group{.learning_rate = 0.01, .weight_decay = 0.1};
  group.add(p.router).add(p.expert);
  // A large epsilon: AdamW divides by the size of a gradient, and one of rounding errors has none.
  adamw<T, B> optimiser({group}, {.epsilon = 1e-2});
  const load_balance<balance::per_selection, balance::per_layer> even;
  batch_info<T, B> batch;
  batch.padding_mask = {padding.data(), tokens};
  trained<T> result;
  for (int step = 0; step < steps; ++step) {
    const typename workspace<B>::scope scope(ctx.memory);
    const auto kept = layer.forward(ctx, p, x, y.view(), mode::training, batch);
    const auto loss = even.forward(ctx, kept.routed);
    routed_gradient<T, B> from_losses;
    from_losses.dlogits = dlogits.view();
    from_losses.dgates = dgates.view();
    even.backward(ctx, kept.routed, loss, dvalue, from_losses, grad_mode::overwrite);
    layer.backward(ctx, p, kept, x, dy, dx.view(), grad_mode::overwrite, &from_losses);
    optimiser.step(ctx);
    optimiser.zero_grad(ctx);
    if constexpr (!std::same_as<B, cpu>) ctx.synchronise();
    result.balance = to_host(loss.value)(0, 0);
  }
  result.y = to_host(y.view());
  result.a = to_host(p.expert.a.value());
  result.b = to_host(p.expert.b.value());
  result.router = to_host(p.router.scorer.weight.value());
  return result;
}

/// What a step on a tape leaves behind: the loss, and what its routing adds up to.
template <class T>
struct taped {
  T loss;
  matrix<T, cpu> a, b, router;
  statistics_report used;
};
template <class T, class B>
taped<T> train_on_tape(context<B>& ctx, const layer_type& layer, index tokens) {
  constexpr index inputs = 12, classes = 10;
  support::test_random numbers(6);
  const auto x = to_device<B>(support::random_matrix<T>(numbers, tokens, inputs).view());
  vector<std::int32_t, cpu> answers(tokens);
  for (index n = 0; n < tokens; ++n) answers[n] = static_cast<std::int32_t>(n % classes);
  const auto labels = to_device<B>(as_column(answers.view()));
  auto p = make<T, B>(layer, inputs, classes);
  parameter_group<T, B> group{.learning_rate = 0.01};
  group.add(p.router).add(p.expert);
  adamw<T, B> optimiser({group}, {.epsilon = 1e-2});
  tape<T, B> t(ctx);
  const auto applied = t.apply(layer, p, t.constant(x), mode::training);
  const auto cross_entropy = t.cross_entropy(applied.y, {labels.data(), tokens});
  const auto balance =
      t.apply_loss(load_balance<balance::per_selection, balance::per_layer>{}, {applied.routed});
  const auto loss = t.weighted_sum({{cross_entropy}, {balance, 0.5}});
  t.backward(loss);
  optimiser.step(ctx);
  taped<T> result;
  result.loss = ops::item(ctx, loss.value());
  result.used = statistics_report(measure(ctx, applied.routed.view()));
  result.a = to_host(p.expert.a.value());
  result.b = to_host(p.expert.b.value());
  result.router = to_host(p.router.scorer.weight.value());
  return result;
}

/// ||a - b|| / ||b||.
template <class T>
double distance(const matrix<T, cpu>& a, const matrix<T, cpu>& b) {
  double error = 0, size = 0;
  for (index i = 0; i < a.size(); ++i) {
    const double d = static_cast<double>(a.data()[i]) - static_cast<double>(b.data()[i]);
    error += d * d;
    size += static_cast<double>(b.data()[i]) * static_cast<double>(b.data()[i]);
  }
  const double ratio = std::sqrt(error / size);
  return ratio == ratio ? ratio : std::numeric_limits<double>::infinity();
}

}  // namespace

TEST_SUITE("cuda/mole_linear") {
  // Three steps amplify what products round differently: each takes at most a few hundred roundings
  // on a path, and AdamW divides by the size of the gradient.
  TEST_CASE("training steps on a device end where those of the host end") {
    using T = double;
    constexpr double limit = 1e5 * std::numeric_limits<T>::epsilon();
    for (const strategy s : {strategy::dense_masked, strategy::grouped, strategy::indexed}) {
      const layer_type layer{{{}, {2}}, lora{.rank = 3, .alpha = 6.0, .dropout = 0.0}, 5, s};
      context<cpu> host(1);
      context<device> ctx;
      const index tokens = support::device_size(21, 1501);
      const auto expected = train<T>(host, layer, tokens, 3);
      const auto found = train<T>(ctx, layer, tokens, 3);
      CAPTURE(std::string(strategy_name(s)));
      CHECK(distance(found.y, expected.y) <= limit);
      CHECK(distance(found.a, expected.a) <= limit);
      CHECK(distance(found.b, expected.b) <= limit);
      CHECK(distance(found.router, expected.router) <= limit);
      CHECK(std::abs(found.balance - expected.balance) <= limit * expected.balance);
    }
  }

  TEST_CASE("a step on a tape of a device ends where that of the host ends") {
    using T = double;
    constexpr double limit = 1e5 * std::numeric_limits<T>::epsilon();
    const layer_type layer{{{}, {2}}, lora{.rank = 3, .alpha = 6.0}, 5, strategy::grouped};
    context<cpu> host(1);
    context<device> ctx;
    const index tokens = support::device_size(21, 1501);
    const auto expected = train_on_tape<T>(host, layer, tokens);
    const auto found = train_on_tape<T>(ctx, layer, tokens);
    CHECK(distance(found.a, expected.a) <= limit);
    CHECK(distance(found.b, expected.b) <= limit);
    CHECK(distance(found.router, expected.router) <= limit);
    CHECK(std::abs(found.loss - expected.loss) <= limit * expected.loss);
    CHECK(found.used.tokens == tokens);
    CHECK(found.used.counts == expected.used.counts);
    CHECK(std::abs(found.used.entropy - expected.used.entropy) <= limit * expected.used.entropy);
  }

  TEST_CASE("the same step twice has the same bits") {
    using T = float;
    const layer_type layer{{{}, {2}}, lora{.rank = 4}, 6, strategy::grouped};
    context<device> ctx;
    const index tokens = support::device_size(13, 777);
    const auto first = train<T>(ctx, layer, tokens, 2), second = train<T>(ctx, layer, tokens, 2);
    CHECK(support::bit_difference(first.y, second.y) == "");
    CHECK(support::bit_difference(first.a, second.a) == "");
    CHECK(support::bit_difference(first.b, second.b) == "");
    CHECK(support::bit_difference(first.router, second.router) == "");
  }

  TEST_CASE("steps in memory of the caller's have the bits of those that grow") {
    using T = float;
    const layer_type layer{{{}, {2}}, lora{.rank = 4}, 6, strategy::grouped};
    const index tokens = support::device_size(13, 777);
    context<device> grows, lent;
    const auto expected = train<T>(grows, layer, tokens, 2);
    const auto saved = static_cast<index>(grows.memory.peak());
    const auto scratch = static_cast<index>(grows.scratch.peak());
    matrix<std::byte, device> mine(1, saved + scratch);
    lent.memory = workspace<device>(mine.data(), static_cast<std::size_t>(saved));
    lent.scratch = workspace<device>(mine.data() + saved, static_cast<std::size_t>(scratch));
    const auto found = train<T>(lent, layer, tokens, 2);
    CHECK(lent.memory.allocations() + lent.scratch.allocations() == 0);
    CHECK(support::bit_difference(found.y, expected.y) == "");
    CHECK(support::bit_difference(found.a, expected.a) == "");
    CHECK(support::bit_difference(found.b, expected.b) == "");
    CHECK(support::bit_difference(found.router, expected.router) == "");
  }
}

}  // namespace talpa::cuda_mole_linear_test
