// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/experts/lora.hpp>
#include <talpa/experts/parallel_adapter.hpp>
#include <talpa/layers/moe_ffn.hpp>
#include <talpa/layers/perft_block.hpp>
#include <talpa/losses/load_balance.hpp>
#include <talpa/losses/losses.hpp>
#include <talpa/placements/dense.hpp>
#include <talpa/placements/embedded.hpp>
#include <talpa/placements/routed.hpp>
#include <talpa/scorers/linear_scorer.hpp>
#include <talpa/selectors/top_k.hpp>

namespace talpa::presets {

/// The base of these presets: OLMoE-1B-7B, 8 of 64 SwiGLU experts of 1024 neurons, raw gates. For
/// another base copy a preset and set its `base`.
using olmoe = moe_ffn<router<linear_scorer, top_k<gate::raw>>>;
inline constexpr olmoe olmoe_1b_7b{
    .router = {.selector = {.k = 8}}, .expert = {.hidden = 1024}, .experts = 64};

/// PERFT's adapters: LoRA of rank 16 with alpha = 2 rank on the input after 5 % dropout, begun as
/// its code does.
inline constexpr lora perft_adapter{
    .rank = 16, .alpha = 32.0, .dropout = 0.05, .init_a = lora_init::perft};

/// The other adapter of PERFT: a bottleneck of 16 with silu, of which 5 % is dropped before the
/// activation, begun as its code does.
inline constexpr parallel_adapter<silu> perft_parallel_adapter{
    .rank = 16, .dropout = 0.05, .init_factors = adapter_init::perft};

/// PERFT-R: 2 of 8 adapters beside the base, behind a router of their own.
///
/// Numbers: rank, alpha and dropout are the defaults of the code; 2 of 8 is the setting that its
/// logs report for Mixtral at two ranks. The adapter's gates are its own router's; see
/// placement::routed for what the released code does for OLMoE.
/// Source: Liu et al. 2024 (arXiv 2411.08212).
inline constexpr perft_block<olmoe, placement::routed<router<linear_scorer, top_k<gate::raw>>>,
                             lora>
    perft_r{.base = olmoe_1b_7b,
            .placement = {{.selector = {.k = 2}}},
            .adapter = perft_adapter,
            .adapters = 8};

/// PERFT-E: one adapter in each of the base's experts, behind the base's router.
inline constexpr perft_block<olmoe, placement::embedded, lora> perft_e{
    .base = olmoe_1b_7b, .adapter = perft_adapter, .adapters = 64};

/// PERFT-D: the sum of 4 adapters that are always on.
inline constexpr perft_block<olmoe, placement::dense, lora> perft_d{
    .base = olmoe_1b_7b, .adapter = perft_adapter, .adapters = 4};

/// PERFT-S: one adapter that is always on.
inline constexpr perft_block<olmoe, placement::single, lora> perft_s{
    .base = olmoe_1b_7b, .adapter = perft_adapter, .adapters = 1};

/// Balance of either router with 0.01 (0.02 for Mixtral), over all layers together. The base's term
/// stays although its router is frozen: its gradient reaches the adapters of earlier layers.
inline constexpr losses perft_losses{
    term{0.01, load_balance<balance::per_rank, balance::pooled>{}}};

}  // namespace talpa::presets
