// SPDX-License-Identifier: Apache-2.0
#include "golden/case.hpp"
#include "golden/methods/mole.hpp"
#include "golden/runner.hpp"

#include <talpa/cpu/group_loss.hpp>
#include <talpa/cpu/limit_experts.hpp>
#include <talpa/cpu/routing_sums.hpp>
#include <talpa/layers/router.hpp>
#include <talpa/losses/load_balance.hpp>
#include <talpa/losses/router_z.hpp>
#include <talpa/selectors/capacity.hpp>
#include <talpa/selectors/top_k.hpp>

#include <string>
#include <utility>

namespace talpa::golden::switch_top1_method {

namespace {

using limited =
    capacity_top_k<gate::raw, overflow::by_position, capacity::fixed, capacity::per_sequence>;

/// A router with the weights of a case, and what it did to the tokens of the case.
template <class Selector>
struct routed_case {
  using router_type = router<linear_scorer, Selector>;

  context<cpu> ctx;
  router_type layer;
  typename router_type::template params<double, cpu> p;
  matrix<double, cpu> x;
  typename router_type::template saved<double, cpu> kept;

  routed_case(const golden_case& c, const Selector& selector)
      : layer{.scorer = {}, .selector = selector}, x(c.at("inputs.x").rows()) {
    p.scorer.weight = parameter<double, cpu>("weight", c.at("inputs.w_gate").rows());
    kept = layer.forward(ctx, p, experts(), x, mode::training,
                         {.sequence_length = c.at("inputs.x").dim(1)});
  }
  index experts() const { return p.scorer.weight.value().rows; }
  /// Gradient of the router's weights.
  matrix_view<const double, cpu> backward(matrix<double, cpu> dgates,
                                          const routed_gradient<double, cpu>* from_losses) {
    layer.backward(ctx, p, kept, x, dgates.view(), {}, grad_mode::ignore, from_losses);
    return p.scorer.weight.grad();
  }
};

template <class Loss>
void compare_loss(const golden_case& c, checker& check, const std::string& name,
                  const std::string& short_name, const Loss& loss, tolerance forward,
                  tolerance gradient_tolerance) {
  // The losses look at the choice without the limit.
  routed_case<top_k<gate::raw>> r(c, {.k = 1});
  const auto found = loss.forward(r.ctx, r.kept.routed);
  matrix<double, cpu> one(1, 1), dlogits(r.x.rows(), r.experts()), dgates = dlogits;
  one(0, 0) = 1.0;
  const routed_gradient<double, cpu> gradient{dlogits.view(), dgates.view()};
  loss.backward(r.ctx, r.kept.routed, found, one, gradient, grad_mode::overwrite);
  check.equal("outputs." + name, found.value(0, 0), forward);
  check.equal("grads.w_gate_from_" + short_name,
              r.backward(matrix<double, cpu>(r.x.rows(), r.experts()), &gradient),
              gradient_tolerance);
}

void switch_top1(const golden_case& c, checker& check) {
  const index experts = c.integer("hparams.num_experts");
  const tensor upstream = c.at("inputs.upstream");
  c.at("inputs.w_gate", {experts, c.at("inputs.x").dim(2)});

  routed_case<top_k<gate::raw>> all(c, {.k = 1});
  matrix<double, cpu> largest(upstream.dim(0), upstream.dim(1)), dgates(all.x.rows(), experts);
  for (index n = 0; n < all.x.rows(); ++n) {
    for (index e = 0; e < experts; ++e) {
      largest.data()[n] += all.kept.routed.routing.gates(n, e);
      dgates(n, e) = upstream.data[static_cast<std::size_t>(n)];
    }
  }
  check.equal("outputs.p_max", largest, c.forward());

  routed_case<limited> kept(c, {.k = 1, .capacity = {c.integer("hparams.expert_capacity")}});
  matrix<double, cpu> mask(all.x.rows(), experts);
  for (index n = 0; n < mask.rows(); ++n) {
    for (index e = 0; e < experts; ++e) mask(n, e) = kept.kept.routed.routing.on(n, e) ? 1.0 : 0.0;
  }
  check.equal("outputs.mask", mask, {});
  // The file's gradient is that of p_max, which has a value for dropped tokens too.
  check.equal("grads.w_gate_from_p_max", all.backward(dgates, nullptr), c.gradient());
  compare_loss(c, check, "z_loss", "z", router_z{}, c.forward(), c.gradient());
  // The original forms the shares of experts in float32.
  compare_loss(c, check, "balance", "balance",
               load_balance<balance::per_selection, balance::pooled>{}, float32_inside,
               float32_inside);
}

const registration entry("routers/switch_top1", switch_top1);

}  // namespace

}  // namespace talpa::golden::switch_top1_method
