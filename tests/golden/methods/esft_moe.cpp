// SPDX-License-Identifier: Apache-2.0
#include "golden/methods/moe.hpp"
#include "golden/runner.hpp"

#include <talpa/selectors/biased_top_k.hpp>

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace talpa::golden::esft_moe_method {

namespace {

/// The shared expert of a case: a bank of one.
swiglu::params<double, cpu> shared_bank(const golden_case& c) {
  tensor down = c.at("params.shared.down_proj");
  down.shape.insert(down.shape.begin(), 1);
  swiglu::params<double, cpu> p;
  p.gate = parameter<double, cpu>("gate", c.at("params.shared.gate_proj").rows());
  p.up = parameter<double, cpu>("up", c.at("params.shared.up_proj").rows());
  p.down = parameter<double, cpu>("down", down.transposed_blocks());
  p.freeze();
  return p;
}

/// Empty when each token has the file's experts, and no other.
std::string compare_sets(const routed_view<double, cpu>& routed, const tensor& chosen) {
  const matrix<std::uint32_t, cpu> mask = mask_of(chosen, routed.logits.cols);
  for (index n = 0; n < mask.rows(); ++n) {
    for (index w = 0; w < mask.cols(); ++w) {
      if (mask(n, w) != routed.routing.mask(n, w)) {
        return "token " + std::to_string(n) + " has other experts";
      }
    }
  }
  return {};
}

template <class Pooling, class Selector>
void run(const golden_case& c, checker& check, const Selector& selector) {
  const index experts = c.integer("hyper.E"), k = c.integer("hyper.K");
  const index hidden = c.integer("hyper.F");
  const bool training = c.flag("hyper.training");
  const bool normalised = std::same_as<Selector, top_k<gate::renormalised>>;
  const moe<Selector> layer{
      .router = {.selector = selector},
      .expert = {.hidden = hidden},
      .experts = experts,
      .shared = {.hidden = hidden * c.integer("hyper.shared")},
      .shared_experts = c.integer("hyper.shared") > 0 ? 1 : 0,
      // The original scales what it does not normalise.
      .scale = c.has("hyper.scale") && !normalised ? c.number("hyper.scale") : 1.0};
  auto p = moe_params<Selector>(c, false);
  if constexpr (biased_selector<Selector>) {
    p.router.expert_bias = parameter<double, cpu>("expert_bias", matrix<double, cpu>(1, experts));
    p.router.expert_bias.freeze();
  }
  if (layer.shared_experts > 0) p.shared = shared_bank(c);
  std::vector<index> trained;
  for (const double e : c.at("hyper.train_experts").data) trained.push_back(static_cast<index>(e));
  layer.expert.train_experts(p.expert, trained);

  const matrix<double, cpu> x = c.at("inputs.x").rows(), dy = c.at("inputs.cotangent").rows();
  const tensor chosen = c.at("outputs.topk_idx");
  batch_info<double, cpu> batch;
  batch.sequence_length = c.integer("hyper.L");
  matrix<double, cpu> y(x.rows(), x.cols()), dx(x.rows(), x.cols());
  context<cpu> ctx;
  const auto kept = layer.forward(ctx, p, x, y.view(), mode::training, batch);
  check.equal("outputs.y", y, c.forward());
  check.equal("loss.inner_product", inner_product(y, dy), c.forward());
  check.account("outputs.topk_idx", compare_sets(kept.routed, chosen));
  matrix<double, cpu> weight(x.rows(), k);
  for (index i = 0; i < weight.size(); ++i) {
    const auto e = static_cast<index>(chosen.data[static_cast<std::size_t>(i)]);
    weight.data()[i] = kept.applied.gates(i / k, e);
  }
  check.equal("outputs.topk_weight", weight, c.forward());

  const load_balance<balance::per_target, Pooling> loss{.fraction = {.k = k}};
  const auto value = loss.forward(ctx, kept.routed);
  const double alpha = c.number("hyper.alpha");
  if (training) check.equal("outputs.aux_loss", alpha * value.value(0, 0), c.forward());
  matrix<double, cpu> upstream(1, 1), dlogits(x.rows(), experts), dgates(x.rows(), experts);
  upstream(0, 0) = training ? alpha : 0.0;
  const routed_gradient<double, cpu> from_loss{dlogits.view(), dgates.view()};
  loss.backward(ctx, kept.routed, value, upstream, from_loss, grad_mode::overwrite);
  layer.backward(ctx, p, kept, x, dy, dx.view(), grad_mode::overwrite, &from_loss);
  check.equal("grads.x", dx, c.gradient());
  const index width = layer.output_width(p);
  const std::pair<const char*, const parameter<double, cpu>*> banks[] = {
      {"gate_proj", &p.expert.gate}, {"up_proj", &p.expert.up}, {"down_proj", &p.expert.down}};
  for (std::size_t i = 0; i < trained.size(); ++i) {
    for (const auto& [which, bank] : banks) {
      const matrix<double, cpu> block(
          bank->grad().row_range(static_cast<index>(i) * hidden, hidden));
      const std::string field = "grads.experts." + std::to_string(trained[i]) + "." + which;
      if (bank == &p.expert.down) {
        check.equal(field, in_blocks(block, 1), c.gradient());
      } else {
        check.equal(field, block, c.gradient());
      }
    }
  }
  // Nothing else has memory for a gradient.
  index stored = 0;
  p.visit([&](const parameter<double, cpu>& q) { stored += q.trained_size(); });
  check.account(
      "memory of gradients",
      stored == 3 * hidden * width * static_cast<index>(trained.size()) ? "" : "too much");
}

void esft_moe(const golden_case& c, checker& check) {
  const auto with = [&](auto selector) {
    if (c.flag("hyper.seq_aux")) {
      run<balance::per_sequence>(c, check, selector);
    } else {
      run<balance::per_layer>(c, check, selector);
    }
  };
  const index k = c.integer("hyper.K");
  if (c.has("hyper.method")) {
    with(biased_top_k<score::softmax, gate::raw>{.k = k,
                                                 .n_groups = c.integer("hyper.n_group"),
                                                 .topk_groups = c.integer("hyper.topk_group"),
                                                 .group_best = 1});
  } else if (c.flag("hyper.norm") && k > 1) {
    with(top_k<gate::renormalised>{.k = k});
  } else {
    with(top_k<gate::raw>{.k = k});
  }
}

const registration entry{"perft/esft_moe", esft_moe};

}  // namespace

}  // namespace talpa::golden::esft_moe_method
