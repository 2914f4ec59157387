// SPDX-License-Identifier: Apache-2.0
#include "support/cpu_products.hpp"
#include "support/random.hpp"

#include <talpa/cpu/context.hpp>
#include <talpa/cpu/gemm.hpp>
#include <talpa/cpu/segments.hpp>
#include <talpa/cpu/select.hpp>
#include <talpa/ops/gemm.hpp>
#include <talpa/ops/segments.hpp>
#include <talpa/ops/select.hpp>
#include <talpa/routing/routing.hpp>
#include <talpa/selectors/top_k.hpp>
#include <talpa/testing/bounds.hpp>

#include <doctest/doctest.h>

#include <atomic>
#include <thread>
#include <vector>

namespace talpa::context_test {

namespace {

/// A host's threads: as many as asked for take tasks from a counter.
class pool {
 public:
  executor on() { return {run, this}; }
  int calls() const { return calls_; }

 private:
  static void run(void* host, int threads, index tasks, executor::task call, void* state) {
    ++static_cast<pool*>(host)->calls_;
    std::atomic<index> next{0};
    std::vector<std::thread> workers;
    for (int thread = 0; thread < threads; ++thread) {
      workers.emplace_back([&, thread] {
        for (index i = next++; i < tasks; i = next++) call(state, i, thread);
      });
    }
    for (std::thread& worker : workers) worker.join();
  }

  int calls_ = 0;
};

/// The last task first, on the thread that asks.
void backwards(void*, int, index tasks, executor::task call, void* state) {
  for (index i = tasks; i-- > 0;) call(state, i, 0);
}

struct outcome {
  matrix<float, cpu> y;
  routing<float, cpu> r;
  vector<index, cpu> token_of_slot;
};

/// A product by register tiles, a selection and its sort by expert: scratch of each thread, blocks
/// of rows and counts that tasks add up.
outcome work(context<cpu>& ctx) {
  support::test_random random(5);
  const index tokens = 3000, inner = 70, experts = 40, k = 3;
  const matrix<float, cpu> x = support::random_matrix<float>(random, tokens, inner);
  const matrix<float, cpu> w = support::random_matrix<float>(random, experts, inner);
  outcome out{matrix<float, cpu>(tokens, experts), routing<float, cpu>(tokens, experts),
              vector<index, cpu>(k * tokens)};
  ops::gemm(ctx, 1.0f, x.view(), transpose::no, w.view(), transpose::yes, 0.0f, out.y.view());
  ops::select(ctx, top_k<gate::renormalised>{k}, out.y, {}, out.r.gates.view(), out.r.mask.view());
  const workspace<cpu>::scope scope(ctx.memory);
  const segments<cpu> sorted = make_segments(ctx.memory, tokens, experts, k * tokens);
  ops::build_segments(ctx, out.r.mask, out.r.gates, sorted, ctx.memory.take<float>(k * tokens));
  for (index s = 0; s < k * tokens; ++s) out.token_of_slot[s] = sorted.token_of_slot[s];
  return out;
}

}  // namespace

TEST_SUITE("ops/context") {
  TEST_CASE("an executor runs each task once, on threads below the number it was given") {
    pool host;
    context<cpu> ctx(3, host.on());
    for (const index tasks : {1, 2, 3, 1000}) {
      std::vector<int> times(static_cast<std::size_t>(tasks));
      std::vector<int> beside(3);
      detail::parallel_for(ctx, tasks, [&](index i, int thread) {
        ++times[static_cast<std::size_t>(i)];
        ++beside.at(static_cast<std::size_t>(thread));
      });
      CHECK(times == std::vector<int>(static_cast<std::size_t>(tasks), 1));
    }
    CHECK(host.calls() == 3);  // a single task is the caller's
    detail::parallel_for(ctx, 0, [](index, int) { FAIL("there is no task"); });
    CHECK(host.calls() == 3);
    const auto few = detail::threads_from(ctx, 99, 100), many = detail::threads_from(ctx, 100, 100);
    detail::parallel_for(few, 7, [&](index, int thread) { CHECK(thread == 0); });
    CHECK(host.calls() == 3);
    detail::parallel_for(many, 7, [](index, int) {});
    CHECK(host.calls() == 4);
  }

  TEST_CASE("threads of the host give the bits of OpenMP's, in any order of tasks") {
    pool host;
    context<cpu> one(1), theirs(3, host.on()), reverse(2, {backwards});
    const outcome expected = work(one);
    for (context<cpu>* ctx : {&theirs, &reverse}) {
      const outcome found = work(*ctx);
      CHECK(testing::first_difference(found.y, expected.y) == "");
      CHECK(found.r == expected.r);
      for (index s = 0; s < found.token_of_slot.size(); ++s) {
        REQUIRE(found.token_of_slot[s] == expected.token_of_slot[s]);
      }
    }
    CHECK(host.calls() > 2);
  }

  TEST_CASE("numbers of threads and executors that cannot be are refused") {
    for (const int threads : {0, -1}) {
      CHECK_THROWS_WITH_AS(context<cpu>{threads},
                           detail::concat("talpa::context: 'threads' is ", std::to_string(threads),
                                          ", expected >= 1 = threads of token-parallel loops")
                               .c_str(),
                           value_error);
    }
    CHECK(context<cpu>().threads == detail::available_threads());
    context<cpu> ctx(1);
    ctx.threads = 0;
    bool ran = false;
    CHECK_THROWS_WITH_AS(detail::parallel_for(ctx, 1, [&](index, int) { ran = true; }),
                         "talpa::context: 'threads' is 0, expected >= 1", value_error);
    CHECK_FALSE(ran);
    CHECK_THROWS_WITH_AS(context<cpu>(0, {backwards}),
                         "talpa::context: 'threads' is 0, expected >= 1 = threads of the executor",
                         value_error);
    CHECK_THROWS_WITH_AS(
        context<cpu>(2, executor{}),
        "talpa::context: 'executor.run' is null, expected a function that runs tasks", value_error);
  }
}

}  // namespace talpa::context_test
