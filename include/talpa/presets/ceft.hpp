// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/experts/adapted_glu.hpp>
#include <talpa/experts/glu_ffn.hpp>
#include <talpa/experts/lora.hpp>
#include <talpa/layers/moe_ffn.hpp>
#include <talpa/scorers/linear_scorer.hpp>
#include <talpa/selectors/top_k.hpp>

namespace talpa::presets {

/// CEFT on OLMoE-1B-7B: LoRA on the three matrices of the experts that Router Lens chose, the
/// router frozen. Make the params by expert.adapt on the networks of the base and call
/// expert.train_experts with the chosen ones, 8 of 64 a layer.
///
/// Numbers: rank 8, alpha 32, dropout 0.1, which its code draws anew for each matrix and this draws
/// once for the input of the experts. The loss is that of the completion alone
/// (completion_labels), without balance.
/// Source: Router Lens (arXiv 2508.19594) and its code.
inline constexpr moe_ffn<router<linear_scorer, top_k<gate::raw>>, adapted_glu<swiglu, lora>> ceft{
    .router = {.selector = {.k = 8}},
    .expert = {.network = {.hidden = 1024}, .adapter = {.rank = 8, .alpha = 32.0, .dropout = 0.1}},
    .experts = 64};

}  // namespace talpa::presets
