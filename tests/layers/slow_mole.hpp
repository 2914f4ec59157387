// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "selectors/slow_selection.hpp"
#include "support/cpu_products.hpp"
#include "support/random.hpp"
#include "support/tolerance.hpp"

#include <talpa/cpu/add.hpp>
#include <talpa/cpu/bias.hpp>
#include <talpa/cpu/copy.hpp>
#include <talpa/cpu/dropout.hpp>
#include <talpa/cpu/fill.hpp>
#include <talpa/cpu/gather.hpp>
#include <talpa/cpu/grouped_gemm.hpp>
#include <talpa/cpu/rank_gate.hpp>
#include <talpa/cpu/reduce.hpp>
#include <talpa/cpu/routed_linear.hpp>
#include <talpa/cpu/segments.hpp>
#include <talpa/cpu/select.hpp>
#include <talpa/experts/lora.hpp>
#include <talpa/layers/mole_linear.hpp>
#include <talpa/scorers/linear_scorer.hpp>
#include <talpa/selectors/dense.hpp>
#include <talpa/selectors/top_k.hpp>
#include <talpa/testing/bounds.hpp>
#include <talpa/testing/gradient_check.hpp>
#include <talpa/testing/parameters.hpp>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

// A mixture of LoRA experts once more, by plain loops in double, and what the tests of layers
// share.

namespace talpa::support {

struct mole_sizes {
  index tokens = 13;
  index inputs = 7;
  index outputs = 5;
  index experts = 4;
  index rank = 3;
};

template <class Selector>
using mole = mole_linear<router<linear_scorer, Selector>, lora>;

/// A layer with a router bias, and parameters none of which has a special value.
template <class Selector>
mole<Selector> make_mole(const mole_sizes& s, const Selector& selector, strategy execution,
                         double dropout = 0.0) {
  return {
      .router = {.scorer = {.bias = true}, .selector = selector},
      .expert = {.rank = s.rank, .alpha = 1.5 * static_cast<double>(s.rank), .dropout = dropout},
      .experts = s.experts,
      .execution = execution};
}
template <class T, class Selector>
typename mole<Selector>::template params<T, cpu> make_params(const mole<Selector>& layer,
                                                             const mole_sizes& s,
                                                             std::uint64_t seed,
                                                             bool frozen_base = true) {
  generator random(seed);
  auto base = linear{}.init<T, cpu>(s.inputs, s.outputs, random, "base.");
  if (frozen_base) base.freeze();
  auto p = layer.template init<T, cpu>(std::move(base), random);
  testing::detail::shake<T>(p, random, 0.5);
  return p;
}

/// What the slow layer computes, and sums of the absolute values of all terms of y.
struct slow_mole {
  table y, magnitude;
  table gates;
  std::vector<std::vector<bool>> on;
};

/// y = x W^T + b + sum_e g_e s B_e A_e x with gates of the logits x Wr^T + br: by `choose(logits)`,
/// which returns a slow_row. Tokens with real[n] == false get the base alone.
template <class Params, class Choose>
slow_mole slow_forward(const Params& p, const lora& expert, index experts, const table& x,
                       Choose choose, const std::vector<bool>& real = {}) {
  const table w = to_table(p.base.weight.value()), b = to_table(p.base.bias.value());
  const table wr = to_table(p.router.scorer.weight.value()),
              br = to_table(p.router.scorer.bias.value());
  const table a = to_table(p.expert.a.value()), bank = to_table(p.expert.b.value());
  const index rank = expert.rank;
  slow_mole r{table(x.rows, w.rows), table(x.rows, w.rows), table(x.rows, experts), {}};
  for (index n = 0; n < x.rows; ++n) {
    for (index o = 0; o < w.rows; ++o) {
      r.y(n, o) = b(0, o);
      r.magnitude(n, o) = std::abs(b(0, o));
      for (index d = 0; d < x.cols; ++d) {
        r.y(n, o) += x(n, d) * w(o, d);
        r.magnitude(n, o) += std::abs(x(n, d) * w(o, d));
      }
    }
    r.on.emplace_back(static_cast<std::size_t>(experts), false);
    if (!real.empty() && !real[static_cast<std::size_t>(n)]) continue;
    std::vector<double> logits;
    for (index e = 0; e < experts; ++e) {
      double u = br(0, e);
      for (index d = 0; d < x.cols; ++d) u += x(n, d) * wr(e, d);
      logits.push_back(u);
    }
    const slow_row chosen = choose(logits, n);
    r.on.back() = chosen.on;
    for (index e = 0; e < experts; ++e) {
      const double g = chosen.gates[static_cast<std::size_t>(e)];
      r.gates(n, e) = g;
      for (index k = e * rank; k < (e + 1) * rank; ++k) {
        double u = 0.0, size = 0.0;
        for (index d = 0; d < x.cols; ++d) {
          u += a(k, d) * x(n, d);
          size += std::abs(a(k, d) * x(n, d));
        }
        for (index o = 0; o < w.rows; ++o) {
          r.y(n, o) += g * expert.scale() * u * bank(k, o);
          r.magnitude(n, o) += std::abs(g * expert.scale() * size * bank(k, o));
        }
      }
    }
  }
  return r;
}

/// Relative error of everything behind the gates: a logit is off by gamma(D + 1) times the sum of
/// its absolute terms, which is an absolute error of its exponent and hence a relative one of the
/// gate, twice where gates are renormalised; then exponentials, sums, and the products of the
/// adapter and the base.
template <class T>
double mole_error(const mole_sizes& s, const table& x, const table& router_weight,
                  const table& router_bias) {
  const double d = static_cast<double>(s.inputs);
  double logit_terms = 0.0;
  for (index n = 0; n < x.rows; ++n) {
    for (index e = 0; e < router_weight.rows; ++e) {
      double size = std::abs(router_bias(0, e));
      for (index i = 0; i < x.cols; ++i) size += std::abs(x(n, i) * router_weight(e, i));
      logit_terms = std::fmax(logit_terms, size);
    }
  }
  const double exponent = 4.0 * (gamma_bound<T>(d + 2.0) + unit_roundoff<T>()) * logit_terms;
  const double e = static_cast<double>(s.experts), r = static_cast<double>(s.rank);
  const double roundings = 2.0 * (2.0 * e + 8.0) + 2.0 * d + e * r + 8.0;
  return exponent + gamma_bound<T>(roundings);
}

/// Sums of the absolute values of all terms of each result of a step with gates that sum to one, by
/// plain loops: y, dx, and the gradients of base weight and bias, router weight and bias, A and B.
struct mole_magnitudes {
  table y, dx;
  std::vector<table> gradients;
};
template <class Layer, class Params>
mole_magnitudes magnitudes(const Layer& layer, const Params& p, const table& x_signed,
                           const table& dy_signed, const table& gates) {
  const table x = absolute(x_signed), dy = absolute(dy_signed);
  const table w = absolute(to_table(p.base.weight.value()));
  const table b = absolute(to_table(p.base.bias.value()));
  const table wr = absolute(to_table(p.router.scorer.weight.value()));
  const table a = absolute(to_table(p.expert.a.value()));
  const table bank = absolute(to_table(p.expert.b.value()));
  const double scale = layer.expert.scale();
  const index rank = layer.expert.rank;
  const table u = matmul(x, transposed(a)), dz = matmul(dy, transposed(bank));  // [N, E R]
  table z = u, du = dz, dlogits(x.rows, gates.cols);
  for (index n = 0; n < x.rows; ++n) {
    double mean = 0.0;
    for (index k = 0; k < u.cols; ++k) {
      const index e = k / rank;
      z(n, k) *= scale * gates(n, e);
      du(n, k) *= scale * gates(n, e);
      dlogits(n, e) += gates(n, e) * scale * dz(n, k) * u(n, k);
      mean += gates(n, e) * scale * dz(n, k) * u(n, k);
    }
    for (index e = 0; e < gates.cols; ++e) dlogits(n, e) += gates(n, e) * mean;
  }
  const auto sum = [](const table& left, const table& right) {
    return each(left, right, [](double l, double r) { return l + r; });
  };
  table y = sum(matmul(x, transposed(w)), matmul(z, bank));
  for (index n = 0; n < y.rows; ++n) {
    for (index o = 0; o < y.cols; ++o) y(n, o) += b(0, o);
  }
  return {y,
          sum(sum(matmul(dy, w), matmul(du, a)), matmul(dlogits, wr)),
          {matmul(transposed(dy), x), column_sums(dy), matmul(transposed(dlogits), x),
           column_sums(dlogits), matmul(transposed(du), x), matmul(transposed(z), dy)}};
}

/// The mask of a routing as the signature of a gradient check.
template <class T>
std::vector<std::uint32_t> signature_of(const routed_view<T, cpu>& routed) {
  std::vector<std::uint32_t> words;
  for (index n = 0; n < routed.routing.mask.rows; ++n) {
    for (index w = 0; w < routed.routing.mask.cols; ++w) {
      words.push_back(routed.routing.mask(n, w));
    }
  }
  return words;
}

/// Everything one training step gives.
template <class T>
struct mole_step {
  matrix<T, cpu> y, dx, gates;
  std::vector<matrix<T, cpu>> gradients;
};
template <class T, class Layer, class Params>
mole_step<T> run_mole(const Layer& layer, Params& p, const matrix<T, cpu>& x,
                      const matrix<T, cpu>& dy, int threads = 1,
                      const batch_info<T, cpu>& batch = {},
                      grad_mode dx_mode = grad_mode::overwrite,
                      T before = std::numeric_limits<T>::quiet_NaN(), bool checked = false) {
  context<cpu> ctx(threads);
  ctx.checked = checked;
  mole_step<T> s{matrix<T, cpu>(x.rows(), dy.cols()), matrix<T, cpu>(x.rows(), x.cols()), {}, {}};
  testing::poison<T>(s.y.view());
  std::fill_n(s.dx.data(), s.dx.size(), before);
  testing::detail::fill_gradients<T>(p, T{0});
  const auto kept = layer.forward(ctx, p, x, s.y.view(), mode::training, batch);
  s.gates = matrix<T, cpu>(kept.routed.routing.gates);
  layer.backward(ctx, p, kept, x, dy, s.dx.view(), dx_mode);
  s.gradients = testing::detail::gradients_of<T>(p);
  return s;
}

/// Empty, or the first bit that differs.
template <class T>
std::string step_difference(const mole_step<T>& a, const mole_step<T>& b) {
  std::string text = testing::first_difference(a.y, b.y);
  if (!text.empty()) return "y: " + text;
  text = testing::first_difference(a.dx, b.dx);
  if (!text.empty()) return "dx: " + text;
  text = testing::first_difference(a.gates, b.gates);
  if (!text.empty()) return "gates: " + text;
  return testing::detail::first_difference(a.gradients, b.gradients);
}

}  // namespace talpa::support
