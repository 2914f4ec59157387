// SPDX-License-Identifier: Apache-2.0
#include "support/random.hpp"
#include "support/scalars.hpp"
#include "support/tolerance.hpp"

#include <talpa/cpu/dropout.hpp>
#include <talpa/layers/input_dropout.hpp>
#include <talpa/testing/bounds.hpp>
#include <talpa/testing/inputs.hpp>

#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <string>

namespace talpa::input_dropout_test {

namespace {
using dropping = input_dropout<cpu>;
constexpr dropping half{{.stream = {9, 2}, .keep = 0.5f, .active = true}};
}  // namespace

TEST_SUITE("layers/input_dropout") {
  TEST_CASE("a mask is drawn in training with a share to drop, and not otherwise") {
    generator random(3);
    const batch_info<float, cpu> batch{.random = &random};
    CHECK_FALSE(dropping::draw("f", 0.0, mode::training, batch).active());
    CHECK_FALSE(dropping::draw("f", 0.5, mode::inference, batch).active());
    CHECK_FALSE(dropping::draw("f", 0.0, mode::training, batch_info<float, cpu>{}).active());
    CHECK_FALSE(dropping::draw("f", 0.5, mode::inference, batch_info<float, cpu>{}).active());
    CHECK(random.next_stream() == 0);
    const dropping drawn = dropping::draw("f", 0.25, mode::training, batch);
    CHECK(drawn.active());
    CHECK(drawn.mask.keep == 0.75f);
    CHECK(drawn.mask.stream == random_stream{3, 0});
    CHECK(random.next_stream() == 1);
    CHECK_THROWS_WITH_AS(dropping::draw("layer", 0.5, mode::training, batch_info<float, cpu>{}),
                         "talpa::layer: 'batch.random' is null, expected a generator = source of "
                         "the dropout mask in training",
                         value_error);
  }

  TEST_CASE("without a mask x itself comes back, and gradients pass by") {
    context<cpu> ctx(1);
    const matrix<float, cpu> x(3, 4);
    const dropping none{};
    CHECK(none.apply<float>(ctx, x.view()).data == x.data());
    CHECK(ctx.scratch.used() == 0);
    matrix<float, cpu> dx(3, 4);
    for (const grad_mode mode : {grad_mode::accumulate, grad_mode::ignore}) {
      bool called = false;
      none.through<float>(ctx, dx.view(), mode,
                          [&](matrix_view<float, cpu> share, grad_mode share_mode) {
                            called = true;
                            CHECK(share.data == dx.data());
                            CHECK(share_mode == mode);
                          });
      CHECK(called);
    }
  }

  TEST_CASE_TEMPLATE("the mask of backward is the mask of forward", T, TALPA_SCALARS) {
    support::test_random inputs(4);
    const index tokens = 30, width = 17;
    const matrix<T, cpu> x = support::random_matrix<T>(inputs, tokens, width);
    context<cpu> ctx(2);
    const workspace<cpu>::scope scope(ctx.scratch);
    dropping drawn = half;
    const auto dropped = drawn.begin<T>(ctx, x.view());
    CHECK(ctx.memory.used() == dropping::saved_bytes(0.5, tokens, width));
    CHECK(support::same_bits(drawn.apply<T>(ctx, x.view()), dropped));
    matrix<T, cpu> dx(tokens, width);
    for (index i = 0; i < dx.size(); ++i) dx.data()[i] = T{1};
    drawn.through<T>(ctx, dx.view(), grad_mode::accumulate,
                     [&](matrix_view<T, cpu> share, grad_mode mode) {
                       CHECK(share.data != dx.data());
                       CHECK(mode == grad_mode::overwrite);
                       for (index n = 0; n < tokens; ++n) {
                         for (index d = 0; d < width; ++d) share(n, d) = x(n, d);
                       }
                     });
    index kept = 0;
    for (index n = 0; n < tokens; ++n) {
      for (index d = 0; d < width; ++d) {
        const bool on = keep(half.mask.stream, static_cast<std::uint64_t>(n * width + d), 0.5f);
        kept += on ? 1 : 0;
        CHECK(dropped(n, d) == (on ? T{2} * x(n, d) : T{0}));
        CHECK(dx(n, d) == T{1} + (on ? T{2} * x(n, d) : T{0}));
      }
    }
    // A fair coin, within five deviations of sqrt(n) / 2.
    const double n = static_cast<double>(x.size());
    CHECK(std::abs(static_cast<double>(kept) - n / 2.0) <= 2.5 * std::sqrt(n));
  }

  TEST_CASE("an ignored gradient is passed on as ignored, without memory") {
    context<cpu> ctx(1);
    bool called = false;
    half.through<float>(ctx, {}, grad_mode::ignore,
                        [&](matrix_view<float, cpu> share, grad_mode mode) {
                          called = true;
                          CHECK(share.data == nullptr);
                          CHECK(mode == grad_mode::ignore);
                        });
    CHECK(called);
    CHECK(ctx.scratch.used() == 0);
  }
}

}  // namespace talpa::input_dropout_test
