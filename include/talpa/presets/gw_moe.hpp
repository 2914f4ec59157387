// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/experts/lora.hpp>
#include <talpa/layers/mole_linear.hpp>
#include <talpa/losses/load_balance.hpp>
#include <talpa/losses/losses.hpp>
#include <talpa/scorers/linear_scorer.hpp>
#include <talpa/selectors/broadcast.hpp>
#include <talpa/selectors/top_k.hpp>

namespace talpa::presets {

/// GW-MoE over top-2: while training, tokens of which the router is unsure go to all experts.
///
/// Numbers: threshold 0.87 of ln E, the 1.8 nats of 8 experts that the scripts for summaries and
/// questions have (1.6 nats, 0.77, for GLUE). The paper adapts whole experts; rank and alpha are
/// those of MoLA.
/// Source: Wu et al. 2024 (arXiv 2406.12375) and its code.
inline constexpr mole_linear<router<linear_scorer, broadcast<top_k<gate::softmax_selected>>>, lora>
    gw_moe{.router = {.selector = {.inner = {.k = 2}, .threshold = 0.87}},
           .expert = {.rank = 8, .alpha = 16.0},
           .experts = 8};

/// Balance with 1e-3, over all layers together.
inline constexpr losses gw_moe_losses{
    term{1e-3, load_balance<balance::per_selection, balance::pooled>{}}};

}  // namespace talpa::presets
