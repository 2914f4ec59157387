// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/experts/glu_ffn.hpp>
#include <talpa/layers/moe_ffn.hpp>
#include <talpa/layers/router.hpp>
#include <talpa/scorers/cross_attention_scorer.hpp>
#include <talpa/selectors/dense.hpp>

namespace talpa {

/// Layer that mixes SwiGLU experts for all tokens of an image alike, by the text beside it:
/// y = scale sum_e w_e f_e(x) + residual x, w = softmax(G u) once a sequence, u the text that the
/// sequence's query token attends to.
///
/// A sequence is one image, its conditioning rows are the embedded text of its prompt. Images and
/// texts of different lengths go into one batch by the padding mask and by `present`; padding gets
/// the residual alone. The released code weighs the identity (scale 1, residual 0.1), the paper the
/// mixture (scale alpha, residual 1): see presets::parrot and presets::parrot_paper.
/// Backward, shapes, cost, determinism, errors: moe_ffn and cross_attention_scorer.
/// Edges: an empty text gives uniform weights.
/// Source: Parrot (arXiv 2406.02539). The paper speaks of the most relevant experts; its code mixes
/// all of them, and so does this.
using parrot_block = moe_ffn<router<cross_attention_scorer, dense>, swiglu>;

}  // namespace talpa
