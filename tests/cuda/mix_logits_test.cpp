// SPDX-License-Identifier: Apache-2.0
#include "support/parity.hpp"

#include <talpa/cpu/mix_logits.hpp>
#include <talpa/cuda/mix_logits.hpp>

#include <doctest/doctest.h>

#include <cstdint>
#include <limits>
#include <type_traits>

namespace talpa::cuda_mix_logits_test {
using support::device;
using support::on_device;

namespace {

template <class T, class Mix>
struct kind {
  using scalar = T;
  using mix = Mix;
};

/// All ops on the same inputs on both.
template <class T, class Mix>
void compare(index keep, const matrix<T, cpu>& main_logits, const matrix<T, cpu>& sub_logits,
             const matrix<T, cpu>& gradient) {
  const index n = main_logits.rows(), r = main_logits.cols(), e = gradient.cols();
  CAPTURE(n);
  CAPTURE(r);
  CAPTURE(e);
  CAPTURE(keep);
  context<device> ctx;
  context<cpu> host(1);
  const auto sevens = [](index rows, index cols) {
    matrix<T, cpu> m(rows, cols);
    for (index i = 0; i < m.size(); ++i) m.data()[i] = T{7};
    return m;
  };
  on_device<T> main(main_logits), subs(sub_logits), dlogits(gradient);
  on_device<T> gates(sevens(n, r)), log_gates(sevens(n, r)), normaliser(sevens(n, r)),
      logits(sevens(n, e)), dsubs(sevens(n, r * e)), dlog_gates(sevens(n, r)), dmain(sevens(n, r));
  on_device<std::uint32_t> mask(matrix<std::uint32_t, cpu>(n, mask_words(r)));
  matrix<T, cpu> g(n, r), l(n, r), z(n, r), x(n, e), ds(n, r * e), dl(n, r), dm(n, r);
  matrix<std::uint32_t, cpu> bits(n, mask_words(r));

  const mix_weights<T, device> there{gates.view(), log_gates.view()};
  ops::mix_gates(ctx, keep, main.view(), there, mask.view());
  ops::mix_logits(ctx, Mix{}, subs.view(), there, normaliser.view(), logits.view());
  ops::mix_logits_backward(ctx, Mix{}, subs.view(), there, normaliser.view(), logits.view(),
                           dlogits.view(), dsubs.view(), dlog_gates.view());
  ops::mix_gates_backward(ctx, gates.view(), dlog_gates.view(), dmain.view());
  ctx.synchronise();
  const mix_weights<T, cpu> here{g.view(), l.view()};
  ops::mix_gates(host, keep, main_logits, here, bits.view());
  ops::mix_logits(host, Mix{}, sub_logits, here, z.view(), x.view());
  ops::mix_logits_backward(host, Mix{}, sub_logits, here, z, x, gradient, ds.view(), dl.view());
  ops::mix_gates_backward(host, g, dl, dm.view());

  CHECK(support::bit_difference(gates.now(), g) == "");
  CHECK(support::bit_difference(log_gates.now(), l) == "");
  CHECK(support::bit_difference(mask.now(), bits) == "");
  if (std::is_same_v<Mix, mix::probability> || r == 1) {
    CHECK(support::bit_difference(normaliser.now(), z) == "");
  }
  CHECK(support::bit_difference(logits.now(), x) == "");
  CHECK(support::bit_difference(dsubs.now(), ds) == "");
  CHECK(support::bit_difference(dlog_gates.now(), dl) == "");
  CHECK(support::bit_difference(dmain.now(), dm) == "");
  CHECK(gates.intact());
  CHECK(log_gates.intact());
  CHECK(mask.intact());
  CHECK(normaliser.intact());
  CHECK(logits.intact());
  CHECK(dsubs.intact());
  CHECK(dlog_gates.intact());
  CHECK(dmain.intact());
}

}  // namespace

TEST_SUITE("cuda/mix_logits") {
  using with_probability = kind<float, mix::probability>;
  using with_logit = kind<double, mix::logit>;

  TEST_CASE_TEMPLATE("mixing has the bits of the host", K, with_probability, with_logit) {
    using T = typename K::scalar;
    support::test_random random(9);
    const auto run = [&](index n, index r, index e, index keep) {
      compare<T, typename K::mix>(keep, support::random_matrix<T>(random, n, r, 3.0),
                                  support::random_matrix<T>(random, n, r * e, 4.0),
                                  support::random_matrix<T>(random, n, e));
    };
    run(0, 2, 3, 1);
    run(1, 5, 1, 5);
    run(support::device_size(33, 3001), 1, 7, 1);
    run(support::device_size(129, 3001), 5, 8, 3);
    run(support::device_size(17, 3001), 3, 65, 2);
    run(support::device_size(5, 3001), 34, 33, 4);
  }

  TEST_CASE_TEMPLATE("-inf, NaN and ties have the bits of the host", K, with_probability,
                     with_logit) {
    using T = typename K::scalar;
    constexpr T infinity = std::numeric_limits<T>::infinity();
    support::test_random random(10);
    matrix<T, cpu> main = support::random_matrix<T>(random, 8, 4);
    matrix<T, cpu> subs = support::random_matrix<T>(random, 8, 12);
    const matrix<T, cpu> gradient = support::random_matrix<T>(random, 8, 3);
    for (index r = 0; r < 4; ++r) {
      main(0, r) = T{1};               // ties
      main(1, r) = -infinity;          // nobody
      subs(4, r * 3 + 1) = -infinity;  // an expert that all routers mask
    }
    main(2, 1) = std::numeric_limits<T>::quiet_NaN();
    main(3, 2) = -infinity;
    subs(3, 7) = std::numeric_limits<T>::quiet_NaN();  // of a router that is off
    subs(5, 0) = subs(5, 1) = subs(5, 2) = -infinity;
    subs(6, 4) = infinity;
    compare<T, typename K::mix>(2, main, subs, gradient);
    compare<T, typename K::mix>(4, main, subs, gradient);
  }
}

}  // namespace talpa::cuda_mix_logits_test
