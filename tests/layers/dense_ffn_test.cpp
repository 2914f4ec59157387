// SPDX-License-Identifier: Apache-2.0
#include "layers/ffn.hpp"
#include "support/scalars.hpp"

#include <talpa/cpu/gemm.hpp>
#include <talpa/cpu/unit_rows.hpp>
#include <talpa/layers/dense_ffn.hpp>

#include <doctest/doctest.h>

#include <cmath>

namespace talpa::dense_ffn_test {

using namespace support;

TEST_SUITE("layers/dense_ffn") {
  TEST_CASE_TEMPLATE("laws of dense_ffn", T, TALPA_SCALARS) {
    const dense_ffn<> layer;
    obeys(testing::layer_laws<T>(
        layer, [&]<class U>(generator& random) { return layer.init<U, cpu>(features, 7, random); },
        {}, {.many_tokens = 600}));
  }

  TEST_CASE("one neuron by hand, and the neurons' activations") {
    // y = 5 silu(2 x) 3 x at x = -1, silu(v) = v / (1 + exp(-v)). With lengths of 1 the token is
    // -1 and both rows are 1: silu(-1) (-1).
    generator random(1);
    const dense_ffn<> layer;
    auto p = layer.init<double, cpu>(1, 1, random);
    p.gate.value()(0, 0) = 2.0;
    p.up.value()(0, 0) = 3.0;
    p.down.value()(0, 0) = 5.0;
    matrix<double, cpu> x(1, 1), y(1, 1), h(1, 1);
    x(0, 0) = -1.0;
    context<cpu> ctx;
    layer.forward(ctx, p, x, y.view(), mode::inference);
    const double neuron = -2.0 / (1.0 + std::exp(2.0)) * -3.0;
    CHECK(std::abs(y(0, 0) - 5.0 * neuron) <= testing::gamma<double>(16.0) * 5.0 * neuron);
    layer.neurons(ctx, p, x, h.view());
    CHECK(std::abs(h(0, 0) - neuron) <= testing::gamma<double>(16.0) * neuron);
    layer.neurons(ctx, p, x, h.view(), true);
    const double unit = 1.0 / (1.0 + std::exp(1.0));
    CHECK(std::abs(h(0, 0) - unit) <= testing::gamma<double>(16.0) * unit);
  }

  TEST_CASE("what does not fit is refused") {
    generator random(1);
    CHECK_THROWS_WITH_AS((dense_ffn<>{}.init<float, cpu>(3, 0, random)),
                         "talpa::glu_ffn: 'hidden' is 0, expected >= 1 = neurons of one expert",
                         value_error);
    const auto p = dense_ffn<>{}.init<float, cpu>(3, 4, random);
    matrix<float, cpu> x(2, 2), y(2, 3);
    context<cpu> ctx;
    CHECK_THROWS_WITH_AS(dense_ffn<>{}.forward(ctx, p, x, y.view(), mode::inference),
                         "talpa::dense_ffn: 'x' has shape [2, 2], expected [2, 3] = tokens, input "
                         "width of the network",
                         shape_error);
    CHECK_THROWS_WITH_AS(
        dense_ffn<>{}.neurons(ctx, p, y, x.view()),
        "talpa::dense_ffn: 'h' has shape [2, 2], expected [2, 4] = tokens, neurons", shape_error);
  }
}

}  // namespace talpa::dense_ffn_test
