// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/layers/parrot_block.hpp>

namespace talpa::presets {

/// Parrot as released: six experts, one a language; the identity is weighed by 0.1.
///
/// Numbers: hidden width 4096 and `moe_weight` 0.1 are those of the training scripts; the query is
/// the class token, row 0.
/// Source: Sun et al. 2025 (arXiv 2406.02539) and its code.
inline constexpr parrot_block parrot{.router = {.scorer = {.query_row = 0}},
                                     .expert = {.hidden = 4096},
                                     .experts = 6,
                                     .scale = 1.0,
                                     .residual = 0.1};

/// Parrot as the paper has it: y = x + alpha mixture, alpha = 0.1.
inline constexpr parrot_block parrot_paper{.router = {.scorer = {.query_row = 0}},
                                           .expert = {.hidden = 4096},
                                           .experts = 6,
                                           .scale = 0.1,
                                           .residual = 1.0};

}  // namespace talpa::presets
