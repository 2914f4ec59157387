// SPDX-License-Identifier: Apache-2.0
#include "support/cpu_products.hpp"
#include "support/laws.hpp"

#include <talpa/cpu/grouped_gemm.hpp>
#include <talpa/cpu/rank_gate.hpp>
#include <talpa/experts/lora.hpp>
#include <talpa/testing/expert_laws.hpp>

#include <doctest/doctest.h>

#include <span>
#include <string>

namespace talpa::expert_laws_test {

namespace {

/// lora with one mistake.
struct faulty {
  enum class fault {
    none,
    not_zero,
    masked_differs,
    position_matters,
    touches_unused,
    trains_all,
    trains_others,
    frozen_blocks,
    overwrites_gradients,
    overwrites_dx,
    writes_ignored_dx,
    counts_threads,
    gate_gradient,
    masked_gate_gradient,
    keeps_memory,
  };

  static constexpr const char* name = "faulty";

  fault with = fault::none;
  lora inner{.rank = 2, .alpha = 3.0};

  template <class T, class B>
  using params = lora::params<T, B>;
  template <class T, class B>
  struct saved {
    lora::saved<T, B> inner;
  };

  void validate() const { inner.validate(); }
  index width() const { return inner.width(); }
  double input_dropout() const { return 0.0; }

  template <class T, class B>
  params<T, B> init(index inputs, index outputs, index experts, generator& random,
                    const std::string& prefix) const {
    params<T, B> p = inner.init<T, B>(inputs, outputs, experts, random, prefix);
    if (with == fault::not_zero) p.b.value()(0, 0) = T{1};
    return p;
  }
  template <class T, class B>
  void train_experts(params<T, B>& p, std::span<const index> experts) const {
    if (with == fault::trains_all) return;
    const index others[] = {0};
    const bool one = with == fault::trains_others && experts.size() == 1;
    inner.train_experts(p, one ? std::span<const index>(others) : experts);
  }

  template <class T, class B>
  saved<T, B> forward_masked(context<B>& ctx, const params<T, B>& p, input<T, B> gates,
                             input<T, B> x, output<T, B> y) const {
    const saved<T, B> kept{inner.forward_masked(ctx, p, gates, x, y)};
    if (with == fault::masked_differs && y.rows > 0) y(0, 0) += T{1e-3f};
    return kept;
  }
  template <class T, class B>
  void backward_masked(context<B>& ctx, params<T, B>& p, const saved<T, B>& kept, input<T, B> gates,
                       input<T, B> x, input<T, B> dy, output<T, B> dgates, output<T, B> dx,
                       grad_mode dx_mode) const {
    if (with == fault::overwrites_dx && dx_mode == grad_mode::accumulate) {
      dx_mode = grad_mode::overwrite;
    }
    if (with == fault::writes_ignored_dx && dx_mode == grad_mode::ignore) {
      dx_mode = grad_mode::overwrite;
    }
    inner.backward_masked(ctx, p, kept.inner, gates, x, dy, dgates, dx, dx_mode);
    if (with == fault::masked_gate_gradient && x.rows > 0) dgates(0, 0) *= T{2};
  }
  template <class T, class B>
  saved<T, B> forward_grouped(context<B>& ctx, const params<T, B>& p, const segments<B>& slots,
                              vector_input<T, B> gates, input<T, B> x, output<T, B> y) const {
    const saved<T, B> kept{inner.forward_grouped(ctx, p, slots, gates, x, y)};
    if (with == fault::position_matters && y.rows > 0) y(0, 0) += T{1e-3f} * x(0, 0);
    if (with == fault::counts_threads && y.rows > 0) {
      y(0, 0) += static_cast<T>(ctx.threads) * T{1e-3f};
    }
    return kept;
  }
  template <class T, class B>
  void backward_grouped(context<B>& ctx, params<T, B>& p, const saved<T, B>& kept,
                        const segments<B>& slots, vector_input<T, B> gates, input<T, B> x,
                        input<T, B> dy, vector_output<T, B> dgates, output<T, B> dx,
                        grad_mode dx_mode) const {
    if (with == fault::overwrites_gradients) testing::detail::fill_gradients<T>(p, T{0});
    if (with == fault::keeps_memory) ctx.scratch.template take<T>(64);
    inner.backward_grouped(ctx, p, kept.inner, slots, gates, x, dy, dgates, dx, dx_mode);
    if (with == fault::touches_unused && p.a.grad().rows == p.a.rows() && p.a.rows() > 2) {
      p.a.grad()(2, 0) += T{1e-3f};  // row 0 of expert 1
    }
    if (with == fault::frozen_blocks && !p.a.trainable() && dx.rows > 0) dx(0, 0) = T{0};
    if (with == fault::gate_gradient && dgates.size > 0) dgates[0] *= T{2};
  }
};
static_assert(rank_space_expert<faulty>);
using fault = faulty::fault;

bool finds(fault with, const std::string& law) {
  const std::string text = testing::expert_laws<double>(faulty{.with = with}).text();
  INFO(text);
  return text.find(law) != std::string::npos;
}

}  // namespace

TEST_SUITE("testing/expert_laws") {
  TEST_CASE("an expert without a mistake obeys them") {
    support::obeys(testing::expert_laws<double>(faulty{}));
  }

  TEST_CASE("each mistake breaks the law that is about it") {
    CHECK(finds(fault::not_zero, "a fresh bank contributes exactly zero"));
    CHECK(finds(fault::masked_differs, "the masked form equals the grouped form"));
    CHECK(finds(fault::position_matters, "the order of an expert's slots does not matter"));
    CHECK(finds(fault::touches_unused, "an expert without tokens gets a gradient of zeros"));
    CHECK(finds(fault::trains_all, "trained experts get their part of the whole gradient"));
    CHECK(finds(fault::trains_others, "trained experts get their part of the whole gradient"));
    CHECK(finds(fault::frozen_blocks, "a frozen bank has no gradient storage"));
    CHECK(finds(fault::overwrites_gradients, "backward adds to parameter gradients"));
    CHECK(finds(fault::overwrites_dx, "backward overwrites, adds to or leaves out dx"));
    CHECK(finds(fault::writes_ignored_dx, "backward overwrites, adds to or leaves out dx"));
    CHECK(finds(fault::counts_threads, "any number of threads"));
    CHECK(finds(fault::gate_gradient, "grouped: the gradient of 'gates' equals differences"));
    CHECK(finds(fault::masked_gate_gradient, "masked: the gradient of 'gates' equals differences"));
    CHECK(finds(fault::keeps_memory, "backward hands its memory back"));
  }

  TEST_CASE("an expert that does not promise a silent start is not asked for one") {
    testing::expert_claims claims;
    claims.fresh_is_zero = false;
    support::obeys(testing::expert_laws<double>(faulty{.with = fault::not_zero}, claims));
  }
}

}  // namespace talpa::expert_laws_test
