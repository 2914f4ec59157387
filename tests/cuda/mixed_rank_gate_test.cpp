// SPDX-License-Identifier: Apache-2.0
#include "support/parity.hpp"
#include "support/scalars.hpp"
#include "support/stored.hpp"

#include <talpa/cuda/rank_gate.hpp>

#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <string>

namespace talpa::mixed_rank_gate_test {

namespace {

using support::device;
using support::on_device;

/// Empty when each stored number is within `roundings` roundings of float and one of the storage of
/// the number in double, and those of columns beyond `cols` are zero.
template <class S>
std::string apart(const matrix<S, cpu>& found, const matrix<double, cpu>& wanted,
                  double roundings) {
  for (index r = 0; r < found.rows(); ++r) {
    for (index c = 0; c < found.cols(); ++c) {
      const double x = static_cast<double>(static_cast<float>(found(r, c)));
      const double y = c < wanted.cols() ? wanted(r, c) : 0.0;
      const double bound =
          (support::storage_roundoff<S>() + roundings * std::numeric_limits<float>::epsilon()) *
          std::abs(y);
      // Storage below the smallest normal number of float16 is coarser.
      if (!(std::abs(x - y) <= bound + 0x1p-25)) {
        return "element [" + std::to_string(r) + ", " + std::to_string(c) + "] is " +
               std::to_string(x) + ", expected " + std::to_string(y);
      }
    }
  }
  return "";
}

/// Both directions beside plain loops in double, with `room` columns behind the ranks; `padded`
/// views lie inside longer rows, whose numbers begin at no multiple of 16 bytes.
template <class S, class F>
void compare(const F& f, index tokens, index experts, index ranks, index room, bool padded) {
  CAPTURE(tokens);
  CAPTURE(ranks);
  CAPTURE(padded);
  constexpr float scale = 0.75f;
  support::test_random random(3);
  context<device> ctx;
  const index used = experts * ranks, width = used + room;
  auto gates = support::random_matrix<float>(random, tokens, experts);
  for (index n = 0; n < tokens; ++n) gates(n, n % experts) = 0.0f;
  const auto u = support::random_matrix<float>(random, tokens, used, 2.0);
  const auto dz = support::random_matrix<float>(random, tokens, width);
  matrix<double, cpu> z(tokens, used), du(tokens, used), dgates(tokens, experts),
      size(tokens, experts);
  for (index n = 0; n < tokens; ++n) {
    for (index j = 0; j < used; ++j) {
      const index e = j / ranks;
      const double g = static_cast<double>(scale) * static_cast<double>(gates(n, e));
      const double x = static_cast<double>(u(n, j)), d = static_cast<double>(dz(n, j));
      z(n, j) = g * f.value(x);
      du(n, j) = g * d * f.derivative(x);
      dgates(n, e) += static_cast<double>(scale) * d * f.value(x);
      size(n, e) += std::abs(d * f.value(x));
    }
  }

  const auto check = [&](auto gates_on, auto u_on, auto dz_on, auto z_on, auto du_on,
                         auto dgates_on) {
    ops::mixed_rank_gate(ctx, f, scale, gates_on, u_on, z_on);
    ops::mixed_rank_gate_backward(ctx, f, scale, gates_on, u_on, dz_on, du_on, dgates_on);
    ctx.synchronise();
    // A few products, and an activation and its derivative of a few roundings each where the
    // argument is at most 2.
    CHECK(apart<S>(to_host(z_on), z, 32.0) == "");
    CHECK(apart<S>(to_host(du_on), du, 64.0) == "");
    const auto found = to_host(dgates_on);
    for (index n = 0; n < tokens; ++n) {
      for (index e = 0; e < experts; ++e) {
        CHECK(std::abs(static_cast<double>(found(n, e)) - dgates(n, e)) <=
              support::rounding_bound<float>(static_cast<double>(ranks) + 32.0, size(n, e)));
      }
    }
  };
  const auto stored = [&](index rows, index cols) { return matrix<S, cpu>(rows, cols); };
  if (padded) {
    on_device<float> g(gates), a(u), d(dz), dg(gates);
    on_device<S> to(stored(tokens, width)), dto(stored(tokens, width));
    check(g.view(), a.view(), d.view(), to.view(), dto.view(), dg.view());
    CHECK(to.intact());
    CHECK(dto.intact());
    CHECK(dg.intact());
  } else {
    auto g = to_device<device>(gates.view()), a = to_device<device>(u.view()),
         d = to_device<device>(dz.view()), dg = to_device<device>(gates.view());
    matrix<S, device> to(tokens, width), dto(tokens, width);
    check(g.view(), a.view(), d.view(), to.view(), dto.view(), dg.view());
  }
}

}  // namespace

TEST_SUITE("cuda/mixed_rank_gate") {
  TEST_CASE_TEMPLATE("both directions agree with plain loops", S, TALPA_HALVES) {
    for (const bool padded : {false, true}) {
      compare<S>(silu{}, support::device_size(19, 3001), 3, 4, 4, padded);
      compare<S>(silu{}, 7, 5, 3, 1, padded);
      compare<S>(identity{}, support::device_size(9, 777), 1, 8, 0, padded);
      compare<S>(identity{}, 0, 2, 4, 0, padded);
    }
  }

  TEST_CASE("a gate that is zero gives zero whatever it gates") {
    using S = bfloat16;
    context<device> ctx;
    matrix<float, cpu> gates(1, 2), u(1, 8), dz(1, 8);
    gates(0, 1) = 1.0f;
    for (index j = 0; j < 4; ++j) {
      u(0, j) = std::numeric_limits<float>::infinity();
      dz(0, j) = std::numeric_limits<float>::quiet_NaN();
      u(0, 4 + j) = dz(0, 4 + j) = 2.0f;
    }
    const auto gates_on = to_device<device>(gates.view()), u_on = to_device<device>(u.view()),
               dz_on = to_device<device>(dz.view());
    matrix<S, device> z(1, 8), du(1, 8);
    matrix<float, device> dgates(1, 2);
    ops::mixed_rank_gate(ctx, identity{}, 1.0f, gates_on, u_on, z.view());
    ops::mixed_rank_gate_backward(ctx, identity{}, 1.0f, gates_on, u_on, dz_on, du.view(),
                                  dgates.view());
    ctx.synchronise();
    const auto z_host = to_host(z.view()), du_host = to_host(du.view());
    for (index j = 0; j < 8; ++j) {
      CHECK(static_cast<float>(z_host(0, j)) == (j < 4 ? 0.0f : 2.0f));
      CHECK(static_cast<float>(du_host(0, j)) == (j < 4 ? 0.0f : 2.0f));
    }
    CHECK(to_host(dgates.view())(0, 1) == 16.0f);
  }

  TEST_CASE("mixed_rank_gate: errors") {
    using S = bfloat16;
    context<device> ctx;
    const matrix<float, device> gates(2, 3), u(2, 6), odd(2, 7), dz(2, 8), narrow(2, 5);
    matrix<S, device> z(2, 8), short_z(2, 5), long_z(3, 8);
    matrix<float, device> dgates(2, 3), wrong(2, 2);
    const auto backward = [&](const matrix<float, device>& up, matrix<S, device>& to,
                              matrix<float, device>& dg, const matrix<float, device>& at) {
      ops::mixed_rank_gate_backward(ctx, silu{}, 1.0f, gates, at, up, to.view(), dg.view());
    };
    CHECK_THROWS_WITH_AS(ops::mixed_rank_gate(ctx, silu{}, 1.0f, gates, odd, z.view()),
                         "talpa::ops::mixed_rank_gate: 'u' has shape [2, 7], expected [2, R * 3] = "
                         "tokens, ranks of all experts",
                         shape_error);
    CHECK_THROWS_WITH_AS(ops::mixed_rank_gate(ctx, silu{}, 1.0f, gates, u, short_z.view()),
                         "talpa::ops::mixed_rank_gate: 'z' has shape [2, 5], expected [2, 6] = "
                         "shape of u, or wider",
                         shape_error);
    CHECK_THROWS_WITH_AS(ops::mixed_rank_gate(ctx, silu{}, 1.0f, gates, u, long_z.view()),
                         "talpa::ops::mixed_rank_gate: 'z' has shape [3, 8], expected [2, 6] = "
                         "shape of u, or wider",
                         shape_error);
    CHECK_THROWS_WITH_AS(backward(dz, z, dgates, odd),
                         "talpa::ops::mixed_rank_gate_backward: 'u' has shape [2, 7], expected "
                         "[2, R * 3] = tokens, ranks of all experts",
                         shape_error);
    CHECK_THROWS_WITH_AS(backward(dz, z, wrong, u),
                         "talpa::ops::mixed_rank_gate_backward: 'dgates' has shape [2, 2], "
                         "expected [2, 3] = shape of gates",
                         shape_error);
    CHECK_THROWS_WITH_AS(backward(narrow, z, dgates, u),
                         "talpa::ops::mixed_rank_gate_backward: 'dz' has shape [2, 5], expected "
                         "[2, 6] = shape of u, or wider",
                         shape_error);
    CHECK_THROWS_WITH_AS(backward(dz, short_z, dgates, u),
                         "talpa::ops::mixed_rank_gate_backward: 'du' has shape [2, 5], expected "
                         "[2, 6] = shape of u, or wider",
                         shape_error);
  }
}

}  // namespace talpa::mixed_rank_gate_test
