// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/layers/factored_ffn.hpp>
#include <talpa/losses/losses.hpp>
#include <talpa/losses/prior_approximate.hpp>
#include <talpa/losses/top_k_mass.hpp>

namespace talpa::presets {

/// FactorLLM 1R4E2K: the feed-forward network of a layer cut into four experts of which two work
/// for a token, behind a router with bias. Make the params by split(dense, contiguous_split(F, 4)):
/// F = 5632 in TinyLlama.
///
/// Numbers: E = 4 and k = 2 are those of the code, 1R4E1K is k = 1; the scale is 4 / 2, which the
/// code's integer division gives as well. Adam with lr 4e-5, betas (0.9, 0.95), weight decay 1e-5,
/// 500 steps of warm-up and cosine to 10000; the dense network, embeddings, attention and norms are
/// frozen.
/// Source: Zhao et al. 2024 (arXiv 2408.11855) and its code.
inline constexpr factored_ffn<> factor_llm{
    .router = {.scorer = {.bias = true}, .selector = {.k = 2}}, .experts = 4};

/// Weights of the router's terms in the code: prior-approximate 0.05, on a routing whose mask holds
/// the labels of factor_llm.label.
inline constexpr losses factor_llm_route_losses{term{0.05, prior_approximate{}}};
/// And balance 0.01, on the router's own.
inline constexpr losses factor_llm_losses{term{0.01, top_k_mass{}}};

}  // namespace talpa::presets
