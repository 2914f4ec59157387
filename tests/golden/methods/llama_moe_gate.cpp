// SPDX-License-Identifier: Apache-2.0
#include "golden/case.hpp"
#include "golden/methods/from_loss.hpp"
#include "golden/runner.hpp"

#include <talpa/cpu/bias.hpp>
#include <talpa/cpu/copy.hpp>
#include <talpa/cpu/gemm.hpp>
#include <talpa/cpu/noise.hpp>
#include <talpa/cpu/reduce.hpp>
#include <talpa/cpu/scale.hpp>
#include <talpa/cpu/select.hpp>
#include <talpa/losses/importance_cv2.hpp>
#include <talpa/losses/load_cv2.hpp>
#include <talpa/losses/losses.hpp>
#include <talpa/routing/statistics.hpp>
#include <talpa/scorers/linear_scorer.hpp>
#include <talpa/scorers/noisy.hpp>
#include <talpa/selectors/top_k.hpp>

#include <cstddef>
#include <string>

namespace talpa::golden::llama_moe_gate_method {

namespace {

using matrix_d = matrix<double, cpu>;
using view_d = matrix_view<const double, cpu>;

/// The scorer with the normal numbers of the file in place of drawn ones: clean logits, deviations
/// and all their gradients are those of noisy.
struct given_noise {
  static constexpr const char* name = "given_noise";

  noisy<linear_scorer> inner{};
  const double* normal = nullptr;  // [N, E], null: no noise

  template <class T, class B>
  using params = noisy<linear_scorer>::params<T, B>;
  template <class T, class B>
  using saved = noisy<linear_scorer>::saved<T, B>;

  template <class T, class B>
  params<T, B> init(index inputs, index experts, generator& random, const std::string& p) const {
    return inner.init<T, B>(inputs, experts, random, p);
  }
  template <class T, class B>
  saved<T, B> forward(context<B>& ctx, const params<T, B>& p, input<T, B> x, output<T, B> logits,
                      mode, const batch_info<T, B>& batch) const {
    if (normal == nullptr) return inner.forward(ctx, p, x, logits, mode::inference, batch);
    generator ignored(1);
    batch_info<T, B> with = batch;
    with.random = &ignored;
    const saved<T, B> kept = inner.forward(ctx, p, x, logits, mode::training, with);
    for (index i = 0; i < x.rows * logits.cols; ++i) {
      logits.data[i] = static_cast<T>(static_cast<double>(kept.clean.data[i]) +
                                      normal[i] * static_cast<double>(kept.deviation.data[i]));
    }
    return kept;
  }
  template <class T, class B>
  routed_noise<T, B> noise(const saved<T, B>& kept, matrix_view<const T, B> logits) const {
    return inner.noise(kept, logits);
  }
  template <class T, class B>
  void backward(context<B>& ctx, params<T, B>& p, const saved<T, B>& kept, input<T, B> x,
                input<T, B> dlogits, output<T, B> dx, grad_mode m,
                const std::type_identity_t<routed_noise_gradient<T, B>>& extra = {}) const {
    if (normal == nullptr) {
      inner.backward(ctx, p, kept, x, dlogits, dx, m);
      return;
    }
    // logits = clean + normal deviation.
    matrix<T, B> dclean(dlogits), ddeviation(dlogits), none(dlogits.rows, dlogits.cols);
    for (index i = 0; i < dclean.size(); ++i) {
      ddeviation.data()[i] *= static_cast<T>(normal[i]);
      if (extra.dclean.empty()) continue;
      dclean.data()[i] += extra.dclean.data[i];
      ddeviation.data()[i] += extra.ddeviation.data[i];
    }
    inner.backward(ctx, p, kept, x, none, dx, m, {dclean.view(), ddeviation.view()});
  }
};

void llama_moe_gate(const golden_case& c, checker& check) {
  using gate_router = router<given_noise, top_k<gate::softmax_selected>>;
  const index experts = c.integer("hyper.E"), k = c.integer("hyper.K");
  const double weight = c.number("hyper.balance_loss_weight");
  const matrix_d x = c.at("inputs.x").rows();
  const bool drawn = c.has("inputs.noise");
  const matrix_d normal = drawn ? c.at("inputs.noise", {x.rows(), experts}).rows() : matrix_d();
  const gate_router layer{.scorer = {.inner = {.floor = c.number("hyper.noise_epsilon")},
                                     .normal = drawn ? normal.data() : nullptr},
                          .selector = {.k = k}};
  gate_router::params<double, cpu> p;
  p.scorer.inner.weight = parameter<double, cpu>(
      "weight", c.at("params.gate_network.weight", {experts, x.cols()}).rows());
  const bool noisy_weight = c.has("params.weight_noise.weight");
  p.scorer.noise.weight = parameter<double, cpu>(
      "noise", noisy_weight ? c.at("params.weight_noise.weight", {experts, x.cols()}).rows()
                            : matrix_d(experts, x.cols()));
  context<cpu> ctx;
  const auto kept =
      layer.forward(ctx, p, experts, x, c.flag("hyper.training") ? mode::training : mode::inference,
                    batch_info<double, cpu>{});

  // The experts in the order of their logits.
  const tensor chosen = c.at("outputs.topk_idx", {x.rows(), k});
  const matrix_d upstream = c.at("inputs.cotangent", {x.rows(), k}).rows();
  matrix_d scores(x.rows(), k), dgates(x.rows(), experts), dx(x.rows(), x.cols());
  std::string problem;
  double total = 0.0;
  for (index n = 0; n < x.rows(); ++n) {
    index count = 0;
    for (index e = 0; e < experts; ++e) count += kept.routed.routing.on(n, e) ? 1 : 0;
    double before = kept.routed.logits(n, 0);
    for (index j = 0; j < k; ++j) {
      const auto e = static_cast<index>(chosen.data[static_cast<std::size_t>(n * k + j)]);
      const double logit = kept.routed.logits(n, e);
      const bool in_order = j == 0 || logit <= before;
      if (count != k || !kept.routed.routing.on(n, e) || !in_order) {
        problem = "token " + std::to_string(n) + " has other experts";
      }
      before = logit;
      scores(n, j) = kept.routed.routing.gates(n, e);
      dgates(n, e) = upstream(n, j);
      total += scores(n, j) * upstream(n, j);
    }
  }
  check.account("outputs.topk_idx", problem);
  check.equal("outputs.topk_score", scores, c.forward());

  const auto statistics = measure<double, cpu>(ctx, kept.routed);
  check.equal("outputs.importance", statistics.totals.importance, c.forward());
  matrix_d load(1, experts);
  routing_totals<double, cpu> sums;
  sums.affinity = load.view();
  ops::routing_sums<cpu, double>(ctx,
                                 {kept.routed.logits,
                                  kept.routed.routing.gates,
                                  kept.routed.routing.mask,
                                  {},
                                  0,
                                  {},
                                  kept.routed.noise.clean,
                                  kept.routed.noise.deviation},
                                 sums, grad_mode::overwrite, talpa::detail::selection_chance{true});
  check.equal("outputs.load", load, c.forward());

  const losses balance{term{weight, importance_cv2{}}, term{weight, load_cv2{.noise_alone = true}}};
  loss_result even = evaluate(balance, kept.routed);
  check.equal("outputs.balance_loss", even.value, c.forward());
  check.equal("loss.total", total + even.value, c.forward());
  const routed_gradient<double, cpu> from_losses = even.gradient();
  layer.backward(ctx, p, kept, x, dgates.view(), dx.view(), grad_mode::overwrite, &from_losses);
  check.equal("grads.x", dx, c.gradient());
  check.equal("grads.gate_network.weight", p.scorer.inner.weight.grad(), c.gradient());
  if (noisy_weight) {
    check.equal("grads.weight_noise.weight", p.scorer.noise.weight.grad(), c.gradient());
  }
}

const registration entry("perft/llama_moe_gate", llama_moe_gate);

}  // namespace

}  // namespace talpa::golden::llama_moe_gate_method
