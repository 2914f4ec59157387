// SPDX-License-Identifier: Apache-2.0
#include "support/parity.hpp"
#include "support/scalars.hpp"

#include <talpa/cpu/noise.hpp>
#include <talpa/cuda/noise.hpp>

#include <doctest/doctest.h>

namespace talpa::cuda_noise_test {
using support::bit_difference;
using support::device;
using support::on_device;

// Each op is made of fma, mul and functions of core/math.hpp: the same bits on every backend.
TEST_SUITE("cuda/noise") {
  TEST_CASE_TEMPLATE("noise and its gradients have the bits of the host", T, TALPA_SCALARS) {
    context<device> ctx;
    context<cpu> host(1);
    support::test_random random(31);
    constexpr random_stream stream{5, 11};
    for (const index rows : {index{0}, index{1}, support::device_size(129, 5003)}) {
      CAPTURE(rows);
      on_device<T> x(support::random_matrix<T>(random, rows, 7));
      on_device<T> raw(support::random_matrix<T>(random, rows, 7, 3.0));
      on_device<T> y(matrix<T, cpu>(rows, 7)), size(matrix<T, cpu>(rows, 7));
      matrix<T, cpu> want(rows, 7), want_size(rows, 7);
      ops::add_noise(host, stream, 0.3, x.host(), want.view());
      ops::add_noise(ctx, stream, 0.3, x.view(), y.view());
      ctx.synchronise();
      CHECK(bit_difference(y.now(), want) == "");

      ops::add_learned_noise(host, stream, 0.01, x.host(), raw.host(), want_size.view(),
                             want.view());
      ops::add_learned_noise(ctx, stream, 0.01, x.view(), raw.view(), size.view(), y.view());
      ctx.synchronise();
      CHECK(bit_difference(y.now(), want) == "");
      CHECK(bit_difference(size.now(), want_size) == "");
      CHECK(size.intact());

      // x in the place of dy, the deviation in that of its gradient.
      ops::add_learned_noise_backward(host, stream, raw.host(), x.host(), want_size, want.view());
      ops::add_learned_noise_backward(ctx, stream, raw.view(), x.view(), size.view(), y.view());
      ctx.synchronise();
      CHECK(bit_difference(y.now(), want) == "");
      const matrix_view<const T, cpu> none;
      const matrix_view<const T, device> none_there;
      ops::add_learned_noise_backward(host, stream, raw.host(), x.host(), none, want.view());
      ops::add_learned_noise_backward(ctx, stream, raw.view(), x.view(), none_there, y.view());
      ctx.synchronise();
      CHECK(bit_difference(y.now(), want) == "");

      for (const grad_mode m : {grad_mode::overwrite, grad_mode::accumulate, grad_mode::ignore}) {
        ops::jitter_backward(host, stream, 0.1, x.host(), want.view(), m);
        ops::jitter_backward(ctx, stream, 0.1, x.view(), y.view(), m);
        ctx.synchronise();
        CHECK(bit_difference(y.now(), want) == "");
      }
      ops::jitter(host, stream, 0.25, x.host(), want.view());
      ops::jitter(ctx, stream, 0.25, x.view(), x.view());
      ctx.synchronise();
      CHECK(bit_difference(x.now(), want) == "");
      CHECK(x.intact());
      CHECK(y.intact());
    }
  }
}

}  // namespace talpa::cuda_noise_test
