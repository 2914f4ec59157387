// SPDX-License-Identifier: Apache-2.0
#include "cuda/laboratory/presets.cuh"

#include <talpa/presets/factor_llm.hpp>

namespace talpa::bench {
namespace {

constexpr index tokens = 4096, width = 768;

std::string line_name(const std::string& name, const std::string& sizes, const token_kind& kind) {
  return preset_name(name, "step", tokens, width, sizes, kind) + "/f32/gpu";
}
/// Whether a line of a preset is wanted: its parameters take long to make.
bool wants(const laboratory& lab, const std::string& name, const std::string& sizes) {
  for (const token_kind& kind : token_kinds) {
    if (lab.wants(line_name(name, sizes, kind))) return true;
  }
  return false;
}

/// The lines of a layer with one set of parameters; `skew(kind)` gives its routers mean logits.
template <class Layer, class Params, class Frozen, class FrozenParams, class Skew>
void lines(laboratory& lab, const std::string& name, const std::string& sizes, const Layer& layer,
           Params& params, index routed, const Frozen& frozen, FrozenParams& frozen_params,
           const Skew& skew) {
  for (const token_kind& kind : token_kinds) {
    const std::string full = line_name(name, sizes, kind);
    // Routers stay skewed: kinds with a skew come last.
    if (kind.skew != 0) skew(kind);
    if (!lab.wants(full)) continue;
    lab.attempt(full, [&] {
      measure_step(lab, full, layer, params, routed, frozen, frozen_params, tokens, width, kind);
    });
  }
}

void mix_lora_lines(laboratory& lab) {
  constexpr auto layer = presets::mix_lora;
  constexpr index hidden = 2048;
  const std::string sizes = "/H:" + std::to_string(hidden) + ranked_sizes(layer);
  if (!wants(lab, "mix_lora", sizes)) return;
  const dense_ffn<> network;
  generator random(1);
  auto base = network.init<float, gpu>(width, hidden, random, "base.");
  base.freeze();
  auto params = layer.init<float, gpu>(std::move(base), random);
  lines(lab, "mix_lora", sizes, layer, params, layer.experts, network, params.base,
        [&](const token_kind& kind) {
          add_mean_logits(params.router.scorer, mean_logits(layer.experts, kind, random));
        });
}

/// The neurons of a dense network as frozen experts, beside that network.
void factor_llm_lines(laboratory& lab) {
  constexpr auto layer = presets::factor_llm;
  constexpr index hidden = 2048;
  const std::string sizes = network_sizes(hidden, layer.experts, 0, 0);
  if (!wants(lab, "factor_llm", sizes)) return;
  const dense_ffn<> network;
  generator random(1);
  auto dense = network.init<float, gpu>(width, hidden, random);
  dense.freeze();
  auto params = layer.borrow<float, gpu>(dense, random);
  lines(lab, "factor_llm", sizes, layer, params, layer.experts, network, dense,
        [&](const token_kind& kind) {
          add_mean_logits(params.router.scorer, mean_logits(layer.experts, kind, random));
        });
}

template <class Block>
void perft_lines(laboratory& lab, const std::string& name, const Block& block) {
  const std::string sizes = network_sizes(block.base.expert.hidden, block.base.experts,
                                          block.adapters, block.adapter.rank);
  if (!wants(lab, name, sizes)) return;
  generator random(1);
  auto base = block.base.template init<float, gpu>(width, random, "base.");
  base.freeze();
  auto params = block.template init<float, gpu>(std::move(base), random);
  constexpr bool routes = requires { params.placement.router; };
  const auto skew = [&](const token_kind& kind) {
    add_mean_logits(params.base.router.scorer, mean_logits(block.base.experts, kind, random));
    if constexpr (routes) {
      add_mean_logits(params.placement.router.scorer, mean_logits(block.adapters, kind, random));
    }
  };
  lines(lab, name, sizes, block, params, routes ? block.adapters : block.base.experts, block.base,
        params.base, skew);
}

/// Of layers whose experts train, beside frozen networks of the same sizes.
template <class Layer, class Frozen>
void trained_lines(laboratory& lab, const std::string& name, const std::string& sizes,
                   const Layer& layer, const Frozen& frozen) {
  if (!wants(lab, name, sizes)) return;
  generator random(1);
  auto params = layer.template init<float, gpu>(width, random);
  auto frozen_params = frozen.template init<float, gpu>(width, random);
  frozen_params.freeze();
  lines(lab, name, sizes, layer, params, layer.experts, frozen, frozen_params,
        [&](const token_kind& kind) {
          const auto mean = mean_logits(layer.experts, kind, random);
          add_mean_logits(params.router.scorer, mean);
          add_mean_logits(frozen_params.router.scorer, mean);
        });
}

}  // namespace

void network_preset_lines(laboratory& lab) {
  lab.attempt("mix_lora", [&] { mix_lora_lines(lab); });
  lab.attempt("factor_llm", [&] { factor_llm_lines(lab); });
  lab.attempt("perft_r", [&] { perft_lines(lab, "perft_r", presets::perft_r); });
  lab.attempt("perft_e", [&] { perft_lines(lab, "perft_e", presets::perft_e); });
  lab.attempt("perft_d", [&] { perft_lines(lab, "perft_d", presets::perft_d); });
  lab.attempt("perft_s", [&] { perft_lines(lab, "perft_s", presets::perft_s); });
  constexpr auto esft = presets::esft;
  lab.attempt("esft", [&] {
    trained_lines(lab, "esft", network_sizes(esft.expert.hidden, esft.experts, 0, 0), esft, esft);
  });
  constexpr auto ceft = presets::ceft;
  const presets::olmoe networks{
      .router = ceft.router, .expert = ceft.expert.network, .experts = ceft.experts};
  lab.attempt("ceft", [&] {
    trained_lines(
        lab, "ceft",
        network_sizes(ceft.expert.network.hidden, ceft.experts, 0, ceft.expert.adapter.rank), ceft,
        networks);
  });
}

}  // namespace talpa::bench
