// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/experts/lora.hpp>
#include <talpa/layers/mole_linear.hpp>
#include <talpa/losses/load_balance.hpp>
#include <talpa/losses/losses.hpp>
#include <talpa/scorers/linear_scorer.hpp>
#include <talpa/scorers/mixture_of_routers.hpp>
#include <talpa/selectors/top_k.hpp>

namespace talpa::presets {

/// Mixture of Routers: several routers choose experts together, weighed by a main router.
///
/// Numbers: no code is public and the paper's were not readable: 3 sub-routers, all of them kept,
/// mixed as probabilities, top-2 renormalised are our reading; rank and alpha are those of MoLA.
/// Source: Zhang et al. 2025 (arXiv 2503.23362).
inline constexpr mole_linear<
    router<mixture_of_routers<mix::probability, linear_scorer>, top_k<gate::renormalised>>, lora>
    mor{.router = {.scorer = {.sub_routers = 3}, .selector = {.k = 2}},
        .expert = {.rank = 8, .alpha = 16.0},
        .experts = 8};

/// Balance of the mixed probabilities with 1e-3.
inline constexpr losses mor_losses{
    term{1e-3, load_balance<balance::per_selection, balance::per_layer>{}}};

}  // namespace talpa::presets
