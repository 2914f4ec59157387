// SPDX-License-Identifier: Apache-2.0
#include "../../examples/quickstart/evaluation.hpp"
#include "../../examples/quickstart/network.hpp"
#include "../../examples/quickstart/training.hpp"

#include <talpa/talpa.hpp>

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <limits>
#include <vector>

// Inside the namespace, because POSIX has a function `index` outside.
namespace talpa::examples {

namespace {

using soft_mole = mole_linear<router<linear_scorer, dense>, lora>;
using mola = mole_linear<router<linear_scorer, top_k<gate::renormalised>>, lora>;

const digits& shipped() {
  static const digits data = load_digits(
      (std::filesystem::path(__FILE__).parent_path() / "../../examples/data/digits.csv").string());
  return data;
}

/// Three images of each digit or so.
std::vector<index> some_rows(index first) {
  std::vector<index> rows;
  for (index i = 0; i < 30; ++i) rows.push_back(first + i);
  return rows;
}

base_network untrained_base() {
  generator random(1);
  return make_base(random);
}

mola two_of_eight() {
  return {.router = {.selector = {.k = 2}}, .expert = {.rank = 1, .alpha = 2.0}, .experts = 8};
}

template <class Layer>
std::vector<float> values_of(network<Layer>& net) {
  std::vector<float> values;
  net.visit([&](const parameter<float, cpu>& p) {
    for (index r = 0; r < p.rows(); ++r) {
      values.insert(values.end(), p.value().row(r), p.value().row(r) + p.cols());
    }
  });
  return values;
}

/// The base of a network, whatever is on top of it.
template <class Layer>
std::vector<float> base_values_of(network<Layer>& net) {
  base_network base;
  for (std::size_t l = 0; l < depth; ++l) base.params[l] = net.params[l].base;
  return values_of(base);
}

template <class Layer, class Loss>
std::vector<double> train_losses(int threads, network<Layer>& net, const recipe& r,
                                 const Loss& on_routers) {
  context<cpu> ctx(threads);
  generator order(3);
  std::vector<double> losses;
  train(ctx, net, shipped(), all_examples(some_rows(0)), r, order, on_routers,
        [&](int, const epoch_result& result) { losses.push_back(result.loss); });
  return losses;
}

}  // namespace

TEST_SUITE("examples/quickstart/training") {
  TEST_CASE("parameters are counted with the router apart") {
    const base_network base = untrained_base();
    generator random(2);
    // A rank costs D + O weights a layer, a router E D without bias.
    const index rank_cost = (72 + 64) + (64 + 64) + (64 + 10);
    auto plain = adapt(base, lora_linear{.adapter = {.rank = 4, .alpha = 8.0}}, random);
    CHECK(count_trainable(plain).adapters == 4 * rank_cost);
    CHECK(count_trainable(plain).routers == 0);
    auto sparse = adapt(base, two_of_eight(), random);
    CHECK(count_trainable(sparse).adapters == 8 * rank_cost);
    CHECK(count_trainable(sparse).routers == 8 * (72 + 64 + 64));
  }

  TEST_CASE("a fresh adapter answers as the base does") {
    base_network base = untrained_base();
    generator random(2);
    auto plain = adapt(base, lora_linear{.adapter = {.rank = 4, .alpha = 8.0}}, random);
    auto sparse = adapt(base, two_of_eight(), random);
    auto soft = adapt(base, soft_mole{.expert = {.rank = 2, .alpha = 4.0}, .experts = 8}, random);
    context<cpu> ctx(1);
    const double loss = evaluate_network(ctx, base, shipped(), some_rows(0)).loss;
    CHECK(evaluate_network(ctx, plain, shipped(), some_rows(0)).loss == loss);
    CHECK(evaluate_network(ctx, sparse, shipped(), some_rows(0)).loss == loss);
    CHECK(evaluate_network(ctx, soft, shipped(), some_rows(0)).loss == loss);
  }

  TEST_CASE("adaptation learns, and leaves the base as it was") {
    const base_network base = untrained_base();
    const recipe r{.epochs = 40, .batch = 32, .learning_rate = 1e-2};
    generator random(2);
    auto plain = adapt(base, lora_linear{.adapter = {.rank = 8, .alpha = 16.0}}, random);
    auto sparse = adapt(base, two_of_eight(), random);
    const auto check = [&](auto& net) {
      const std::vector<float> before = base_values_of(net);
      const std::vector<double> losses = train_losses(1, net, r, balanced(1e-2));
      REQUIRE(losses.size() == 40);
      // An untrained network of ten outputs is at ln 10 or worse.
      CHECK(losses.front() > 1.5);
      CHECK(losses.back() < 0.5 * losses.front());
      CHECK(base_values_of(net) == before);
    };
    check(plain);
    check(sparse);
  }

  TEST_CASE("the balance loss changes the routers and is not part of the reported loss") {
    const base_network base = untrained_base();
    const auto first_loss = [&](const auto& on_routers) {
      generator random(2);
      auto net = adapt(base, two_of_eight(), random);
      // One step: the loss is that of the fresh network, with or without the balance term.
      const recipe r{.epochs = 1, .batch = 4096, .learning_rate = 1e-2};
      const double loss = train_losses(1, net, r, on_routers).front();
      return std::pair(loss, values_of(net));
    };
    const auto without = first_loss(no_loss{});
    const auto with = first_loss(balanced(1.0));
    CHECK(without.first == with.first);
    CHECK(without.second != with.second);
  }

  TEST_CASE("the same seed gives the same bits for any number of threads") {
    const base_network base = untrained_base();
    const recipe r{.epochs = 2, .batch = 64, .learning_rate = 1e-2};
    std::vector<std::vector<float>> results;
    for (const int threads : {1, 1, 3}) {
      generator random(2);
      auto net = adapt(base, two_of_eight(), random);
      train_losses(threads, net, r, balanced(1e-2));
      results.push_back(values_of(net));
    }
    for (const auto& values : results) {
      REQUIRE(values.size() == results[0].size());
      CHECK(std::memcmp(values.data(), results[0].data(), values.size() * sizeof(float)) == 0);
    }
  }

  TEST_CASE("evaluation reports what the routers do") {
    generator random(2);
    auto sparse = adapt(untrained_base(), two_of_eight(), random);
    context<cpu> ctx(1);
    const evaluation result = evaluate_network(ctx, sparse, shipped(), some_rows(100));
    CHECK(result.active_rank == 2.0);  // two experts of rank 1
    REQUIRE(result.layers.size() == depth);
    for (const layer_routing& layer : result.layers) {
      REQUIRE(std::ssize(layer.load) == task_count * 8);
      REQUIRE(layer.entropy.size() == 1);
      CHECK(layer.entropy[0] > 0.0);
      CHECK(layer.entropy[0] < 1.0);
      for (index t = 0; t < task_count; ++t) {
        double sum = 0;
        for (index e = 0; e < 8; ++e) sum += layer.load_at(t, e);
        // 30 tokens' gates in float, each pair off one by a rounding, summed: 30 * 8 roundings.
        CHECK(std::fabs(sum - 1.0) <
              240 * static_cast<double>(std::numeric_limits<float>::epsilon()));
      }
    }

    auto soft = adapt(untrained_base(),
                      soft_mole{.expert = {.rank = 2, .alpha = 4.0}, .experts = 8}, random);
    CHECK(evaluate_network(ctx, soft, shipped(), some_rows(100)).active_rank == 16.0);
    auto plain = adapt(untrained_base(), lora_linear{.adapter = {.rank = 4, .alpha = 8.0}}, random);
    const evaluation without = evaluate_network(ctx, plain, shipped(), some_rows(100));
    CHECK(without.active_rank == 4.0);
    CHECK(without.layers.empty());
  }

  TEST_CASE("every question of an epoch is asked once, the last batch being what is left") {
    // 30 images and 8 instructions in batches of 100: the mean of the steps, weighted by their
    // size, is the loss over all questions when nothing moves.
    generator random(2);
    auto net = adapt(untrained_base(), lora_linear{.adapter = {.rank = 1, .alpha = 2.0}}, random);
    context<cpu> ctx(1);
    const double expected = evaluate_network(ctx, net, shipped(), some_rows(0)).loss;
    const recipe r{.epochs = 1, .batch = 100, .learning_rate = 0.0};
    const double found = train_losses(1, net, r, no_loss{}).front();
    // Means of 240 losses in float, grouped differently.
    CHECK(std::fabs(found - expected) <
          240 * static_cast<double>(std::numeric_limits<float>::epsilon()) * expected);
  }
}

}  // namespace talpa::examples
