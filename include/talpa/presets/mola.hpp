// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/experts/lora.hpp>
#include <talpa/layers/mole_linear.hpp>
#include <talpa/losses/load_balance.hpp>
#include <talpa/losses/losses.hpp>
#include <talpa/scorers/linear_scorer.hpp>
#include <talpa/selectors/top_k.hpp>

namespace talpa::presets {

/// MoLA: top-2 of LoRA experts with renormalised gates, on every linear map of a block.
///
/// Numbers: k = 2, r = 8, alpha = 16, dropout 0.05, Kaiming router and A. The number of experts
/// grows with depth, 2, 4, 6, 8 a quarter of the layers ("2468"): set `experts`.
/// Source: Gao et al. 2024 (arXiv 2402.08562) and its code.
inline constexpr mole_linear<router<linear_scorer, top_k<gate::renormalised>>, lora> mola{
    .router = {.selector = {.k = 2}},
    .expert = {.rank = 8, .alpha = 16.0, .dropout = 0.05},
    .experts = 8};

/// Balance per layer, summed over layers, coefficient 1e-3.
inline constexpr losses mola_losses{
    term{1e-3, load_balance<balance::per_selection, balance::per_layer>{}}};

}  // namespace talpa::presets
