// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "token_kinds.hpp"

#include <talpa/core/index.hpp>
#include <talpa/presets/ada_mole.hpp>
#include <talpa/presets/dyn_mole.hpp>
#include <talpa/presets/goat.hpp>
#include <talpa/presets/gw_moe.hpp>
#include <talpa/presets/hydra_lora.hpp>
#include <talpa/presets/ld_mole.hpp>
#include <talpa/presets/lora_moe.hpp>
#include <talpa/presets/mola.hpp>
#include <talpa/presets/mor.hpp>
#include <talpa/presets/re_moe.hpp>
#include <talpa/presets/smora.hpp>

#include <string>

// Which presets the benchmarks measure, and under which names, on every backend.

namespace talpa::bench {

/// `form` is what is done with the preset, `sizes` what its layer says of itself.
inline std::string preset_name(const std::string& name, const std::string& form, index tokens,
                               index width, const std::string& sizes, const token_kind& kind) {
  return "presets/" + name + "/" + form + "/N:" + std::to_string(tokens) +
         "/D:" + std::to_string(width) + sizes + kind_name(kind);
}
/// The sizes of a layer of low-rank experts.
template <class Layer>
std::string ranked_sizes(const Layer& layer) {
  return "/E:" + std::to_string(layer.experts) + "/R:" + std::to_string(layer.expert.rank);
}

template <class... Measured>
struct preset_list {};

/// What lines call a preset, and the layer for a map of `width` inputs.
namespace measured {

struct ada_mole {
  static constexpr const char* name = "ada_mole";
  static auto layer(index) { return presets::ada_mole; }
};
struct dyn_mole {
  static constexpr const char* name = "dyn_mole";
  static auto layer(index) { return presets::dyn_mole; }
};
struct goat {
  static constexpr const char* name = "goat";
  static auto layer(index width) { return presets::goat(width); }
};
struct gw_moe {
  static constexpr const char* name = "gw_moe";
  static auto layer(index) { return presets::gw_moe; }
};
struct hydra_lora {
  static constexpr const char* name = "hydra_lora";
  static auto layer(index) { return presets::hydra_lora; }
};
struct ld_mole {
  static constexpr const char* name = "ld_mole";
  static auto layer(index) { return presets::ld_mole; }
};
struct lora_moe {
  static constexpr const char* name = "lora_moe";
  static auto layer(index) { return presets::lora_moe; }
};
struct mola {
  static constexpr const char* name = "mola";
  static auto layer(index) { return presets::mola; }
};
struct mor {
  static constexpr const char* name = "mor";
  static auto layer(index) { return presets::mor; }
};
struct re_moe {
  static constexpr const char* name = "re_moe";
  static auto layer(index) { return presets::re_moe; }
};
struct smora {
  static constexpr const char* name = "smora";
  static auto layer(index) { return presets::smora; }
};

}  // namespace measured

/// Presets that adapt a linear map, by what their router decides from: a number a token, an
/// entropy, the k largest logits, logits with a bias, all of them.
using controlled_presets = preset_list<measured::ada_mole, measured::ld_mole>;
using entropy_presets = preset_list<measured::dyn_mole, measured::gw_moe>;
using top_k_presets = preset_list<measured::goat, measured::mola, measured::mor>;
using biased_presets = preset_list<measured::smora>;
using dense_presets = preset_list<measured::hydra_lora, measured::lora_moe, measured::re_moe>;

}  // namespace talpa::bench
