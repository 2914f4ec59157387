// SPDX-License-Identifier: Apache-2.0
#include "golden/case.hpp"
#include "golden/methods/from_loss.hpp"
#include "golden/runner.hpp"

#include <talpa/cpu/select.hpp>
#include <talpa/losses/gjs.hpp>
#include <talpa/losses/load_balance.hpp>
#include <talpa/routing/routing.hpp>
#include <talpa/selectors/dense.hpp>
#include <talpa/selectors/top_k.hpp>

#include <cmath>
#include <cstdint>

namespace talpa::golden::hmora_method {

namespace {

using matrix_d = matrix<double, cpu>;

/// Gates of a selector for the mixture of softmax(logits) and the task's weights, whose logarithms
/// are logits with this softmax; the gradient goes back the same way.
template <class Selector>
void run(const golden_case& c, checker& check, const Selector& selector) {
  const tensor shape = c.at("inputs.logits");
  const matrix_d u = shape.rows(), upstream = c.at("inputs.upstream").rows();
  const index experts = u.cols(), sequence = shape.dim(1);
  const bool mixes = c.has("hparams.alpha") && c.has("inputs.task_weight");
  const double alpha = mixes ? 1.0 / (1.0 + std::exp(-c.number("hparams.alpha"))) : 0.0;
  matrix_d task(u.rows(), experts), mixed = u;
  if (mixes) task = c.at("inputs.task_weight", {shape.dim(0), experts}).rows();

  context<cpu> ctx;
  routing<double, cpu> all(u.rows(), experts), r(u.rows(), experts);
  matrix_d dmixed(u.rows(), experts), du(u.rows(), experts);
  ops::select(ctx, dense{}, u, {}, all.gates.view(), all.mask.view());
  for (index n = 0; mixes && n < u.rows(); ++n) {
    for (index e = 0; e < experts; ++e) {
      mixed(n, e) = std::log((1.0 - alpha) * all.gates(n, e) + alpha * task(n / sequence, e));
    }
  }
  ops::select(ctx, selector, mixed, {}, r.gates.view(), r.mask.view());
  ops::select_backward(ctx, selector, mixed, r.gates.view(), r.mask.view(), upstream,
                       dmixed.view());
  if (mixes) {
    for (index i = 0; i < mixed.size(); ++i) {
      dmixed.data()[i] *= (1.0 - alpha) / std::exp(mixed.data()[i]);
    }
    ops::select_backward(ctx, dense{}, u, all.gates.view(), all.mask.view(), dmixed, du.view());
  } else {
    du = dmixed;
  }
  check.equal("outputs.weights", r.gates, c.forward());
  check.equal("grads.logits", du, c.gradient());

  // Both losses look at the probabilities before the task's weights enter, the balance also at the
  // experts that are on with them.
  const tensor attention = c.at("inputs.attention_mask", {shape.dim(0), sequence});
  vector<std::uint8_t, cpu> real(u.rows());
  for (index n = 0; n < u.rows(); ++n) {
    real[n] = attention.data[static_cast<std::size_t>(n)] != 0.0;
  }
  const routed_view<double, cpu> routed{u.view(), r.view(), real.view()};
  const loss_result divergence = evaluate(gjs{.balance = c.number("hparams.gamma_balance"),
                                              .certainty = c.number("hparams.gamma_certain")},
                                          routed);
  check.equal("outputs.gjs", divergence.value, c.forward());
  check.equal("grads.logits_from_gjs", divergence.dlogits, c.gradient());
  const loss_result even = evaluate(
      load_balance<balance::per_target, balance::per_layer>{
          .fraction = {.k = c.integer("hparams.balance_k")}},
      routed);
  check.equal("outputs.balance", even.value, c.forward());
  check.equal("grads.logits_from_balance", even.dlogits, c.gradient());
}

void hmora(const golden_case& c, checker& check) {
  if (!c.has("hparams.top_k")) return run(c, check, dense{});
  run(c, check, top_k<gate::softmax_probability>{.k = c.integer("hparams.top_k")});
}

const registration entry("routers/hmora", hmora);

}  // namespace

}  // namespace talpa::golden::hmora_method
