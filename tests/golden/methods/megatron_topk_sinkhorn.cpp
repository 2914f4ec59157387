// SPDX-License-Identifier: Apache-2.0
#include "golden/case.hpp"
#include "golden/runner.hpp"

#include <talpa/cpu/fill.hpp>
#include <talpa/cpu/group_loss.hpp>
#include <talpa/cpu/limit_experts.hpp>
#include <talpa/cpu/routing_sums.hpp>
#include <talpa/cpu/select.hpp>
#include <talpa/cpu/sinkhorn.hpp>
#include <talpa/losses/load_balance.hpp>
#include <talpa/losses/router_z.hpp>
#include <talpa/selectors/capacity.hpp>
#include <talpa/selectors/sinkhorn.hpp>
#include <talpa/selectors/top_k.hpp>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

namespace talpa::golden::megatron_topk_sinkhorn_method {

namespace {

using logit_matrix = matrix<double, cpu>;

template <class Selector>
routing<double, cpu> route(context<cpu>& ctx, const Selector& selector, const logit_matrix& u) {
  routing<double, cpu> r(u.rows(), u.cols());
  ops::select(ctx, selector, u, {}, r.gates.view(), r.mask.view());
  return r;
}

logit_matrix bits(const routing<double, cpu>& r) {
  logit_matrix m(r.gates.rows(), r.gates.cols());
  for (index n = 0; n < m.rows(); ++n) {
    for (index e = 0; e < m.cols(); ++e) m(n, e) = r.view().on(n, e) ? 1.0 : 0.0;
  }
  return m;
}

template <class Selector>
void compare_gates(const golden_case& c, checker& check, const Selector& selector,
                   const logit_matrix& u, const routing<double, cpu>& r) {
  context<cpu> ctx;
  check.equal("outputs.weights", r.gates, float32_inside);
  logit_matrix dlogits(u.rows(), u.cols());
  ops::select_backward(ctx, selector, u, r.gates.view(), r.mask.view(),
                       c.at("inputs.upstream", {u.rows(), u.cols()}).rows(), dlogits.view());
  check.equal("grads.logits", dlogits, float32_inside);
}

template <class Selector>
void compare_weights(const golden_case& c, checker& check, const Selector& selector,
                     const logit_matrix& u) {
  context<cpu> ctx;
  const routing<double, cpu> r = route(ctx, selector, u);
  check.equal("outputs.map", bits(r), {});
  compare_gates(c, check, selector, u, r);
}

/// The original takes the largest of a 0/1 map, so which of the tokens that ask for an expert it
/// keeps is what its sorting makes of equal numbers, and not always the earliest. Determined are
/// how many it keeps, and everything else for the tokens that it kept.
template <class Selector>
void compare_kept(const golden_case& c, checker& check, const Selector& selector,
                  const logit_matrix& u) {
  context<cpu> ctx;
  const logit_matrix ours = bits(route(ctx, selector, u));
  const logit_matrix theirs = c.at("outputs.map", {u.rows(), u.cols()}).rows();
  const logit_matrix asked = bits(route(ctx, top_k<gate::raw>{.k = c.integer("hparams.top_k")}, u));
  std::string problem;
  routing<double, cpu> r(u.rows(), u.cols());
  for (index e = 0; e < u.cols(); ++e) {
    double more = 0.0;
    for (index n = 0; n < u.rows(); ++n) {
      more += theirs(n, e) - ours(n, e);
      if (theirs(n, e) > asked(n, e)) problem = "a token that did not ask was taken";
      if (theirs(n, e) != 0.0) r.mask(n, e / mask_word_bits) |= 1u << (e % mask_word_bits);
    }
    if (more != 0.0) problem = "expert " + std::to_string(e) + " keeps another number of tokens";
  }
  check.account("outputs.map", problem);
  ops::replay(ctx, selector, u, {}, r.mask.view(), r.gates.view());
  compare_gates(c, check, selector, u, r);
}

template <class Weight>
void compare_limited(const golden_case& c, checker& check, index k, const logit_matrix& u) {
  if (!c.has("hparams.capacity_factor")) {
    // No limit: a share of E leaves room for every token.
    const auto factor = static_cast<double>(u.cols());
    compare_weights(c, check, capacity_top_k<Weight>{.k = k, .capacity = {factor}}, u);
    return;
  }
  const capacity::share share{c.number("hparams.capacity_factor")};
  if (c.text("hparams.drop_policy") == "position") {
    compare_kept(c, check, capacity_top_k<Weight>{.k = k, .capacity = share}, u);
  } else {
    compare_weights(c, check,
                    capacity_top_k<Weight, overflow::by_probability>{.k = k, .capacity = share}, u);
  }
}

/// Value and gradient of a loss on what top_k chose before any limit.
template <class Loss>
void compare_loss(checker& check, const std::string& name, const std::string& short_name,
                  const Loss& loss, double coefficient, const routing<double, cpu>& all,
                  const logit_matrix& u) {
  context<cpu> ctx;
  const routed_view<double, cpu> layer{u.view(), all.view()};
  const auto found = loss.forward(ctx, layer);
  logit_matrix dvalue(1, 1), dlogits(u.rows(), u.cols()), dgates = dlogits;
  dvalue(0, 0) = coefficient;
  loss.backward(ctx, layer, found, dvalue, {dlogits.view(), dgates.view()}, grad_mode::overwrite);
  check.equal("outputs." + name, coefficient * found.value(0, 0), float32_inside);
  check.equal("grads.logits_from_" + short_name, dlogits, float32_inside);
}

void compare_sinkhorn(checker& check, index k, const logit_matrix& u) {
  context<cpu> ctx;
  const sinkhorn selector{.k = k};
  const index experts = u.cols();
  vector<double, cpu> row(u.rows());
  logit_matrix column(1, experts), plan(u.rows(), experts);
  ops::sinkhorn(ctx, u.view(), {}, selector.tolerance, selector.iterations, row.view(),
                column.view());
  for (index n = 0; n < u.rows(); ++n) {
    for (index e = 0; e < experts; ++e) plan(n, e) = std::exp(u(n, e) + row[n] + column(0, e));
  }
  check.equal("outputs.sinkhorn", plan, float32_inside);
  const routing<double, cpu> r = route(ctx, selector, u);
  logit_matrix chosen(u.rows(), k);
  for (index n = 0; n < u.rows(); ++n) {
    std::vector<index> on;
    for (index e = 0; e < experts; ++e) {
      if (r.view().on(n, e)) on.push_back(e);
    }
    std::stable_sort(on.begin(), on.end(),
                     [&](index a, index b) { return plan(n, a) > plan(n, b); });
    for (index i = 0; i < k; ++i) {
      chosen(n, i) = static_cast<double>(on[static_cast<std::size_t>(i)]);
    }
  }
  check.equal("outputs.sinkhorn_experts", chosen, {});
}

void megatron(const golden_case& c, checker& check) {
  const logit_matrix u = c.at("inputs.logits").rows();
  const index k = c.integer("hparams.top_k");
  if (c.flag("hparams.pre_softmax")) {
    compare_limited<gate::raw>(c, check, k, u);
  } else {
    compare_limited<gate::softmax_selected>(c, check, k, u);
  }
  context<cpu> ctx;
  const routing<double, cpu> all = route(ctx, top_k<gate::raw>{.k = k}, u);
  logit_matrix counts(1, u.cols());
  const logit_matrix on = bits(all);
  for (index i = 0; i < on.size(); ++i) counts(0, i % u.cols()) += on.data()[i];
  check.equal("outputs.tokens_per_expert", counts, {});
  compare_loss(check, "balance", "balance",
               load_balance<balance::per_selection, balance::per_layer>{},
               c.number("hparams.aux_coeff"), all, u);
  compare_loss(check, "z_loss", "z", router_z{}, c.number("hparams.z_coeff"), all, u);
  compare_sinkhorn(check, k, u);
}

const registration entry("routers/megatron_topk_sinkhorn", megatron);

}  // namespace

}  // namespace talpa::golden::megatron_topk_sinkhorn_method
