// SPDX-License-Identifier: Apache-2.0
#include "support/parity.hpp"

#include <talpa/cpu/activation.hpp>
#include <talpa/cpu/adamw.hpp>
#include <talpa/cpu/bias.hpp>
#include <talpa/cpu/block_scale.hpp>
#include <talpa/cpu/copy.hpp>
#include <talpa/cpu/dropout.hpp>
#include <talpa/cpu/exp_scale.hpp>
#include <talpa/cpu/fill.hpp>
#include <talpa/cpu/gated_activation.hpp>
#include <talpa/cpu/item.hpp>
#include <talpa/cpu/mul.hpp>
#include <talpa/cpu/noise.hpp>
#include <talpa/cpu/overlay_rows.hpp>
#include <talpa/cpu/rank_gate.hpp>
#include <talpa/cpu/scale.hpp>
#include <talpa/cpu/sgd.hpp>
#include <talpa/cuda/activation.hpp>
#include <talpa/cuda/adamw.hpp>
#include <talpa/cuda/bias.hpp>
#include <talpa/cuda/block_scale.hpp>
#include <talpa/cuda/copy.hpp>
#include <talpa/cuda/dropout.hpp>
#include <talpa/cuda/exp_scale.hpp>
#include <talpa/cuda/fill.hpp>
#include <talpa/cuda/gated_activation.hpp>
#include <talpa/cuda/item.hpp>
#include <talpa/cuda/mul.hpp>
#include <talpa/cuda/noise.hpp>
#include <talpa/cuda/overlay_rows.hpp>
#include <talpa/cuda/rank_gate.hpp>
#include <talpa/cuda/scale.hpp>
#include <talpa/cuda/sgd.hpp>

#include <doctest/doctest.h>

#include <cmath>
#include <string>

namespace talpa::cuda_elementwise_test {

namespace {

using support::device;
using support::on_device;

/// Both sides of a comparison: the device in T and the host in T, which may contract
/// multiplications into additions otherwise.
template <class T>
struct both {
  on_device<T> there;
  matrix<T, cpu> here;
  explicit both(const matrix<T, cpu>& m) : there(m), here(m) {}
};

template <class T>
both<T> random_both(support::test_random& random, index rows, index cols) {
  return both<T>(support::random_matrix<T>(random, rows, cols));
}

/// Empty when no element differs by more than `roundings` roundings of numbers of size `size` on
/// each side.
template <class T>
std::string apart(both<T>& b, double roundings, double size) {
  const matrix<T, cpu> there = b.there.now();
  const double bound = 2.0 * support::rounding_bound<T>(roundings, size);
  for (index r = 0; r < there.rows(); ++r) {
    for (index c = 0; c < there.cols(); ++c) {
      if (!(std::abs(static_cast<double>(there(r, c)) - static_cast<double>(b.here(r, c))) <=
            bound)) {
        return "element [" + std::to_string(r) + ", " + std::to_string(c) + "] is " +
               std::to_string(there(r, c)) + ", expected " + std::to_string(b.here(r, c));
      }
    }
  }
  return b.there.intact() ? "" : "something outside was written";
}
template <class T>
std::string unequal(both<T>& b) {
  return support::bit_difference(b.there.now(), b.here) + (b.there.intact() ? "" : " outside");
}

const index rows_of_tests[] = {0, 1, support::device_size(37, 1025)};

}  // namespace

TEST_SUITE("cuda/elementwise") {
  TEST_CASE("fill, copy, bias, scale and mul have the bits of the host") {
    using T = float;
    context<device> ctx;
    context<cpu> host(1);
    support::test_random random(5);
    for (const index rows : rows_of_tests) {
      auto x = random_both<T>(random, rows, 19), z = random_both<T>(random, rows, 19);
      auto y = random_both<T>(random, rows, 19), bias = random_both<T>(random, 1, 19);
      ops::fill(ctx, T{3}, y.there.view());
      ops::fill(host, T{3}, y.here.view());
      CHECK(unequal(y) == "");
      ops::copy(ctx, x.there.view(), y.there.view());
      ops::copy(host, x.here, y.here.view());
      CHECK(unequal(y) == "");
      ops::add_bias(ctx, x.there.view(), bias.there.view(), y.there.view());
      ops::add_bias(host, x.here, bias.here, y.here.view());
      CHECK(unequal(y) == "");
      ops::scale(ctx, T{0.3f}, x.there.view(), y.there.view());
      ops::scale(host, T{0.3f}, x.here, y.here.view());
      CHECK(unequal(y) == "");
      ops::mul(ctx, x.there.view(), z.there.view(), y.there.view(), grad_mode::overwrite);
      ops::mul(host, x.here, z.here, y.here.view(), grad_mode::overwrite);
      CHECK(unequal(y) == "");
      // |x| and |z| are below 4.
      ops::mul(ctx, x.there.view(), z.there.view(), y.there.view(), grad_mode::accumulate);
      ops::mul(host, x.here, z.here, y.here.view(), grad_mode::accumulate);
      CHECK(apart(y, 2, 32) == "");
      if (rows > 0) {
        CHECK(ops::item(ctx, x.there.view().row_range(0, 1).col_range(0, 1)) == x.here(0, 0));
      }
    }
  }

  TEST_CASE("rank_gate and its backward agree with the host") {
    using T = double;
    context<device> ctx;
    context<cpu> host(1);
    support::test_random random(6);
    for (const index rows : rows_of_tests) {
      auto gates = random_both<T>(random, rows, 5), u = random_both<T>(random, rows, 15);
      auto z = random_both<T>(random, rows, 15), dz = random_both<T>(random, rows, 15);
      auto dgates = random_both<T>(random, rows, 5);
      ops::rank_gate(ctx, T{0.7}, gates.there.view(), u.there.view(), z.there.view());
      ops::rank_gate(host, T{0.7}, gates.here, u.here, z.here.view());
      CHECK(apart(z, 2, 16) == "");
      ops::rank_gate_backward(ctx, T{0.7}, gates.there.view(), u.there.view(), dz.there.view(),
                              dz.there.view(), dgates.there.view());
      ops::rank_gate_backward(host, T{0.7}, gates.here, u.here, dz.here, dz.here.view(),
                              dgates.here.view());
      CHECK(apart(dz, 2, 16) == "");
      CHECK(apart(dgates, 5, 48) == "");  // three products below 16 each
    }
  }

  TEST_CASE("activations agree with the host") {
    using T = float;
    context<device> ctx;
    context<cpu> host(1);
    support::test_random random(7);
    const index rows = support::device_size(37, 1025);
    auto x = random_both<T>(random, rows, 9), y = random_both<T>(random, rows, 9);
    auto dy = random_both<T>(random, rows, 9), dx = random_both<T>(random, rows, 9);
    auto b = random_both<T>(random, rows, 9), db = random_both<T>(random, rows, 9);
    ops::activation(ctx, gelu_tanh{}, x.there.view(), y.there.view());
    ops::activation(host, gelu_tanh{}, x.here, y.here.view());
    // The polynomials of core/math.hpp have the same bits; what is around them may contract.
    CHECK(apart(y, 8, 4) == "");
    for (const grad_mode m : {grad_mode::overwrite, grad_mode::accumulate, grad_mode::ignore}) {
      ops::activation_backward(ctx, silu{}, x.there.view(), dy.there.view(), dx.there.view(), m);
      ops::activation_backward(host, silu{}, x.here, dy.here, dx.here.view(), m);
      CHECK(apart(dx, 12, 8) == "");
    }
    ops::gated_activation(ctx, silu{}, x.there.view(), b.there.view(), y.there.view());
    ops::gated_activation(host, silu{}, x.here, b.here, y.here.view());
    CHECK(apart(y, 8, 16) == "");
    ops::gated_activation_backward(ctx, silu{}, x.there.view(), b.there.view(), dy.there.view(),
                                   dx.there.view(), db.there.view());
    ops::gated_activation_backward(host, silu{}, x.here, b.here, dy.here, dx.here.view(),
                                   db.here.view());
    CHECK(apart(dx, 12, 32) == "");
    CHECK(apart(db, 8, 16) == "");
  }

  TEST_CASE("updates of weights agree with the host") {
    using T = float;
    context<device> ctx;
    context<cpu> host(1);
    support::test_random random(8);
    const index rows = support::device_size(37, 1025);
    auto g = random_both<T>(random, rows, 9), m = random_both<T>(random, rows, 9);
    auto w = random_both<T>(random, rows, 9);
    // Squares of at least 1, so that a step is at most 0.1 times 4 / (0.03 times 1).
    matrix<T, cpu> squares(rows, 9);
    for (index i = 0; i < squares.size(); ++i) {
      squares.data()[i] = static_cast<T>(random.uniform(1.0, 4.0));
    }
    both<T> v(squares);
    const adamw_numbers numbers{.learning_rate = 0.1, .weight_decay = 0.1, .step = 3};
    ops::adamw_update(ctx, numbers, g.there.view(), m.there.view(), v.there.view(), w.there.view());
    ops::adamw_update(host, numbers, g.here, m.here.view(), v.here.view(), w.here.view());
    CHECK(apart(m, 3, 4) == "");
    CHECK(apart(v, 3, 32) == "");
    CHECK(apart(w, 12, 32) == "");
    for (const double momentum : {0.0, 0.9}) {
      const sgd_numbers plain{.learning_rate = 0.1, .momentum = momentum, .nesterov = momentum > 0};
      ops::sgd_update(ctx, plain, g.there.view(), m.there.view(), w.there.view());
      ops::sgd_update(host, plain, g.here, m.here.view(), w.here.view());
      CHECK(apart(w, 12, 128) == "");
    }
  }

  TEST_CASE("what is random is the same as on the host") {
    using T = float;
    context<device> ctx;
    context<cpu> host(1);
    support::test_random random(9);
    const random_stream stream = generator(3).next();
    for (const index rows : rows_of_tests) {
      auto x = random_both<T>(random, rows, 9), y = random_both<T>(random, rows, 9);
      auto raw = random_both<T>(random, rows, 9), size = random_both<T>(random, rows, 9);
      ops::dropout(ctx, stream, 0.7f, x.there.view(), y.there.view());
      ops::dropout(host, stream, 0.7f, x.here, y.here.view());
      CHECK(unequal(y) == "");
      ops::add_noise(ctx, stream, 0.5, x.there.view(), y.there.view());
      ops::add_noise(host, stream, 0.5, x.here, y.here.view());
      CHECK(unequal(y) == "");
      ops::jitter(ctx, stream, 0.1, x.there.view(), y.there.view());
      ops::jitter(host, stream, 0.1, x.here, y.here.view());
      CHECK(unequal(y) == "");
    }
  }

  TEST_CASE("factors of blocks and of everything agree with the host") {
    using T = double;
    context<device> ctx;
    context<cpu> host(1);
    support::test_random random(10);
    auto f = random_both<T>(random, 3, 7), df = random_both<T>(random, 3, 7);
    auto x = random_both<T>(random, 12, 7), y = random_both<T>(random, 12, 7);
    auto dy = random_both<T>(random, 12, 7), dx = random_both<T>(random, 12, 7);
    auto s = random_both<T>(random, 1, 1), ds = random_both<T>(random, 1, 1);
    ops::block_scale(ctx, f.there.view(), x.there.view(), y.there.view());
    ops::block_scale(host, f.here, x.here, y.here.view());
    CHECK(unequal(y) == "");
    ops::block_scale_backward(ctx, f.there.view(), x.there.view(), dy.there.view(), dx.there.view(),
                              df.there.view());
    ops::block_scale_backward(host, f.here, x.here, dy.here, dx.here.view(), df.here.view());
    CHECK(apart(dx, 1, 16) == "");
    CHECK(apart(df, 6, 68) == "");  // four products below 16 and what was there
    ops::exp_scale(ctx, s.there.view(), x.there.view(), y.there.view());
    ops::exp_scale(host, s.here, x.here, y.here.view());
    CHECK(unequal(y) == "");
    ops::exp_scale_backward(ctx, s.there.view(), x.there.view(), dy.there.view(), dx.there.view(),
                            grad_mode::overwrite, ds.there.view());
    ops::exp_scale_backward(host, s.here, x.here, dy.here, dx.here.view(), grad_mode::overwrite,
                            ds.here.view());
    CHECK(unequal(dx) == "");
    CHECK(apart(ds, 84, 84.0 * 16 * std::exp(4.0)) == "");
  }

  TEST_CASE("overlay_rows takes the same rows as the host") {
    context<device> ctx;
    context<cpu> host(1);
    matrix<std::uint32_t, cpu> overlay(6, 1), mask(6, 1);
    for (index n = 0; n < 6; ++n) {
      overlay(n, 0) = n % 2 == 0 ? 0u : static_cast<std::uint32_t>(n);
      mask(n, 0) = 64u;
    }
    auto there = to_device<device>(mask.view());
    const auto over = to_device<device>(overlay.view());
    ops::overlay_rows(ctx, over.view(), 3, 1, there.view());
    ops::overlay_rows(host, overlay, 3, 1, mask.view());
    ctx.synchronise();
    const auto back = to_host(there.view());
    for (index n = 0; n < 6; ++n) CHECK(back(n, 0) == mask(n, 0));
  }
}

}  // namespace talpa::cuda_elementwise_test
