// SPDX-License-Identifier: Apache-2.0
#include "golden/methods/moe.hpp"
#include "golden/runner.hpp"

#include <talpa/cpu/mul.hpp>
#include <talpa/optim/expert_bias.hpp>
#include <talpa/routing/statistics.hpp>
#include <talpa/scorers/glu_scorer.hpp>
#include <talpa/selectors/biased_top_k.hpp>

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace talpa::golden::cmoe_moe_method {

namespace {

using matrix_d = matrix<double, cpu>;

/// The router of CMoE: the chosen experts have the gates 1 + s_e u_e, s the score that biased_top_k
/// gives as gate, u learned.
struct scaled_router {
  using selector_type = biased_top_k<score::softmax, gate::raw>;
  using base_router = router<glu_scorer, selector_type>;

  selector_type selector{};

  template <class T, class B>
  struct params {
    typename base_router::template params<T, B> base;
    parameter<T, B> u;  // [1, E]

    template <class F>
    void visit(F f) {
      base.visit(f);
      f(u);
    }
  };
  template <class T, class B>
  struct saved {
    typename base_router::template saved<T, B> base;
    routed_view<T, B> routed;  // with the gates of the experts
  };

  template <class T, class B>
  params<T, B> init(index inputs, index experts, generator& random, const std::string& p) const {
    return {base_router{{}, selector}.init<T, B>(inputs, experts, random, p),
            parameter<T, B>(p + "u", matrix<T, B>(1, experts))};
  }
  template <class T, class B>
  saved<T, B> forward(context<B>& ctx, const params<T, B>& p, index experts,
                      matrix_view<const T, B> x, mode m, const batch_info<T, B>& batch) const {
    saved<T, B> kept{};
    kept.base = base_router{{}, selector}.forward(ctx, p.base, experts, x, m, batch);
    kept.routed = kept.base.routed;
    const auto gates = ctx.memory.template take<T>(x.rows, experts);
    for (index n = 0; n < x.rows; ++n) {
      for (index e = 0; e < experts; ++e) {
        const T score = kept.base.routed.routing.gates(n, e);
        gates(n, e) = kept.routed.routing.on(n, e) ? T{1} + score * p.u.value()(0, e) : T{0};
      }
    }
    kept.routed.routing.gates = gates;
    return kept;
  }
  template <class T, class B>
  void backward(context<B>& ctx, params<T, B>& p, const saved<T, B>& kept,
                matrix_view<const T, B> x, matrix_view<T, B> dgates, matrix_view<T, B> dx,
                grad_mode dx_mode, const routed_gradient<T, B>* from_losses) const {
    for (index n = 0; n < x.rows; ++n) {
      for (index e = 0; e < dgates.cols; ++e) {
        p.u.grad()(0, e) += dgates(n, e) * kept.base.routed.routing.gates(n, e);
        dgates(n, e) *= p.u.value()(0, e);
      }
    }
    base_router{{}, selector}.backward(ctx, p.base, kept.base, x, dgates, dx, dx_mode, from_losses);
  }
};

/// The bank of the experts of a case, or that of its one shared expert.
swiglu::params<double, cpu> trained_bank(const golden_case& c, const std::string& prefix) {
  tensor down = c.at(prefix + ".down_proj");
  if (down.shape.size() == 2) down.shape.insert(down.shape.begin(), 1);
  swiglu::params<double, cpu> p;
  p.gate = parameter<double, cpu>("gate", c.at(prefix + ".gate_proj").rows());
  p.up = parameter<double, cpu>("up", c.at(prefix + ".up_proj").rows());
  p.down = parameter<double, cpu>("down", down.transposed_blocks());
  return p;
}

void cmoe_moe(const golden_case& c, checker& check) {
  // The original counts the shared experts among E.
  const index shared = c.integer("hyper.shared");
  const index experts = c.integer("hyper.E") - shared, k = c.integer("hyper.K");
  const index hidden = c.integer("hyper.F") / c.integer("hyper.E");
  using layer_type = moe_ffn<scaled_router>;
  const layer_type layer{.router = {.selector = {.k = k}},
                         .expert = {.hidden = hidden},
                         .experts = experts,
                         .shared = {.hidden = hidden},
                         .shared_experts = shared};
  const matrix_d x = c.at("inputs.x").rows(), dy = c.at("inputs.cotangent").rows();
  layer_type::params<double, cpu> p;
  auto& scorer = p.router.base.scorer;
  scorer.gate.weight =
      parameter<double, cpu>("gate", c.at("params.router.Wg", {experts, x.cols()}).rows());
  scorer.up.weight =
      parameter<double, cpu>("up", c.at("params.router.Wu", {experts, x.cols()}).rows());
  p.router.u = parameter<double, cpu>("u", c.at("params.router.u", {experts}).rows());
  auto& bias = p.router.base.expert_bias;
  bias = parameter<double, cpu>("bias", c.at("params.router.bias_before", {experts}).rows());
  bias.freeze();
  p.expert = trained_bank(c, "params.experts");
  p.shared = trained_bank(c, "params.shared");

  context<cpu> ctx;
  matrix_d y(x.rows(), x.cols()), dx(x.rows(), x.cols());
  const auto kept = layer.forward(ctx, p, x, y.view(), mode::training);
  check.equal("outputs.y", y, c.forward());
  check.equal("loss.total", inner_product(y, dy), c.forward());
  const tensor chosen = c.at("outputs.topk_idx", {x.rows(), k});
  matrix_d weights(x.rows(), k);
  std::string problem;
  for (index n = 0; n < x.rows(); ++n) {
    index count = 0;
    for (index e = 0; e < experts; ++e) count += kept.routed.routing.on(n, e) ? 1 : 0;
    for (index j = 0; j < k; ++j) {
      const auto e = static_cast<index>(chosen.data[static_cast<std::size_t>(n * k + j)]);
      if (count != k || !kept.routed.routing.on(n, e)) {
        problem = "token " + std::to_string(n) + " has other experts";
      }
      weights(n, j) = kept.routed.routing.gates(n, e);
    }
  }
  check.account("outputs.topk_idx", problem);
  check.equal("outputs.weights", weights, c.forward());

  layer.backward(ctx, p, kept, x, dy, dx.view(), grad_mode::overwrite);
  check.equal("grads.x", dx, c.gradient());
  check.equal("grads.router.Wg", scorer.gate.weight.grad(), c.gradient());
  check.equal("grads.router.Wu", scorer.up.weight.grad(), c.gradient());
  check.equal("grads.router.u", p.router.u.grad(), c.gradient());
  const auto compare_bank = [&](const std::string& prefix, const auto& bank, index number) {
    check.equal(prefix + ".gate_proj", bank.gate.grad(), c.gradient());
    check.equal(prefix + ".up_proj", bank.up.grad(), c.gradient());
    check.equal(prefix + ".down_proj", in_blocks(bank.down.grad(), number), c.gradient());
  };
  compare_bank("grads.experts", p.expert, experts);
  compare_bank("grads.shared", p.shared, shared);

  // The bias moves behind the routing.
  if (c.flag("hyper.update_bias")) {
    const statistics_report report(measure<double, cpu>(ctx, kept.routed));
    update_bias(bias.value(), report.counts, c.number("hyper.bias_speed"));
  }
  check.equal("outputs.bias_after", bias.value(), c.forward());
}

const registration entry("perft/cmoe_moe", cmoe_moe);

}  // namespace

}  // namespace talpa::golden::cmoe_moe_method
