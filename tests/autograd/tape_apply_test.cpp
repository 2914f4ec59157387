// SPDX-License-Identifier: Apache-2.0
#include "support/cpu_products.hpp"
#include "support/laws.hpp"
#include "support/random.hpp"
#include "support/tolerance.hpp"

#include <talpa/autograd/tape.hpp>
#include <talpa/cpu/activation.hpp>
#include <talpa/cpu/add.hpp>
#include <talpa/cpu/bias.hpp>
#include <talpa/cpu/copy.hpp>
#include <talpa/cpu/cross_entropy.hpp>
#include <talpa/cpu/dropout.hpp>
#include <talpa/cpu/fill.hpp>
#include <talpa/cpu/gemm.hpp>
#include <talpa/cpu/layer_norm.hpp>
#include <talpa/cpu/mse.hpp>
#include <talpa/cpu/mul.hpp>
#include <talpa/cpu/reduce.hpp>
#include <talpa/cpu/scale.hpp>
#include <talpa/cpu/softmax.hpp>
#include <talpa/testing/gradient_check.hpp>

#include <doctest/doctest.h>

#include <limits>
#include <span>
#include <utility>
#include <vector>

namespace talpa::tape_apply_test {
using support::random_matrix;
using support::test_random;

namespace {

/// A smooth stand-in for a routed layer: gates = softmax(x Wr^T), y = gates V. It logs what the
/// tape asks of its backward.
struct soft_layer {
  struct log_entry {
    grad_mode dx_mode;
    bool from_losses;
    bool zero_dy;
  };
  std::vector<log_entry>* log = nullptr;

  template <class T, class B>
  struct params {
    parameter<T, B> router;  // [E, D]
    parameter<T, B> values;  // [E, O]

    template <class F>
    void visit(F f) {
      f(router);
      f(values);
    }
  };

  template <class T, class B>
  struct saved {
    routed_view<T, B> routed;
    mode used;
    index sequence_length;
  };

  template <class T, class B>
  index output_width(const params<T, B>& p) const {
    return p.values.cols();
  }

  template <class T, class B>
  saved<T, B> forward(context<B>& ctx, params<T, B>& p, input<T, B> x, output<T, B> y, mode m,
                      const batch_info<T, B>& batch) const {
    const index experts = p.router.rows();
    const auto logits = ctx.memory.template take<T>(x.rows, experts);
    const auto gates = ctx.memory.template take<T>(x.rows, experts);
    const auto mask = ctx.memory.template take<std::uint32_t>(x.rows, mask_words(experts));
    ops::fill(ctx, ~0u, mask);
    ops::gemm(ctx, x, transpose::no, p.router.value(), transpose::yes, T{0}, logits);
    ops::softmax(ctx, logits, gates);
    ops::gemm(ctx, gates, transpose::no, p.values.value(), transpose::no, T{0}, y);
    return {{logits, routing_view<T, B>(gates, mask), batch.padding_mask, batch.sequence_length},
            m,
            batch.sequence_length};
  }

  template <class T, class B>
  void backward(context<B>& ctx, params<T, B>& p, const saved<T, B>& kept, input<T, B> x,
                input<T, B> dy, output<T, B> dx, grad_mode dx_mode,
                const routed_gradient<T, B>* from_losses) const {
    if (log != nullptr) {
      bool zero = true;
      for (index n = 0; n < dy.rows; ++n) {
        for (index o = 0; o < dy.cols; ++o) zero = zero && dy(n, o) == T{0};
      }
      log->push_back({dx_mode, from_losses != nullptr, zero});
    }
    const typename workspace<B>::scope scope(ctx.scratch);
    const matrix_view<const T, B> gates = kept.routed.routing.gates;
    const auto dgates = ctx.scratch.template take<T>(gates.rows, gates.cols);
    const auto dlogits = ctx.scratch.template take<T>(gates.rows, gates.cols);
    ops::gemm(ctx, dy, transpose::no, p.values.value(), transpose::yes, T{0}, dgates);
    if (from_losses != nullptr) ops::axpy(ctx, T{1}, from_losses->dgates, dgates);
    ops::softmax_backward(ctx, gates, dgates, dlogits, grad_mode::overwrite);
    if (from_losses != nullptr) ops::axpy(ctx, T{1}, from_losses->dlogits, dlogits);
    if (p.values.trainable()) {
      ops::gemm(ctx, gates, transpose::yes, dy, transpose::no, T{1}, p.values.grad());
    }
    if (p.router.trainable()) {
      ops::gemm(ctx, dlogits, transpose::yes, x, transpose::no, T{1}, p.router.grad());
    }
    if (dx_mode != grad_mode::ignore) {
      ops::gemm(ctx, dlogits, transpose::no, p.router.value(), transpose::no,
                dx_mode == grad_mode::accumulate ? T{1} : T{0}, dx);
    }
  }
};

/// value = sum over layers of sum over n, e of a logits^2 + b gates^3.
struct cubic_loss {
  double a = 1.0;
  double b = 1.0;
  std::vector<grad_mode>* log = nullptr;

  template <class T, class B>
  struct saved {
    matrix_view<T, B> value;
  };

  template <class T, class B>
  saved<T, B> forward(context<B>& ctx, std::span<const routed_view<T, B>> layers) const {
    const saved<T, B> kept{ctx.memory.template take<T>(1, 1)};
    T sum{0};
    for (const auto& layer : layers) {
      for (index n = 0; n < layer.logits.rows; ++n) {
        for (index e = 0; e < layer.logits.cols; ++e) {
          const T z = layer.logits(n, e), g = layer.routing.gates(n, e);
          sum += static_cast<T>(a) * z * z + static_cast<T>(b) * g * g * g;
        }
      }
    }
    kept.value(0, 0) = sum;
    return kept;
  }

  template <class T, class B>
  void backward(context<B>&, std::span<const routed_view<T, B>> layers, const saved<T, B>&,
                matrix_view<const T, B> dvalue, std::span<const routed_gradient<T, B>> out,
                grad_mode m) const {
    if (log != nullptr) log->push_back(m);
    for (std::size_t l = 0; l < layers.size(); ++l) {
      for (index n = 0; n < layers[l].logits.rows; ++n) {
        for (index e = 0; e < layers[l].logits.cols; ++e) {
          const T z = layers[l].logits(n, e), g = layers[l].routing.gates(n, e);
          const T dz = dvalue(0, 0) * T{2} * static_cast<T>(a) * z;
          const T dg = dvalue(0, 0) * T{3} * static_cast<T>(b) * g * g;
          T &to_z = out[l].dlogits(n, e), &to_g = out[l].dgates(n, e);
          to_z = m == grad_mode::accumulate ? to_z + dz : dz;
          to_g = m == grad_mode::accumulate ? to_g + dg : dg;
        }
      }
    }
  }
};

/// y = 2 x, without parameters to visit and without a router.
struct doubling_layer {
  struct params {
    index width = 0;
  };
  struct saved {};
  index output_width(const params& p) const { return p.width; }
  template <class T, class B>
  saved forward(context<B>& ctx, params&, matrix_view<const T, B> x, matrix_view<T, B> y, mode,
                const batch_info<T, B>&) const {
    ops::scale(ctx, T{2}, x, y);
    return {};
  }
  template <class T, class B>
  void backward(context<B>& ctx, params& p, const saved&, matrix_view<const T, B>,
                matrix_view<const T, B> dy, matrix_view<T, B> dx, grad_mode dx_mode,
                const routed_gradient<T, B>* from_losses) const {
    CHECK(from_losses == nullptr);
    ++p.width;  // counts its calls
    if (dx_mode == grad_mode::overwrite) ops::scale(ctx, T{2}, dy, dx);
    if (dx_mode == grad_mode::accumulate) ops::axpy(ctx, T{2}, dy, dx);
  }
};

soft_layer::params<double, cpu> soft_params(test_random& random, index width, index experts) {
  soft_layer::params<double, cpu> p;
  p.router = parameter<double, cpu>("router", random_matrix<double>(random, experts, width, 0.5));
  p.values = parameter<double, cpu>("values", random_matrix<double>(random, experts, width, 0.5));
  return p;
}

}  // namespace

TEST_SUITE("autograd/tape") {
  TEST_CASE("routed layers and losses on them have the gradient of central differences") {
    test_random random(30);
    constexpr index tokens = 5, width = 4, experts = 3;
    matrix<double, cpu> x = random_matrix<double>(random, tokens, width, 0.5);
    auto p1 = soft_params(random, width, experts), p2 = soft_params(random, width, experts);
    context<cpu> ctx(1);
    tape<double, cpu> t(ctx);
    variable<double, cpu> v;
    const soft_layer layer;
    const auto record = [&] {
      t.reset();
      v = t.leaf(x);
      const auto [y1, r1] = t.apply(layer, p1, v, mode::training);
      const auto [y2, r2] = t.apply(layer, p2, t.add(y1, v), mode::training);
      // Two losses on the first layer, one of them twice; one on both. Backwards the repeated one
      // comes first, then one layer is fresh and the other is not.
      const auto both = t.apply_loss(cubic_loss{.a = 0.25, .b = -1.0}, {r1, r2});
      const auto first = t.apply_loss(cubic_loss{.a = 0.5, .b = 2.0}, {r1, r1});
      return t.weighted_sum({{t.mse(y2, v), 3.0}, {first, 0.5}, {both, -1.5}});
    };
    // What the arena held before must not matter.
    ops::fill(ctx, std::numeric_limits<double>::quiet_NaN(), t.make(200, 200));
    const auto loss = record();
    for (auto* p : {&p1.router, &p1.values, &p2.router, &p2.values}) p->zero_grad(ctx);
    const matrix<double, cpu> upstream = testing::cotangent(1, 1, 1);
    t.backward(loss, upstream);
    const matrix<double, cpu> dx(v.grad());
    std::vector<testing::gradient_probe> probes{{"x", x.view(), dx.view()}};
    for (auto* p : {&p1.router, &p1.values, &p2.router, &p2.values}) {
      probes.push_back({p->name(), p->value(), std::as_const(*p).grad()});
    }
    // Sums of 4, 3 and 30 terms in a row; 30 terms below 8 in each loss.
    support::obeys(testing::gradient_check(
        "routed net", probes, upstream, {.roundings = 120.0, .magnitude = 700.0},
        [&] { return record().value(); }, [] { return 0; }));
  }

  TEST_CASE("apply hands mode and batch to the layer and its routing to the caller") {
    test_random random(31);
    const matrix<double, cpu> x = random_matrix<double>(random, 4, 3);
    auto p = soft_params(random, 3, 2);
    context<cpu> ctx(1);
    tape<double, cpu> t(ctx);
    batch_info<double, cpu> batch;
    batch.sequence_length = 2;
    vector<std::uint8_t, cpu> padding(4);
    batch.padding_mask = padding;
    const auto result = t.apply(soft_layer{}, p, t.constant(x), mode::inference, batch);
    CHECK(result.y.value().cols == 3);
    const routed_view<double, cpu> routed = result.routed.view();
    CHECK(routed.logits.rows == 4);
    CHECK(routed.routing.experts() == 2);
    CHECK(routed.sequence_length == 2);
    CHECK(routed.padding_mask.data == padding.data());
  }

  TEST_CASE(
      "a layer gets null without losses, a zero dy with losses alone, and no dx of constants") {
    test_random random(32);
    const matrix<double, cpu> x = random_matrix<double>(random, 4, 3);
    const matrix<double, cpu> dy = random_matrix<double>(random, 4, 3);
    auto p = soft_params(random, 3, 2);
    context<cpu> ctx(1);
    tape<double, cpu> t(ctx);
    std::vector<soft_layer::log_entry> seen;
    const soft_layer layer{.log = &seen};

    {
      const auto [y, routed] = t.apply(layer, p, t.constant(x), mode::training);
      t.apply_loss(cubic_loss{}, {routed});  // recorded, but nothing asks for its gradient
      t.backward(y, dy);
      REQUIRE(seen.size() == 1);
      CHECK(seen[0].dx_mode == grad_mode::ignore);
      CHECK(!seen[0].from_losses);
      CHECK(!seen[0].zero_dy);
    }
    seen.clear();
    t.reset();
    {
      const auto v = t.leaf(x);
      const auto [y, routed] = t.apply(layer, p, v, mode::training);
      t.backward(t.apply_loss(cubic_loss{}, {routed}));
      REQUIRE(seen.size() == 1);
      CHECK(seen[0].dx_mode == grad_mode::overwrite);
      CHECK(seen[0].from_losses);
      CHECK(seen[0].zero_dy);
      CHECK(y.grad()(0, 0) == 0.0);
    }
    seen.clear();
    t.reset();
    {
      const auto v = t.leaf(x);
      const auto [y, routed] = t.apply(layer, p, v, mode::training);
      const auto loss = t.apply_loss(cubic_loss{}, {routed});
      t.backward(t.weighted_sum({{t.mse(t.add(y, v), t.constant(dy)), 1.0}, {loss, 1.0}}));
      REQUIRE(seen.size() == 1);
      CHECK(seen[0].dx_mode == grad_mode::accumulate);
      CHECK(seen[0].from_losses);
      CHECK(!seen[0].zero_dy);
      // Again, without the loss: what it left must not come back.
      t.backward(y, dy);
      REQUIRE(seen.size() == 2);
      CHECK(!seen[1].from_losses);
    }
  }

  TEST_CASE("the first loss on a routing overwrites and later ones accumulate") {
    test_random random(33);
    const matrix<double, cpu> x = random_matrix<double>(random, 4, 3);
    auto p1 = soft_params(random, 3, 2), p2 = soft_params(random, 3, 2);
    context<cpu> ctx(1);
    tape<double, cpu> t(ctx);
    std::vector<grad_mode> seen;
    const cubic_loss loss{.log = &seen};
    const auto r1 = t.apply(soft_layer{}, p1, t.constant(x), mode::training).routed;
    const auto r2 = t.apply(soft_layer{}, p2, t.constant(x), mode::training).routed;
    const auto a = t.apply_loss(loss, {r1});
    const auto b = t.apply_loss(loss, {r1, r2});  // on a fresh r2, but no longer on a fresh r1
    const auto c = t.apply_loss(loss, {r1});
    t.backward(t.weighted_sum({{a, 1.0}, {b, 1.0}, {c, 1.0}}));
    using enum grad_mode;
    CHECK(seen == std::vector<grad_mode>{overwrite, accumulate, accumulate});
    seen.clear();
    t.backward(b);
    CHECK(seen == std::vector<grad_mode>{overwrite});
    seen.clear();
    t.backward(t.apply_loss(loss, {r2, r2}));
    CHECK(seen == std::vector<grad_mode>{accumulate});
  }

  TEST_CASE("a layer of which nothing trains is a constant, and so are losses on it") {
    test_random random(34);
    const matrix<double, cpu> x = random_matrix<double>(random, 4, 3);
    auto p = soft_params(random, 3, 2);
    p.router.freeze();
    p.values.freeze();
    context<cpu> ctx(1);
    tape<double, cpu> t(ctx);
    const auto fixed = t.apply(soft_layer{}, p, t.constant(x), mode::training);
    CHECK(!fixed.y.wants_grad());
    CHECK(!t.apply_loss(cubic_loss{}, {fixed.routed}).wants_grad());
    const auto moving = t.apply(soft_layer{}, p, t.leaf(x), mode::training);
    CHECK(moving.y.wants_grad());
    // A loss on both reaches the one that moves.
    const auto loss = t.apply_loss(cubic_loss{}, {fixed.routed, moving.routed});
    CHECK(loss.wants_grad());
    t.backward(loss);
  }

  TEST_CASE("a layer without router or visit counts as trained") {
    context<cpu> ctx(1);
    tape<float, cpu> t(ctx);
    matrix<float, cpu> x(1, 3), dy(1, 3);
    x(0, 1) = 5.0f;
    dy(0, 1) = 1.0f;
    doubling_layer::params p{3};
    const auto v = t.leaf(x);
    const auto [y, routed] = t.apply(doubling_layer{}, p, v, mode::training);
    static_assert(std::is_same_v<std::remove_cv_t<decltype(routed)>, layer_without_router>);
    CHECK(y.value()(0, 1) == 10.0f);
    t.backward(y, dy);
    CHECK(v.grad()(0, 1) == 2.0f);
    CHECK(p.width == 4);
    p.width = 3;
    t.backward(t.apply(doubling_layer{}, p, t.constant(x), mode::training).y, dy);
    CHECK(p.width == 4);
  }

  TEST_CASE("apply and apply_loss name handles that are not their own") {
    test_random random(35);
    const matrix<double, cpu> x = random_matrix<double>(random, 4, 3);
    auto p = soft_params(random, 3, 2);
    context<cpu> ctx(1);
    tape<double, cpu> t(ctx);
    const auto v = t.leaf(x);
    const auto old = t.apply(soft_layer{}, p, v, mode::training).routed;
    t.reset();
    CHECK_THROWS_WITH_AS(t.apply(soft_layer{}, p, v, mode::training),
                         "talpa::tape::apply: 'x' is a handle from before reset, expected a handle "
                         "that this tape made since its last reset",
                         value_error);
    CHECK_THROWS_WITH_AS(
        t.apply_loss(cubic_loss{}, {old}),
        "talpa::tape::apply_loss: 'layers' is a handle from before reset, expected "
        "a handle that this tape made since its last reset",
        value_error);
    CHECK_THROWS_WITH_AS(old.view(),
                         "talpa::routed_variable::view: 'variable' is a handle from before reset, "
                         "expected a handle that this tape made since its last reset",
                         value_error);
  }
}

}  // namespace talpa::tape_apply_test
