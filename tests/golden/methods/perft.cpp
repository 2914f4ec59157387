// SPDX-License-Identifier: Apache-2.0
#include "golden/methods/moe.hpp"
#include "golden/runner.hpp"

#include <talpa/cpu/pair_gates.hpp>
#include <talpa/experts/parallel_adapter.hpp>
#include <talpa/layers/perft_block.hpp>
#include <talpa/placements/dense.hpp>
#include <talpa/placements/embedded.hpp>
#include <talpa/placements/routed.hpp>

#include <string>
#include <utility>
#include <vector>

namespace talpa::golden::perft_method {

namespace {

/// A placement behind a router of its own, whose parameters and choice the file has.
template <class Placement>
concept with_router = requires(const Placement p) {
  p.router;
};

lora make_adapter(const golden_case& c, const lora&) {
  return {.rank = c.integer("hyper.r"), .alpha = c.number("hyper.alpha")};
}
parallel_adapter<> make_adapter(const golden_case& c, const parallel_adapter<>&) {
  return {.rank = c.integer("hyper.r")};
}
lora::params<double, cpu> adapter_params(const golden_case& c, const std::string& in, const lora&) {
  return {parameter<double, cpu>("A", c.at(in + ".A").rows()),
          parameter<double, cpu>("B", c.at(in + ".B").transposed_blocks())};
}
parallel_adapter<>::params<double, cpu> adapter_params(const golden_case& c, const std::string& in,
                                                       const parallel_adapter<>&) {
  return {parameter<double, cpu>("down", c.at(in + ".W1").rows()),
          parameter<double, cpu>("up", c.at(in + ".W2").transposed_blocks())};
}
void compare_adapters(const golden_case& c, checker& check, const std::string& in, index adapters,
                      const lora::params<double, cpu>& p) {
  check.equal("grads." + in + ".A", p.a.grad(), c.gradient());
  check.equal("grads." + in + ".B", in_blocks(p.b.grad(), adapters), c.gradient());
}
void compare_adapters(const golden_case& c, checker& check, const std::string& in, index adapters,
                      const parallel_adapter<>::params<double, cpu>& p) {
  check.equal("grads." + in + ".W1", p.down.grad(), c.gradient());
  check.equal("grads." + in + ".W2", in_blocks(p.up.grad(), adapters), c.gradient());
}

/// softmax(logits) of the chosen experts [T][K], as the file has them before any renormalisation.
matrix<double, cpu> probabilities_of(const routed_view<double, cpu>& routed, const tensor& chosen) {
  matrix<double, cpu> p(chosen.dim(0), chosen.dim(1));
  for (index n = 0; n < p.rows(); ++n) {
    double most = routed.logits(n, 0), sum = 0.0;
    for (index e = 1; e < routed.logits.cols; ++e) most = std::max(most, routed.logits(n, e));
    for (index e = 0; e < routed.logits.cols; ++e) sum += std::exp(routed.logits(n, e) - most);
    for (index i = 0; i < p.cols(); ++i) {
      const auto e = static_cast<index>(chosen.data[static_cast<std::size_t>(n * p.cols() + i)]);
      p(n, i) = std::exp(routed.logits(n, e) - most) / sum;
    }
  }
  return p;
}

template <class Selector, class Placement, class Adapter>
void run(const golden_case& c, checker& check, const Selector& selector, const Placement& placement,
         const std::string& adapters_in) {
  using block = perft_block<moe<Selector>, Placement, Adapter>;
  const index experts = c.integer("hyper.E");
  const bool embedded = adapters_in == "experts.peft";
  const index adapters = embedded ? experts : c.integer("hyper.M");
  const matrix<double, cpu> x = c.at("inputs.x").rows(), dy = c.at("inputs.cotangent").rows();
  for (const strategy execution : {strategy::dense_masked, strategy::grouped}) {
    const block layer{.base = {.router = {.selector = selector},
                               .expert = {.hidden = c.integer("hyper.F")},
                               .experts = experts},
                      .placement = placement,
                      .adapter = make_adapter(c, Adapter{}),
                      .adapters = adapters,
                      .execution = execution};
    typename block::template params<double, cpu> p;
    p.base = moe_params<Selector>(c, c.has("grads.gate"));
    p.adapter = adapter_params(c, "params." + adapters_in, Adapter{});
    if constexpr (with_router<Placement>) {
      p.placement.router.scorer.weight =
          parameter<double, cpu>("router.weight", c.at("params.peft_gate").rows());
    }
    context<cpu> ctx;
    matrix<double, cpu> y(x.rows(), x.cols()), dx(x.rows(), x.cols());
    const auto kept = layer.forward(ctx, p, x, y.view(), mode::training);
    check.equal("outputs.y", y, c.forward());
    check.equal("outputs.router_logits", kept.base.routed.logits, c.forward());
    check.account("outputs.base_topk_idx",
                  compare_experts(kept.base.routed, c.at("outputs.base_topk_idx"), false));
    balance_term base(ctx, kept.base.routed, c.number("hyper.aux_base"));
    const auto of_base = base.gradient();
    const double inner = inner_product(y, dy);
    double total = inner + c.number("hyper.aux_base") * base.value;
    check.equal("loss.inner_product", inner, c.forward());
    check.equal("loss.aux_base", base.value, c.forward());
    if constexpr (with_router<Placement>) {
      const tensor chosen = c.at("outputs.peft_topk_idx");
      check.equal("outputs.peft_logits", kept.placement.routed.logits, c.forward());
      check.account("outputs.peft_topk_idx", compare_experts(kept.placement.routed, chosen, false));
      check.equal("outputs.peft_topk_prob_raw", probabilities_of(kept.placement.routed, chosen),
                  c.forward());
      balance_term own(ctx, kept.placement.routed, c.number("hyper.aux_peft"));
      const auto of_own = own.gradient();
      check.equal("loss.aux_peft", own.value, c.forward());
      total += c.number("hyper.aux_peft") * own.value;
      layer.backward(ctx, p, kept, x, dy, dx.view(), grad_mode::overwrite, &of_own, &of_base);
      check.equal("grads.peft_gate", p.placement.router.scorer.weight.grad(), c.gradient());
    } else {
      layer.backward(ctx, p, kept, x, dy, dx.view(), grad_mode::overwrite, nullptr, &of_base);
    }
    check.equal("loss.total", total, c.forward());
    check.equal("grads.x", dx, c.gradient());
    if (c.has("grads.gate")) {
      check.equal("grads.gate", p.base.router.scorer.weight.grad(), c.gradient());
    }
    compare_adapters(c, check, adapters_in, adapters, p.adapter);
  }
}

template <class Selector, class Placement>
void with_adapter(const golden_case& c, checker& check, const Selector& selector,
                  const Placement& placement, const std::string& adapters_in) {
  if (c.text("hyper.adapter") == "LoRA") {
    run<Selector, Placement, lora>(c, check, selector, placement, adapters_in);
  } else {
    run<Selector, Placement, parallel_adapter<>>(c, check, selector, placement, adapters_in);
  }
}

/// Calls next(selector of the base): Mixtral renormalises, OLMoE where it says so.
template <class Next>
void with_selector(const golden_case& c, Next next) {
  const index k = c.integer("hyper.K");
  if (c.text("hyper.family") == "mixtral" || c.flag("hyper.norm_topk_prob")) {
    next(top_k<gate::renormalised>{.k = k});
  } else {
    next(top_k<gate::raw>{.k = k});
  }
}

void perft_r(const golden_case& c, checker& check) {
  with_selector(c, [&](auto selector) {
    auto own = selector;
    own.k = c.integer("hyper.Kp");
    using own_router = router<linear_scorer, decltype(own)>;
    with_adapter(c, check, selector, placement::routed<own_router>{{.selector = own}}, "peft");
  });
}
void perft_r_olmoe_asis(const golden_case& c, checker& check) {
  with_selector(c, [&](auto selector) {
    auto own = selector;
    own.k = c.integer("hyper.Kp");
    using own_router = router<linear_scorer, decltype(own)>;
    with_adapter(c, check, selector, placement::base_weighted<own_router>{{.selector = own}},
                 "peft");
  });
}
void perft_e(const golden_case& c, checker& check) {
  with_selector(c, [&](auto selector) {
    with_adapter(c, check, selector, placement::embedded{}, "experts.peft");
  });
}
void perft_sd(const golden_case& c, checker& check) {
  with_selector(c, [&](auto selector) {
    if (c.integer("hyper.M") == 1) {
      with_adapter(c, check, selector, placement::single{}, "peft");
    } else {
      with_adapter(c, check, selector, placement::dense{}, "peft");
    }
  });
}

const registration entries[] = {{"perft/perft_r", perft_r},
                                {"perft/perft_r_olmoe", perft_r},
                                {"perft/perft_r_olmoe_asis", perft_r_olmoe_asis},
                                {"perft/perft_e", perft_e},
                                {"perft/perft_sd", perft_sd}};

}  // namespace

}  // namespace talpa::golden::perft_method
