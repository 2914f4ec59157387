// SPDX-License-Identifier: Apache-2.0
#include "support/padded.hpp"
#include "support/random.hpp"
#include "support/tolerance.hpp"

#include <talpa/cpu/mix_logits.hpp>
#include <talpa/cpu/token_pack.hpp>
#include <talpa/testing/lanes.hpp>
#include <talpa/testing/sim.hpp>

#include <doctest/doctest.h>

namespace talpa::mix_logits_test {

namespace {

/// Everything that the ops on one input write.
struct mixed {
  matrix<float, cpu> gates, log_gates, normaliser, logits, dsubs, dlog_gates, dmain;
  matrix<std::uint32_t, cpu> mask;

  mixed(index n, index r, index e)
      : gates(n, r),
        log_gates(n, r),
        normaliser(n, r),
        logits(n, e),
        dsubs(n, r * e),
        dlog_gates(n, r),
        dmain(n, r),
        mask(n, 1) {}
};

template <class G, class Mix>
mixed mix_on(const matrix<float, cpu>& main, const matrix<float, cpu>& subs,
             const matrix<float, cpu>& dlogits, index keep) {
  const index n = main.rows(), r = main.cols(), e = dlogits.cols();
  using testing::detail::row_at;
  mixed m(n, r, e);
  const auto read = [](const matrix<float, cpu>& view, index row) {
    return row_at<const float>(view.view(), row);
  };
  testing::for_each_row_on<G>(n, r, [&](const auto& g, index first, int) {
    detail::mix_gates_functor{keep}(
        g, mix_gates_row<float>{read(main, first), row_at(m.gates.view(), first),
                                row_at(m.log_gates.view(), first), row_at(m.mask.view(), first)});
  });
  testing::for_each_row_on<G>(n, e, [&](const auto& g, index first, int) {
    Mix::forward(
        g, r,
        mix_row<float>{read(subs, first), read(m.gates, first), read(m.log_gates, first),
                       row_at(m.normaliser.view(), first), row_at(m.logits.view(), first)});
  });
  testing::for_each_row_on<G>(n, e, [&](const auto& g, index first, int) {
    Mix::backward(g, r,
                  mix_gradient_row<float>{
                      read(subs, first), read(m.gates, first), read(m.log_gates, first),
                      read(m.normaliser, first), read(m.logits, first), read(dlogits, first),
                      row_at(m.dsubs.view(), first), row_at(m.dlog_gates.view(), first)});
  });
  testing::for_each_row_on<G>(n, r, [&](const auto& g, index first, int) {
    detail::mix_gates_gradient_functor{}(
        g, mix_gates_gradient_row<float>{read(m.gates, first), read(m.dlog_gates, first),
                                         row_at(m.dmain.view(), first)});
  });
  return m;
}

void same(const mixed& a, const mixed& b, bool normalised) {
  CHECK(support::same_bits(a.gates.view(), b.gates.view()));
  CHECK(support::same_bits(a.log_gates.view(), b.log_gates.view()));
  if (normalised) CHECK(support::same_bits(a.normaliser.view(), b.normaliser.view()));
  CHECK(support::same_bits(a.logits.view(), b.logits.view()));
  CHECK(support::same_bits(a.dsubs.view(), b.dsubs.view()));
  CHECK(support::same_bits(a.dlog_gates.view(), b.dlog_gates.view()));
  CHECK(support::same_bits(a.dmain.view(), b.dmain.view()));
  for (index n = 0; n < a.mask.rows(); ++n) CHECK(a.mask(n, 0) == b.mask(n, 0));
}

}  // namespace

TEST_SUITE("ops/mix_logits") {
  TEST_CASE_TEMPLATE("every lane group gives the same bits as the op", Mix, mix::probability,
                     mix::logit) {
    support::test_random random(9);
    constexpr bool normalised = std::is_same_v<Mix, mix::probability>;
    for (const index e : {1, 2, 8, 33, 65}) {
      for (const index keep : {1, 3, 5}) {
        const index n = 37, r = 5;
        const auto main = support::random_matrix<float>(random, n, r, 3.0);
        const auto subs = support::random_matrix<float>(random, n, r * e, 4.0);
        const auto dlogits = support::random_matrix<float>(random, n, e);
        const mixed one = mix_on<serial, Mix>(main, subs, dlogits, keep);
        same(mix_on<token_pack<16>, Mix>(main, subs, dlogits, keep), one, normalised);
        same(mix_on<sim<4>, Mix>(main, subs, dlogits, keep), one, normalised);
        same(mix_on<sim<32>, Mix>(main, subs, dlogits, keep), one, normalised);
        mixed op(n, r, e);
        const mix_weights<float, cpu> w{op.gates.view(), op.log_gates.view()};
        context<cpu> ctx(2);
        ops::mix_gates(ctx, keep, main, w, op.mask.view());
        ops::mix_logits(ctx, Mix{}, subs, w, op.normaliser.view(), op.logits.view());
        ops::mix_logits_backward(ctx, Mix{}, subs, w, op.normaliser, op.logits, dlogits,
                                 op.dsubs.view(), op.dlog_gates.view());
        ops::mix_gates_backward(ctx, op.gates, op.dlog_gates, op.dmain.view());
        same(op, one, normalised);
      }
    }
  }

  TEST_CASE("probabilities that underflow are mixed in logarithms") {
    // Two routers that are certain of different experts, and a third expert neither wants.
    matrix<float, cpu> subs(1, 6), logits(1, 3), norm(1, 2), gates(1, 2), logs(1, 2), main(1, 2);
    matrix<std::uint32_t, cpu> mask(1, 1);
    subs(0, 0) = 400.0f;
    subs(0, 4) = 400.0f;
    main(0, 1) = -300.0f;
    context<cpu> ctx(1);
    const mix_weights<float, cpu> w{gates.view(), logs.view()};
    ops::mix_gates(ctx, 2, main, w, mask.view());
    ops::mix_logits(ctx, mix::probability{}, subs, w, norm.view(), logits.view());
    CHECK(logits(0, 0) == 0.0f);
    CHECK(logits(0, 1) == -300.0f);
    CHECK(logits(0, 2) == -400.0f);
  }

  TEST_CASE("no tokens are legal, and what does not fit is named") {
    context<cpu> ctx(1);
    matrix<float, cpu> main(0, 2), gates(0, 2), logs(0, 2), norm(0, 2), subs(0, 6), logits(0, 3);
    matrix<std::uint32_t, cpu> mask(0, 1);
    const mix_weights<float, cpu> w{gates.view(), logs.view()};
    ops::mix_gates(ctx, 2, main, w, mask.view());
    ops::mix_logits(ctx, mix::logit{}, subs, w, norm.view(), logits.view());
    CHECK_THROWS_WITH_AS(ops::mix_gates(ctx, 3, main, w, mask.view()),
                         "talpa::ops::mix_gates: 'keep' is 3, expected 1..2 = routers",
                         value_error);
    CHECK_THROWS_WITH_AS(ops::mix_gates(ctx, 1, subs, w, mask.view()),
                         "talpa::ops::mix_gates: 'gates' has shape [0, 2], expected [0, 6] = shape "
                         "of main",
                         shape_error);
    CHECK_THROWS_WITH_AS(
        ops::mix_logits(ctx, mix::logit{}, main, w, norm.view(), logits.view()),
        "talpa::ops::mix_logits: 'subs' has shape [0, 2], expected [0, 6] = tokens, routers times "
        "experts",
        shape_error);
    CHECK_THROWS_AS(ops::mix_logits_backward(ctx, mix::logit{}, subs, w, norm, logits, main,
                                             subs.view(), gates.view()),
                    shape_error);
    CHECK_THROWS_AS(ops::mix_gates_backward(ctx, subs, gates, logs.view()), shape_error);
  }
}

}  // namespace talpa::mix_logits_test
