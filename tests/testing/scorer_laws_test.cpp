// SPDX-License-Identifier: Apache-2.0
#include "support/cpu_products.hpp"
#include "support/laws.hpp"

#include <talpa/cpu/bias.hpp>
#include <talpa/cpu/fill.hpp>
#include <talpa/cpu/reduce.hpp>
#include <talpa/cpu/sequence_rows.hpp>
#include <talpa/scorers/cross_attention_scorer.hpp>
#include <talpa/scorers/linear_scorer.hpp>
#include <talpa/testing/scorer_laws.hpp>

#include <doctest/doctest.h>

#include <string>

namespace talpa::scorer_laws_test {

namespace {

/// linear_scorer with one mistake.
struct faulty {
  enum class fault {
    none,
    nameless,
    ignores_generator,
    forgets_a_row,
    reads_a_neighbour,
    counts_threads,
    overwrites_gradients,
    overwrites_dx,
    writes_ignored_dx,
    forgets_the_bias,
    doubles_dx,
    frozen_blocks,
    keeps_memory,
  };

  static constexpr const char* name = "faulty";

  fault with = fault::none;
  linear_scorer inner{.bias = true};

  template <class T, class B>
  using params = affine_params<T, B>;
  template <class T, class B>
  struct saved {};

  template <class T, class B>
  params<T, B> init(index inputs, index experts, generator& random,
                    const std::string& prefix) const {
    generator own(1);
    const std::string used = with == fault::nameless ? "" : prefix;
    if (with != fault::ignores_generator) {
      return inner.init<T, B>(inputs, experts, random, used);
    }
    random.next();
    return inner.init<T, B>(inputs, experts, own, used);
  }

  template <class T, class B>
  saved<T, B> forward(context<B>& ctx, const params<T, B>& p, input<T, B> x, output<T, B> logits,
                      mode m, const batch_info<T, B>& batch) const {
    const index rows = with == fault::forgets_a_row && x.rows > 0 ? x.rows - 1 : x.rows;
    inner.forward(ctx, p, x.row_range(0, rows), logits.row_range(0, rows), m, batch);
    for (index n = 1; with == fault::reads_a_neighbour && n < x.rows; ++n) {
      logits(n, 0) += x(n - 1, 0) * T{1e-4f};
    }
    if (with == fault::counts_threads && x.rows > 0) {
      logits(0, 0) += static_cast<T>(ctx.threads) * T{1e-3f};
    }
    return {};
  }

  template <class T, class B>
  void backward(context<B>& ctx, params<T, B>& p, const saved<T, B>&, input<T, B> x,
                input<T, B> dlogits, output<T, B> dx, grad_mode dx_mode) const {
    if (with == fault::overwrites_gradients) testing::detail::fill_gradients<T>(p, T{0});
    if (with == fault::overwrites_dx && dx_mode == grad_mode::accumulate) {
      dx_mode = grad_mode::overwrite;
    }
    if (with == fault::writes_ignored_dx && dx_mode == grad_mode::ignore) {
      dx_mode = grad_mode::overwrite;
    }
    if (with == fault::keeps_memory) ctx.memory.template take<T>(64);
    if (with == fault::forgets_the_bias) {
      const matrix<T, B> before(p.bias.grad());
      inner.backward(ctx, p, {}, x, dlogits, dx, dx_mode);
      for (index e = 0; e < before.cols(); ++e) p.bias.grad()(0, e) = before(0, e);
      return;
    }
    if (with == fault::frozen_blocks && !p.weight.trainable()) {
      for (index n = 0; n < x.rows; ++n) dx(n, 0) = T{0};
      return;
    }
    inner.backward(ctx, p, {}, x, dlogits, dx, dx_mode);
    if (with == fault::doubles_dx && dx_mode == grad_mode::overwrite) {
      for (index n = 0; n < x.rows; ++n) dx(n, 0) += dx(n, 0);
    }
  }
};
static_assert(scorer_policy<faulty>);
using fault = faulty::fault;

/// cross_attention_scorer that forgets the gradient of the rows it reads.
struct forgets_rows : cross_attention_scorer {
  template <class T, class B>
  saved<T, B> forward(context<B>& ctx, const params<T, B>& p, input<T, B> x, output<T, B> logits,
                      mode m, const batch_info<T, B>& batch) const {
    saved<T, B> kept = cross_attention_scorer::forward(ctx, p, x, logits, m, batch);
    kept.beside.drows = {};
    return kept;
  }
};

bool finds(fault with, const std::string& law) {
  const std::string text = testing::scorer_laws<double>(faulty{.with = with}).text();
  INFO(text);
  return text.find(law) != std::string::npos;
}

}  // namespace

TEST_SUITE("testing/scorer_laws") {
  TEST_CASE("a scorer without a mistake obeys them") {
    support::obeys(testing::scorer_laws<double>(faulty{}));
  }

  TEST_CASE("a batch with conditioning rows has their gradient checked") {
    const testing::scorer_claims claims{.own_row = false, .amplification = 512.0};
    const testing::scorer_sizes sizes{.tokens = 4,
                                      .inputs = 3,
                                      .experts = 2,
                                      .sequence_length = 2,
                                      .conditioning_rows = 2,
                                      .conditioning_width = 3};
    support::obeys(testing::scorer_laws<double>(cross_attention_scorer{}, claims, sizes));
    CHECK(testing::scorer_laws<double>(forgets_rows{}, claims, sizes)
              .text()
              .find("forward: the gradient of 'conditioning' equals differences") !=
          std::string::npos);
  }

  TEST_CASE("a scorer that reads its tokens cannot claim that it does not") {
    CHECK(testing::scorer_laws<double>(faulty{}, {.reads_tokens = false})
              .text()
              .find("scores do not depend on the tokens") != std::string::npos);
  }

  TEST_CASE("each mistake breaks the law that is about it") {
    CHECK(finds(fault::nameless, "parameters have different names"));
    CHECK(finds(fault::ignores_generator, "the same generator gives the same parameters"));
    CHECK(finds(fault::forgets_a_row, "forward writes every score"));
    CHECK(finds(fault::reads_a_neighbour, "a token's scores depend on its own input"));
    CHECK(finds(fault::counts_threads, "any number of threads"));
    CHECK(finds(fault::overwrites_gradients, "backward adds to parameter gradients"));
    CHECK(finds(fault::overwrites_dx, "backward overwrites, adds to or leaves out dx"));
    CHECK(finds(fault::writes_ignored_dx, "backward overwrites, adds to or leaves out dx"));
    CHECK(finds(fault::forgets_the_bias, "forward: the gradient of 'bias' equals differences"));
    CHECK(finds(fault::doubles_dx, "forward: the gradient of 'x' equals differences"));
    CHECK(finds(fault::frozen_blocks, "frozen parameters have no gradient storage"));
    CHECK(finds(fault::keeps_memory, "backward hands its memory back"));
  }
}

}  // namespace talpa::scorer_laws_test
