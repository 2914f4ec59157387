// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/experts/lora.hpp>
#include <talpa/layers/mole_linear.hpp>
#include <talpa/losses/localized_balance.hpp>
#include <talpa/losses/losses.hpp>
#include <talpa/scorers/linear_scorer.hpp>
#include <talpa/selectors/dense.hpp>

namespace talpa::presets {

/// LoRAMoE: a soft mixture of LoRA experts, of which one half is for tasks that lean on the
/// model's knowledge and the other for the rest.
///
/// Numbers: 8 experts, r = 4, alpha = 32, dropout 0.05, on the feed-forward maps.
/// Source: Dou et al. 2023 (arXiv 2312.09979) and its code.
inline constexpr mole_linear<router<linear_scorer, dense>, lora> lora_moe{
    .expert = {.rank = 4, .alpha = 32.0, .dropout = 0.05}, .experts = 8};

/// Localized balance by the label of each sequence. The weight is open: the script of its
/// code sets it to 0.
inline constexpr losses lora_moe_losses{term{1.0, localized_balance{.delta = 0.1}}};

}  // namespace talpa::presets
