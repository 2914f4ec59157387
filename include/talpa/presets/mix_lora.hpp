// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/layers/mole_ffn.hpp>
#include <talpa/losses/load_balance.hpp>
#include <talpa/losses/losses.hpp>
#include <talpa/scorers/linear_scorer.hpp>
#include <talpa/selectors/top_k.hpp>

namespace talpa::presets {

/// MixLoRA: two of eight copies of a frozen feed-forward network that differ by LoRA on each of its
/// matrices.
///
/// Numbers: r = 16, alpha = 32, dropout 0.05; the router of the code begins N(0, 0.02), this one as
/// linear_scorer does.
/// Source: Li et al. 2024 (arXiv 2404.15159) and its code.
inline constexpr mole_ffn<router<linear_scorer, top_k<gate::renormalised>>> mix_lora{
    .router = {.selector = {.k = 2}},
    .expert = {.rank = 16, .alpha = 32.0, .dropout = 0.05},
    .experts = 8};

/// Balance with 1e-3, over all layers together: 2 at perfect balance.
inline constexpr losses mix_lora_losses{
    term{1e-3, load_balance<balance::per_rank, balance::pooled>{}}};

}  // namespace talpa::presets
