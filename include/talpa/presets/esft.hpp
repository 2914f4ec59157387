// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/experts/glu_ffn.hpp>
#include <talpa/layers/moe_ffn.hpp>
#include <talpa/losses/load_balance.hpp>
#include <talpa/losses/losses.hpp>
#include <talpa/scorers/linear_scorer.hpp>
#include <talpa/selectors/top_k.hpp>

namespace talpa::presets {

/// ESFT on DeepSeek-V2-Lite: the experts with most of a task's tokens train, everything else is
/// frozen. Choose them by cumulative_experts and call expert.train_experts.
///
/// Numbers: 6 of 64 SwiGLU experts of 1408 neurons with raw gates, 2 shared ones; shares of 0.2 of
/// the token score or 0.1 of the gate score a layer, 5 experts on average.
/// Source: Wang et al. 2024 (arXiv 2407.01906) and its code.
inline constexpr moe_ffn<router<linear_scorer, top_k<gate::raw>>> esft{
    .router = {.selector = {.k = 6}},
    .expert = {.hidden = 1408},
    .experts = 64,
    .shared = {.hidden = 1408},
    .shared_experts = 2};

/// Share of the score that the chosen experts have at least, by token score and by gate score.
inline constexpr double esft_token_share = 0.2, esft_gate_share = 0.1;

/// Balance of each sequence with 1e-3, as the base's code has it in training.
inline constexpr losses esft_losses{
    term{1e-3, load_balance<balance::per_selection, balance::per_sequence>{}}};

}  // namespace talpa::presets
