// SPDX-License-Identifier: Apache-2.0
#include "golden/case.hpp"
#include "golden/runner.hpp"

#include <talpa/cpu/add.hpp>
#include <talpa/cpu/bias.hpp>
#include <talpa/cpu/copy.hpp>
#include <talpa/cpu/fill.hpp>
#include <talpa/cpu/gemm.hpp>
#include <talpa/cpu/group_loss.hpp>
#include <talpa/cpu/mix_logits.hpp>
#include <talpa/cpu/reduce.hpp>
#include <talpa/cpu/routing_sums.hpp>
#include <talpa/cpu/scale.hpp>
#include <talpa/cpu/select.hpp>
#include <talpa/cpu/softmax.hpp>
#include <talpa/layers/router.hpp>
#include <talpa/losses/load_balance.hpp>
#include <talpa/losses/router_z.hpp>
#include <talpa/scorers/linear_scorer.hpp>
#include <talpa/scorers/mixture_of_routers.hpp>
#include <talpa/selectors/top_k.hpp>

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

namespace talpa::golden::mor_method {

namespace {

using matrix_d = matrix<double, cpu>;

/// The k best experts of each token by descending score, ties to the lower index.
std::string compare_order(matrix_view<const double, cpu> joint, const tensor& chosen) {
  const index k = chosen.dim(1);
  for (index n = 0; n < joint.rows; ++n) {
    std::vector<index> order;
    for (index e = 0; e < joint.cols; ++e) order.push_back(e);
    std::stable_sort(order.begin(), order.end(),
                     [&](index a, index b) { return joint(n, a) > joint(n, b); });
    for (index j = 0; j < k; ++j) {
      const double expected = chosen.data[static_cast<std::size_t>(n * k + j)];
      if (static_cast<double>(order[static_cast<std::size_t>(j)]) != expected) {
        return "token " + std::to_string(n) + " has other experts";
      }
    }
  }
  return {};
}

template <class Mix, class Weight>
void run(const golden_case& c, checker& check) {
  using scorer = mixture_of_routers<Mix, linear_scorer>;
  using mor_router = router<scorer, top_k<Weight>>;
  const index experts = c.integer("hparams.num_experts"), k = c.integer("hparams.top_k");
  const index subs = c.integer("hparams.num_sub_routers"), m = c.integer("hparams.top_m");
  const matrix_d x = c.at("inputs.x").rows();
  const index n = x.rows(), d = x.cols();
  const matrix_d w_sub = c.at("inputs.w_sub", {subs, experts, d}).rows();
  const mor_router layer{.scorer = {.sub_routers = subs, .top_m = m}, .selector = {.k = k}};

  typename mor_router::template params<double, cpu> p;
  p.scorer.main.weight = parameter<double, cpu>("main", c.at("inputs.w_main", {subs, d}).rows());
  for (index r = 0; r < subs; ++r) {
    p.scorer.sub.emplace_back();
    p.scorer.sub.back().weight =
        parameter<double, cpu>("sub", matrix_d(w_sub.view().row_range(r * experts, experts)));
  }
  context<cpu> ctx;
  const auto clear = [&] { p.visit([&](parameter<double, cpu>& q) { q.zero_grad(ctx); }); };
  const auto sub_grad = [&] {
    matrix_d all(subs * experts, d);
    for (index r = 0; r < subs; ++r) {
      ops::copy(ctx, p.scorer.sub[static_cast<std::size_t>(r)].weight.grad(),
                all.view().row_range(r * experts, experts));
    }
    return all;
  };

  // Which of equal scores win is the implementation's choice: such a case goes on with the file's.
  const tensor chosen = c.at("outputs.experts", {n, k});
  const bool ties = c.flag("ties");
  matrix<std::uint32_t, cpu> recorded(n, mask_words(experts));
  for (index i = 0; i < chosen.size(); ++i) {
    const auto e = static_cast<index>(chosen.data[static_cast<std::size_t>(i)]);
    recorded(i / k, e / mask_word_bits) |= 1u << (e % mask_word_bits);
  }
  batch_info<double, cpu> batch;
  if (ties) batch.replay = recorded.view();
  const auto kept = layer.forward(ctx, p, experts, x, mode::training, batch);
  check.equal("outputs.main", kept.scorer.weights.gates, c.forward());
  matrix_d joint(n, experts);
  ops::softmax(ctx, kept.routed.logits, joint.view());
  check.equal("outputs.joint", joint, c.forward());
  check.account("outputs.experts", ties ? std::string() : compare_order(joint, chosen));
  check.equal("outputs.weights", kept.routed.routing.gates, c.forward());

  matrix_d dgates = c.at("inputs.upstream", {n, experts}).rows(), dx(n, d);
  layer.backward(ctx, p, kept, x, dgates.view(), dx.view(), grad_mode::overwrite, nullptr);
  check.equal("grads.x_from_weights", dx, c.gradient());
  check.equal("grads.w_sub_from_weights", sub_grad(), c.gradient());
  check.equal("grads.w_main_from_weights", p.scorer.main.weight.grad(), c.gradient());

  matrix_d one(1, 1), share(1, 1);
  one(0, 0) = 1.0;
  share(0, 0) = 1.0 / static_cast<double>(subs);
  const load_balance<balance::per_selection, balance::per_layer> balance_loss;
  {
    clear();
    const auto found = balance_loss.forward(ctx, kept.routed);
    check.equal("outputs.aux_balance", found.value(0, 0), c.forward());
    matrix_d dlogits(n, experts), none(n, experts), zero(n, experts);
    const routed_gradient<double, cpu> gradient{dlogits.view(), none.view()};
    balance_loss.backward(ctx, kept.routed, found, one, gradient, grad_mode::overwrite);
    layer.backward(ctx, p, kept, x, zero.view(), {}, grad_mode::ignore, &gradient);
    check.equal("grads.w_sub_from_balance", sub_grad(), c.gradient());
    check.equal("grads.w_main_from_balance", p.scorer.main.weight.grad(), c.gradient());
  }
  check.equal("outputs.aux_main",
              balance_loss.forward(ctx, scorer::main_view(kept.scorer)).value(0, 0), c.forward());
  {
    clear();
    double z = 0.0;
    matrix_d dsub(n, subs * experts), none(n, experts), zero(n, experts);
    for (index r = 0; r < subs; ++r) {
      const auto view = scorer::sub_view(ctx, kept.scorer, r);
      const auto found = router_z{}.forward(ctx, view);
      z += found.value(0, 0) * share(0, 0);
      router_z{}.backward(ctx, view, found, share,
                          {dsub.view().col_range(r * experts, experts), none.view()},
                          grad_mode::overwrite);
    }
    check.equal("outputs.z_loss", z, c.forward());
    layer.scorer.backward(ctx, p.scorer, kept.scorer, x, zero, {}, grad_mode::ignore,
                          {.dmain = {}, .dsub = dsub});
    check.equal("grads.w_sub_from_z", sub_grad(), c.gradient());
  }
}

void mor(const golden_case& c, checker& check) {
  const std::string space = c.text("hparams.combine");
  const bool renormalise = c.flag("hparams.renormalize");
  if (space == "prob") {
    renormalise ? run<mix::probability, gate::renormalised>(c, check)
                : run<mix::probability, gate::raw>(c, check);
  } else if (space == "logit") {
    renormalise ? run<mix::logit, gate::renormalised>(c, check)
                : run<mix::logit, gate::raw>(c, check);
  } else {
    throw malformed("'hparams.combine' is " + space);
  }
}

const registration entry("routers/mor", mor);

}  // namespace

}  // namespace talpa::golden::mor_method
