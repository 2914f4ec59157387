// SPDX-License-Identifier: Apache-2.0
#include "support/random.hpp"
#include "support/reference.hpp"
#include "support/routed.hpp"
#include "support/scalars.hpp"

#include <talpa/cpu/add.hpp>
#include <talpa/cpu/bias.hpp>
#include <talpa/cpu/copy.hpp>
#include <talpa/cpu/dropout.hpp>
#include <talpa/cpu/fill.hpp>
#include <talpa/cpu/gather.hpp>
#include <talpa/cpu/gemm.hpp>
#include <talpa/cpu/grouped_gemm.hpp>
#include <talpa/cpu/indexed_gemm.hpp>
#include <talpa/cpu/rank_gate.hpp>
#include <talpa/cpu/segments.hpp>
#include <talpa/experts/lora.hpp>
#include <talpa/layers/mixture.hpp>
#include <talpa/testing/bounds.hpp>
#include <talpa/testing/inputs.hpp>
#include <talpa/testing/report.hpp>

#include <doctest/doctest.h>

namespace talpa::mixture_test {

using namespace support;

TEST_SUITE("layers/mixture") {
  TEST_CASE_TEMPLATE("a base has the bits of a product before, whatever executes and drops", T,
                     TALPA_SCALARS) {
    const index tokens = 140, inputs = 70, outputs = 90, experts = 5, rank = 3;
    test_random random(71);
    routed_layer<T> routed(tokens, experts);
    for (index n = 0; n < tokens; ++n) {
      // A token in seven has no expert, expert 4 none of the tokens.
      for (index e = 0; n % 7 != 0 && e < 4; e += 1 + n % 3) {
        if (n % 2 == 0 || e < 2) routed.turn_on(n, e, random.uniform(0.1, 0.9));
      }
    }
    const auto routing = routing_view<const T, cpu>(routed.view().routing);
    const matrix<T, cpu> x = random_matrix<T>(random, tokens, inputs);
    const matrix<T, cpu> dy = random_matrix<T>(random, tokens, outputs);
    const matrix<T, cpu> w = random_matrix<T>(random, outputs, inputs);
    const matrix<T, cpu> bias = random_matrix<T>(random, 1, outputs);
    const matrix<T, cpu> before_y = random_matrix<T>(random, tokens, outputs);
    const matrix<T, cpu> before_dx = random_matrix<T>(random, tokens, inputs);
    for (const strategy execution :
         {strategy::dense_masked, strategy::grouped, strategy::indexed}) {
      for (const double dropped : {0.0, 0.4}) {
        for (const grad_mode mode :
             {grad_mode::overwrite, grad_mode::accumulate, grad_mode::ignore}) {
          CAPTURE(strategy_name(execution));
          CAPTURE(dropped);
          const mixture<lora> mixed{
              {.rank = rank, .dropout = dropped}, experts, experts, execution};
          context<cpu> ctx(2);
          const packed_matrix<T, cpu> transposed(ctx, w, transpose::yes);
          const packed_matrix<T, cpu> plain(ctx, w, transpose::no);
          const grad_mode y_mode = mode == grad_mode::ignore ? grad_mode::overwrite : mode;
          struct result {
            matrix<T, cpu> y, dx, dgates, da, db;
          };
          const auto run = [&](bool with_base) {
            result r{before_y, before_dx, matrix<T, cpu>(tokens, experts), {}, {}};
            generator numbers(5);
            auto p = mixed.expert.template init<T, cpu>(inputs, outputs, experts, numbers, "");
            fill_normal(p.b.value(), 0.5, numbers);
            batch_info<T, cpu> batch;
            batch.random = &numbers;
            const auto dropout = mixed.draw("test", mode::training, batch);
            const workspace<cpu>::scope scope(ctx.memory);
            packed_product<T, cpu> base, dbase;
            grad_mode y_then = y_mode, dx_then = mode;
            if (with_base) {
              base = {x.view(), &transposed, bias.view()};
              dbase = {dy.view(), &plain};
            } else {
              const auto form = [&](const matrix<T, cpu>& a, const packed_matrix<T, cpu>& b,
                                    matrix<T, cpu>& c, grad_mode& then) {
                if (then == grad_mode::ignore) return;
                ops::gemm(ctx, a, transpose::no, b, then == grad_mode::overwrite ? T{0} : T{1},
                          c.view());
                then = grad_mode::accumulate;
              };
              form(x, transposed, r.y, y_then);
              ops::add_bias(ctx, r.y.view(), bias.view(), r.y.view());
              form(dy, plain, r.dx, dx_then);
            }
            const auto kept = mixed.template forward<T, cpu>(ctx, p, routing, x, r.y.view(), y_then,
                                                             dropout, base);
            CHECK(kept.used == execution);
            index calls = 0;
            mixed.template backward<T, cpu>(ctx, p, kept, routing, x, dy, r.dgates.view(),
                                            r.dx.view(), dx_then, dbase, [&] {
                                              ++calls;
                                              return low_rank_product<T, cpu>{};
                                            });
            CHECK(calls == 1);
            CHECK(ctx.scratch.used() == 0);
            r.da = matrix<T, cpu>(p.a.grad());
            r.db = matrix<T, cpu>(p.b.grad());
            return r;
          };
          const result found = run(true), expected = run(false);
          CHECK(testing::first_difference(found.y, expected.y) == "");
          CHECK(testing::first_difference(found.dx, expected.dx) == "");
          CHECK(testing::first_difference(found.dgates, expected.dgates) == "");
          CHECK(testing::first_difference(found.da, expected.da) == "");
          CHECK(testing::first_difference(found.db, expected.db) == "");
          // There is something to compare.
          CHECK(testing::first_difference(found.y, before_y) != "");
          CHECK((testing::first_difference(found.dx, before_dx) == "") ==
                (mode == grad_mode::ignore));
        }
      }
    }
  }

  TEST_CASE_TEMPLATE("what the caller has for dx is asked for once, with dgates at hand", T,
                     TALPA_SCALARS) {
    // Integers: sums in any order are the same.
    const index tokens = 130, inputs = 70, experts = 3, rank = 2;
    test_random random(72);
    const auto integers = [&](index rows, index cols) {
      matrix<T, cpu> m(rows, cols);
      for (index i = 0; i < m.size(); ++i) m.data()[i] = static_cast<T>(random.below(7)) - T{3};
      return m;
    };
    routed_layer<T> routed(tokens, experts);
    for (index n = 0; n < tokens; ++n) {
      for (index e = n % 2; e < experts; ++e) routed.turn_on(n, e, 2.0);
    }
    const auto routing = routing_view<const T, cpu>(routed.view().routing);
    const matrix<T, cpu> x = integers(tokens, inputs), dy = integers(tokens, inputs);
    const matrix<T, cpu> w = integers(inputs, inputs), more_w = integers(experts, inputs);
    const matrix<T, cpu> a = integers(experts * rank, inputs), b = integers(experts * rank, inputs);
    for (const strategy execution :
         {strategy::dense_masked, strategy::grouped, strategy::indexed}) {
      for (const bool packed : {false, true}) {
        CAPTURE(strategy_name(execution));
        CAPTURE(packed);
        const mixture<lora> mixed{{.rank = rank, .alpha = 2.0}, experts, experts, execution};
        context<cpu> ctx(2);
        generator numbers(5);
        auto p = mixed.expert.template init<T, cpu>(inputs, inputs, experts, numbers, "");
        ops::copy(ctx, a.view(), p.a.value());
        ops::copy(ctx, b.view(), p.b.value());
        const packed_matrix<T, cpu> plain(ctx, w, transpose::no);
        const packed_product<T, cpu> base{dy.view(), packed ? &plain : nullptr};
        const workspace<cpu>::scope scope(ctx.memory);
        matrix<T, cpu> y(tokens, inputs), dx(tokens, inputs), expected(tokens, inputs);
        matrix<T, cpu> dgates(tokens, experts), seen(tokens, experts),
            d = integers(tokens, experts);
        const auto kept =
            mixed.template forward<T, cpu>(ctx, p, routing, x, y.view(), grad_mode::overwrite);
        mixed.template backward<T, cpu>(ctx, p, kept, routing, x, dy, dgates.view(),
                                        expected.view(), grad_mode::overwrite, base);
        ops::gemm(ctx, d, transpose::no, more_w, transpose::no, T{1}, expected.view());
        testing::poison<T>(dgates.view());
        mixed.template backward<T, cpu>(ctx, p, kept, routing, x, dy, dgates.view(), dx.view(),
                                        grad_mode::overwrite, base, [&] {
                                          ops::copy(ctx, dgates.view(), seen.view());
                                          return low_rank_product<T, cpu>{d.view(), more_w.view()};
                                        });
        CHECK(testing::first_difference(dx, expected) == "");
        CHECK(testing::first_difference(seen, dgates) == "");
      }
    }
  }
}

}  // namespace talpa::mixture_test
