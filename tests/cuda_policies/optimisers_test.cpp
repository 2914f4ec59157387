// SPDX-License-Identifier: Apache-2.0
#include "support/both_backends.hpp"

#include <talpa/cpu/adamw.hpp>
#include <talpa/cpu/fill.hpp>
#include <talpa/cpu/item.hpp>
#include <talpa/cpu/reduce.hpp>
#include <talpa/cpu/scale.hpp>
#include <talpa/cpu/sgd.hpp>
#include <talpa/cuda/adamw.hpp>
#include <talpa/cuda/fill.hpp>
#include <talpa/cuda/item.hpp>
#include <talpa/cuda/reduce.hpp>
#include <talpa/cuda/scale.hpp>
#include <talpa/cuda/sgd.hpp>
#include <talpa/optim/adamw.hpp>
#include <talpa/optim/clip.hpp>
#include <talpa/optim/schedule.hpp>
#include <talpa/optim/sgd.hpp>

#include <doctest/doctest.h>

#include <string>
#include <utility>
#include <vector>

namespace talpa::cuda_optimisers_test {
using support::device;
using support::run_record;
using support::detail::uneven_on;

namespace {

constexpr int steps = 4;

/// Weights, norms of gradients and state behind some steps on B: all of one parameter trains,
/// blocks of another, nothing of a third.
template <class B, class Optimiser, class State, class Options>
run_record run_on(context<B>& ctx, const Options& options, const State& state) {
  run_record out;
  generator random(5);
  const auto weights = [&](const char* name, index rows, index cols) {
    return parameter<double, B>(name, uneven_on<B>(rows, cols, random, 1.0, false));
  };
  auto whole = weights("whole", 3, 5), part = weights("part", 6, 4), still = weights("still", 2, 2);
  const index blocks[] = {0, 2};
  part.train_blocks(2, blocks);
  still.freeze();
  parameter_group<double, B> one{.learning_rate = 0.125, .weight_decay = 0.25};
  parameter_group<double, B> two{.learning_rate = 0.25};
  one.add(whole).add(still);
  two.add(part);
  Optimiser optimiser({std::move(one), std::move(two)}, options);
  for (int step = 0; step < steps; ++step) {
    for (auto* p : {&whole, &part}) {
      const auto gradient = uneven_on<cpu>(p->grad().rows, p->grad().cols, random, 1.0, false);
      to_device<double, B>(gradient.view(), p->grad());
    }
    // The first is long enough to be clipped, others may be.
    matrix<double, cpu> norm(1, 1);
    norm(0, 0) = clip_gradients(ctx, optimiser.parameters(), step == 0 ? 1.0 : 1000.0);
    out.add("norm", norm.view());
    if (step == 0) out.add("clipped", part.grad());
    optimiser.step(ctx, warmup_cosine{.warmup_steps = 2, .total_steps = 6});
  }
  for (auto* p : {&whole, &part, &still}) out.add(p->name(), p->value());
  state(optimiser, whole, out);
  state(optimiser, part, out);
  optimiser.zero_grad(ctx);
  support::detail::wait(ctx);
  out.add("cleared", whole.grad(), true);
  return out;
}

/// A norm takes a rounding for each of 31 squares, and a root; a step at most 32, those of AdamW's
/// means, of its quotient, which is at most 1.1 with these betas, and of the weight.
template <template <class, class> class Optimiser, class Options, class State>
std::string difference(const Options& options, const State& state) {
  context<cpu> host(1);
  context<device> ctx;
  const run_record expected = run_on<cpu, Optimiser<double, cpu>>(host, options, state);
  const run_record found = run_on<device, Optimiser<double, device>>(ctx, options, state);
  return support::record_difference(
      found, expected, support::rounding_bound<double>(steps * (32 + 32), expected.largest()));
}

}  // namespace

TEST_SUITE("cuda_policies/optimisers") {
  TEST_CASE("sgd steps on a device as on the host") {
    const auto velocity = [](auto& optimiser, auto& p, run_record& out) {
      if (optimiser.velocity(p).data != nullptr) out.add("velocity", optimiser.velocity(p));
    };
    CHECK(difference<sgd>(sgd_options{}, velocity) == "");
    CHECK(difference<sgd>(sgd_options{.momentum = 0.5}, velocity) == "");
    CHECK(difference<sgd>(sgd_options{.momentum = 0.5, .nesterov = true}, velocity) == "");
  }

  TEST_CASE("adamw steps on a device as on the host") {
    CHECK(difference<adamw>(adamw_options{.beta1 = 0.5, .beta2 = 0.75},
                            [](auto& optimiser, auto& p, run_record& out) {
                              out.add("first", optimiser.state(p).first);
                              out.add("second", optimiser.state(p).second);
                            }) == "");
  }
}

}  // namespace talpa::cuda_optimisers_test
