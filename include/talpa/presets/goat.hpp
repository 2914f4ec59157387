// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/experts/lora.hpp>
#include <talpa/layers/mole_linear.hpp>
#include <talpa/layers/svd_segments.hpp>
#include <talpa/losses/load_balance.hpp>
#include <talpa/losses/losses.hpp>
#include <talpa/scorers/linear_scorer.hpp>
#include <talpa/selectors/top_k.hpp>

#include <cmath>

namespace talpa::presets {

/// GOAT for maps of D = `inputs` columns: top-2 of 8 LoRA experts with renormalised gates, the
/// scale of the experts made for D. After init call begin_as_segments with goat_segments on the
/// base and the bank.
///
/// Numbers: rank 8 in all, 1 an expert, scale sqrt(3 eta D / R) with eta = 1, dropout 0.05,
/// Kaiming router.
/// Source: Fan et al. 2025 (arXiv 2502.16894) and the scripts of its code.
inline mole_linear<router<linear_scorer, top_k<gate::renormalised>>, lora> goat(index inputs) {
  constexpr index rank = 1;
  return {.router = {.selector = {.k = 2}},
          .expert = {.rank = rank,
                     .alpha = std::sqrt(3.0 * static_cast<double>(inputs * rank)),
                     .dropout = 0.05},
          .experts = 8};
}

/// rho = 10; the base gives up the mean of the experts.
inline constexpr svd_segments goat_segments{.rho = 10.0, .correction = 1.0};

/// Balance per layer, k at its best, coefficient 1e-3.
inline constexpr losses goat_losses{
    term{1e-3, load_balance<balance::per_rank, balance::per_layer>{}}};

}  // namespace talpa::presets
