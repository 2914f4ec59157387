// SPDX-License-Identifier: Apache-2.0
#include "layers/ffn.hpp"
#include "support/scalars.hpp"

#include <talpa/layers/parrot_block.hpp>

#include <doctest/doctest.h>

#include <cstdint>

namespace talpa::parrot_block_test {

using namespace support;

TEST_SUITE("layers/parrot_block") {
  TEST_CASE_TEMPLATE("laws of parrot_block", T, TALPA_SCALARS) {
    const parrot_block layer{.router = {.scorer = {.query_row = 1}},
                             .expert = {.hidden = 3},
                             .experts = 3,
                             .scale = 0.5,
                             .residual = 0.25};
    obeys(testing::layer_laws<T>(
        layer, [&]<class U>(generator& random) { return layer.init<U, cpu>(features, random); }, {},
        {.tokens = 8,
         .inputs = features,
         .sequence_length = 4,
         .conditioning_rows = 3,
         .conditioning_width = features}));
  }

  TEST_CASE("all tokens of an image have the same gates, and its padding the residual alone") {
    const parrot_block layer{.expert = {.hidden = 2}, .experts = 3, .scale = 1.0, .residual = 0.5};
    generator random(1);
    const auto p = layer.init<double, cpu>(features, random);
    matrix<double, cpu> x(6, features), y(6, features), text(4, features);
    fill_normal(x.view(), 1.0, random);
    fill_normal(text.view(), 1.0, random);
    vector<std::uint8_t, cpu> real(6), present(4);
    for (const index n : {0, 1, 2, 3, 4}) real[n] = 1;  // the second image is shorter
    for (const index l : {0, 2, 3}) present[l] = 1;     // the first text is shorter
    batch_info<double, cpu> batch{.padding_mask = real.view(), .sequence_length = 3};
    batch.conditioning = {text.view(), present.view(), {}};
    context<cpu> ctx;
    const auto kept = layer.forward(ctx, p, x, y.view(), mode::inference, batch);
    const auto gates = kept.routed.routing.gates;
    for (index e = 0; e < 3; ++e) {
      CHECK(gates(0, e) == gates(2, e));
      CHECK(gates(3, e) == gates(4, e));
      CHECK(gates(0, e) != gates(3, e));
    }
    for (index d = 0; d < features; ++d) CHECK(y(5, d) == 0.5 * x(5, d));
  }
}

}  // namespace talpa::parrot_block_test
