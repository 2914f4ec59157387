// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/experts/lora.hpp>
#include <talpa/layers/mole_linear.hpp>
#include <talpa/losses/load_balance.hpp>
#include <talpa/optim/sparsity_controller.hpp>
#include <talpa/scorers/linear_scorer.hpp>
#include <talpa/selectors/rectified.hpp>

namespace talpa::presets {

/// ReMoE: gates are rectified logits, and a loss whose coefficient is steered makes them sparse.
///
/// Numbers: one expert a token wanted on average, coefficient from 1e-8 by factors of 1.2. The
/// paper trains whole experts; their number, rank and alpha are those of MoLA.
/// Source: Wang et al. 2024 (arXiv 2412.14711) and its code.
inline constexpr mole_linear<router<linear_scorer, rectified>, lora> re_moe{
    .expert = {.rank = 8, .alpha = 16.0}, .experts = 8};

/// L1 of the gates, weighed by how much an expert is used; its coefficient is that of a copy of
/// re_moe_controller.
inline constexpr load_balance<balance::per_target, balance::per_layer, affinity::gates> re_moe_loss{
    .fraction = {.k = 1}};
inline constexpr sparsity_controller re_moe_controller{
    .k = 1.0, .factor = 1.2, .coefficient = 1e-8};

}  // namespace talpa::presets
