// SPDX-License-Identifier: Apache-2.0
#include "golden/runner.hpp"

#include <talpa/cpu/kl_divergence.hpp>

namespace talpa::golden::factorllm_distill_method {

namespace {

constexpr double clip = 1e-7;

/// The loss of rows first .. first + count - 1, whose gradients go to the same rows of dp.
double loss_of(context<cpu>& ctx, const matrix<double, cpu>& p, const matrix<double, cpu>& q,
               matrix<double, cpu>& dp, index first, index count) {
  const auto part = p.view().row_range(first, count), goal = q.view().row_range(first, count);
  matrix<double, cpu> value(1, 1), one(1, 1);
  one(0, 0) = 1.0;
  ops::kl_divergence(ctx, part, goal, clip, value.view());
  ops::kl_divergence_backward(ctx, part, goal, clip, one, dp.view().row_range(first, count),
                              grad_mode::overwrite);
  return value(0, 0);
}

void factorllm_distill(const golden_case& c, checker& check) {
  const tensor in = c.at("inputs.input");
  const matrix<double, cpu> p = in.rows(), q = c.at("inputs.target").rows();
  matrix<double, cpu> dp(p.rows(), p.cols());
  context<cpu> ctx;
  if (in.shape.size() == 2) {
    check.equal("outputs.loss", loss_of(ctx, p, q, dp, 0, p.rows()), c.forward());
  } else {
    // Of three dimensions the original returns the rows of the first sequence, one by one.
    matrix<double, cpu> losses(1, in.dim(1));
    for (index n = 0; n < in.dim(1); ++n) losses(0, n) = loss_of(ctx, p, q, dp, n, 1);
    check.equal("outputs.loss", losses, c.forward());
  }
  check.equal("grads.input", dp, c.gradient());
}

const registration entry{"perft/factorllm_distill", factorllm_distill};

}  // namespace

}  // namespace talpa::golden::factorllm_distill_method
