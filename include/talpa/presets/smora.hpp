// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/experts/lora.hpp>
#include <talpa/layers/mole_linear.hpp>
#include <talpa/scorers/linear_scorer.hpp>
#include <talpa/selectors/biased_top_k.hpp>

namespace talpa::presets {

/// SMoRA: every rank of one LoRA of rank 64 is an expert, 8 of which are on for a token: experts of
/// rank 1 are rows of the same A and B.
///
/// y = x W^T + s B (g * (A x)), g the softmax of the chosen ranks; a rank is chosen by its share
/// plus a bias, which update_bias moves towards equal load after each step, in the place of a loss.
/// Numbers: 8 of 64. s = alpha / 1 is that of the whole: in the place of a LoRA of rank R and alpha
/// a it is alpha = a / R. That the weights are shares of all ranks and not of the chosen alone, and
/// s = 2, are choices made here and not the paper's.
/// Source: Zhao et al. 2025 (arXiv 2501.15103).
inline constexpr mole_linear<router<linear_scorer, biased_top_k<score::softmax, gate::raw>>, lora>
    smora{.router = {.selector = {.k = 8}}, .expert = {.rank = 1, .alpha = 2.0}, .experts = 64};

}  // namespace talpa::presets
