// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/experts/shared_lora.hpp>
#include <talpa/layers/mole_linear.hpp>
#include <talpa/scorers/linear_scorer.hpp>
#include <talpa/selectors/dense.hpp>

namespace talpa::presets {

/// HydraLoRA: one A and four heads B, mixed for every token by a dense softmax router; no loss.
///
/// Numbers: rank 4, alpha 32 and four heads, as its code has them; how many heads suit a data set
/// k-means over it decides there.
/// Source: Tian et al. 2024 (arXiv 2404.19245) and its code.
inline constexpr mole_linear<router<linear_scorer, dense>, shared_a_lora> hydra_lora{
    .expert = {.rank = 4, .alpha = 32.0}, .experts = 4};

}  // namespace talpa::presets
