// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/experts/lora.hpp>
#include <talpa/layers/mole_linear.hpp>
#include <talpa/losses/entropy.hpp>
#include <talpa/losses/load_balance.hpp>
#include <talpa/losses/losses.hpp>
#include <talpa/scorers/linear_scorer.hpp>
#include <talpa/selectors/dynamic_entropy.hpp>

namespace talpa::presets {

/// DynMoLE: top-p routing that sends a token to all experts where the router is unsure of it.
///
/// Numbers: Tsallis entropy q = 1.1 with the code's shift 1e-5, threshold 0.9, top-p 0.75 without
/// the crossing expert, at least 2 experts, gates not renormalised; 6 experts, r = 24, alpha = 48,
/// dropout 0.05, on the feed-forward maps.
/// Source: Li et al. 2025 (arXiv 2504.00661) and its code.
inline constexpr mole_linear<router<linear_scorer, dynamic_entropy<entropy::tsallis, gate::raw>>,
                             lora>
    dyn_mole{.router = {.selector = {.p = 0.75,
                                     .min_k = 2,
                                     .threshold = 0.9,
                                     .entropy = {.q = 1.1, .epsilon = 1e-5}}},
             .expert = {.rank = 24, .alpha = 48.0, .dropout = 0.05},
             .experts = 6};

/// Mean entropy with 1e-2 and soft-mass balance with 1e-3, both over all layers together. Unlike
/// the code, the entropy leaves out padding.
inline constexpr losses dyn_mole_losses{
    term{1e-2,
         entropy_loss<entropy::tsallis, balance::pooled>{.entropy = {.q = 1.1, .epsilon = 1e-5}}},
    term{1e-3, load_balance<balance::soft_mass, balance::pooled>{}}};

}  // namespace talpa::presets
