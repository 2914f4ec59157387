// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "support/laws.hpp"

#include <talpa/cpu/activation.hpp>
#include <talpa/cpu/add.hpp>
#include <talpa/cpu/bias.hpp>
#include <talpa/cpu/copy.hpp>
#include <talpa/cpu/dropout.hpp>
#include <talpa/cpu/fill.hpp>
#include <talpa/cpu/gated_activation.hpp>
#include <talpa/cpu/gather.hpp>
#include <talpa/cpu/grouped_gemm.hpp>
#include <talpa/cpu/pair_gates.hpp>
#include <talpa/cpu/rank_gate.hpp>
#include <talpa/cpu/reduce.hpp>
#include <talpa/cpu/scale.hpp>
#include <talpa/cpu/segments.hpp>
#include <talpa/cpu/select.hpp>
#include <talpa/cpu/sequence_rows.hpp>
#include <talpa/cpu/slot_dropout.hpp>
#include <talpa/experts/lora.hpp>
#include <talpa/experts/parallel_adapter.hpp>
#include <talpa/layers/moe_ffn.hpp>
#include <talpa/scorers/linear_scorer.hpp>
#include <talpa/selectors/dense.hpp>
#include <talpa/selectors/top_k.hpp>
#include <talpa/testing/layer_laws.hpp>

#include <cmath>

// What the tests of feed-forward layers share.

namespace talpa::support {

using raw_router = router<linear_scorer, top_k<gate::raw>>;
using renormalised_router = router<linear_scorer, top_k<gate::renormalised>>;
using moe = moe_ffn<raw_router>;

inline constexpr index features = 5;

/// Two of four experts of three neurons.
inline moe small_moe() {
  return {.router = {.selector = {.k = 2}}, .expert = {.hidden = 3}, .experts = 4};
}

/// The output for absolute values of weights and tokens: where the gates do not depend on them, a
/// bound of every sum of absolute terms, for |silu(u)| <= silu(|u|).
template <class Layer, class Params>
matrix<double, cpu> absolute_output(const Layer& layer, Params p, matrix<double, cpu> x) {
  const auto absolute = [](double* data, index size) {
    for (index i = 0; i < size; ++i) data[i] = std::abs(data[i]);
  };
  p.visit([&](parameter<double, cpu>& q) { absolute(q.value().data, q.size()); });
  absolute(x.data(), x.size());
  matrix<double, cpu> y(x.rows(), layer.output_width(p));
  context<cpu> ctx(1);
  layer.forward(ctx, p, x, y.view(), mode::inference);
  return y;
}

}  // namespace talpa::support
