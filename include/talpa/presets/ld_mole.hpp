// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/experts/lora.hpp>
#include <talpa/layers/mole_linear.hpp>
#include <talpa/losses/load_balance.hpp>
#include <talpa/losses/losses.hpp>
#include <talpa/scorers/linear_scorer.hpp>
#include <talpa/scorers/mlp_scorer.hpp>
#include <talpa/selectors/sparsegen.hpp>

namespace talpa::presets {

/// LD-MoLE: gates are a sparse projection whose sharpness is learned for each token.
///
/// Numbers: 8 experts, r = 8, alpha = 16, dropout 0.1; lambda from an MLP of 512 hidden units with
/// biases that start at -2.5. The paper shares this MLP between all maps of one input width; here
/// each layer has its own.
/// Source: Zhuang et al. 2025 (arXiv 2509.25684) and its code.
inline constexpr mole_linear<router<linear_scorer, sparsegen<mlp_scorer<relu>>>, lora> ld_mole{
    .router = {.selector = {.epsilon = 0.01,
                            .control = {.hidden = 512, .bias = true, .initial_bias = -2.5}}},
    .expert = {.rank = 8, .alpha = 16.0, .dropout = 0.1},
    .experts = 8};

/// Balance of the gates with weight 1, as the script of its code.
inline constexpr losses ld_mole_losses{
    term{1.0, load_balance<balance::per_selection, balance::per_layer, affinity::gates>{}}};

}  // namespace talpa::presets
