// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/autograd/parameter.hpp>
#include <talpa/core/check.hpp>
#include <talpa/core/transfer.hpp>
#include <talpa/experts/lora.hpp>
#include <talpa/ops/gemm.hpp>
#include <talpa/ops/svd.hpp>

#include <algorithm>
#include <cmath>
#include <concepts>

namespace talpa {

/// How LoRA experts begin as segments of their base.
struct svd_segments {
  double rho = 10.0;        ///< > 0: what the singular values are divided by
  double correction = 1.0;  ///< finite: the base gives up this times the mean of the experts
};

/// Lets each LoRA expert begin as a segment of the singular value decomposition of the base, and
/// takes their mean out of the base.
///
/// With W = sum_k s_k u_k v_k^T, E experts and segments of L = floor(min(O, D) / E) values, expert
/// e gets the first R of its segment: for k = e L + r, A_(e R + r) = sqrt(s_k / (s rho)) v_k and
/// B_(e R + r) = sqrt(s_k / (s rho)) u_k, s the scale of the expert, so that s B_e A_e is its part
/// of W divided by rho. Then W -= (correction / E) s sum_e B_e A_e: where gates sum to one and no
/// expert is preferred, the layer begins as the base was, on average over routings.
/// Shapes: base [O, D]; bank A [E R, D], B transposed [E R, O].
/// Edges: a rank of W that is zero begins with A and B zero, and never learns.
/// Cost: that of ops::svd, once. Determinism: same bits for any number of threads.
/// Throws: shape_error when bank and base do not fit; value_error for numbers outside their range,
/// for more ranks than a segment has values, and for a scale that is not positive. Nothing is
/// changed then.
/// Source: GOAT, Fan et al. 2025 (arXiv 2502.16894) and its code, whose scripts take 1 / E of the
/// sum out of the base, and whose class alone takes the whole sum: correction = E.
template <backend B, floating T>
void begin_as_segments(context<B>& ctx, const lora& expert, lora::params<T, B>& p,
                       parameter<T, B>& base, const svd_segments& how = {}) {
  constexpr const char* name = "begin_as_segments";
  expert.validate();
  const index outputs = base.rows(), inputs = base.cols(), rank = expert.rank;
  const index values = std::min(outputs, inputs);
  check_shape(name, "A", p.a.value(), p.a.rows(), inputs, "ranks of all experts, columns of base");
  check_shape(name, "B", p.b.value(), p.a.rows(), outputs, "rows of A, rows of base");
  const index experts = p.a.rows() / rank;
  check_value(experts * rank == p.a.rows() && experts > 0, name, "A",
              static_cast<double>(p.a.rows()),
              "rows that are a multiple of the rank, at least one");
  check_range(name, "rank", rank, 1, values / experts, "singular values of a segment");
  check_value(how.rho > 0.0 && std::isfinite(how.rho), name, "rho", how.rho, "a finite number > 0");
  check_value(std::isfinite(how.correction), name, "correction", how.correction, "a finite number");
  const double s = expert.scale();
  check_value(s > 0.0, name, "alpha", expert.alpha, "> 0, for roots of singular values");

  const typename workspace<B>::scope scope(ctx.scratch);
  const auto u = ctx.scratch.template take<T>(values, outputs);  // [K, O]
  const auto v = ctx.scratch.template take<T>(values, inputs);   // [K, D]
  const auto sigma = ctx.scratch.template take<T>(index{1}, values);
  ops::svd(ctx, base.value(), u, sigma, v);
  const auto on_host = [](const auto& m) {
    if constexpr (std::same_as<B, cpu>) {
      return m;
    } else {
      return to_host(m);
    }
  };
  const auto left = on_host(u), right = on_host(v), lengths = on_host(sigma);
  auto a = on_host(p.a.value()), b = on_host(p.b.value());
  for (index e = 0; e < experts; ++e) {
    for (index r = 0; r < rank; ++r) {
      const index k = e * (values / experts) + r, row = e * rank + r;
      const double root = std::sqrt(static_cast<double>(lengths(0, k)) / (s * how.rho));
      for (index d = 0; d < inputs; ++d) {
        a(row, d) = static_cast<T>(root * static_cast<double>(right(k, d)));
      }
      for (index o = 0; o < outputs; ++o) {
        b(row, o) = static_cast<T>(root * static_cast<double>(left(k, o)));
      }
    }
  }
  if constexpr (!std::same_as<B, cpu>) {
    to_device<T, B>(a.view(), p.a.value());
    to_device<T, B>(b.view(), p.b.value());
  }
  ops::gemm(ctx, static_cast<T>(-how.correction * s / static_cast<double>(experts)), p.b.value(),
            transpose::yes, p.a.value(), transpose::no, T{1}, base.value());
}

}  // namespace talpa
