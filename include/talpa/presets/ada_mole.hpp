// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/experts/lora.hpp>
#include <talpa/layers/mole_linear.hpp>
#include <talpa/losses/load_balance.hpp>
#include <talpa/losses/losses.hpp>
#include <talpa/scorers/linear_scorer.hpp>
#include <talpa/selectors/learned_threshold.hpp>

namespace talpa::presets {

/// AdaMoLE: experts above a threshold that is learned for each token.
///
/// Numbers: largest threshold 1 / E. Experts, rank and alpha are those of MoLA. The balance
/// averages the margin over the threshold instead of the probability, as its code does.
/// Source: Liu, Luo 2024 (arXiv 2405.00361) and its code.
inline constexpr mole_linear<router<linear_scorer, learned_threshold<linear_scorer>>, lora>
    ada_mole{.router = {.selector = {.relative = 1.0, .control = {.bias = true}}},
             .expert = {.rank = 8, .alpha = 16.0},
             .experts = 8};

/// Balance of the margins, with the coefficient of MoLA.
inline constexpr losses ada_mole_losses{
    term{1e-3, load_balance<balance::per_token, balance::per_layer, affinity::margin>{}}};

}  // namespace talpa::presets
