// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/autograd/initialise.hpp>
#include <talpa/autograd/parameter.hpp>
#include <talpa/core/index.hpp>
#include <talpa/core/matrix.hpp>
#include <talpa/core/random.hpp>
#include <talpa/core/transfer.hpp>

#include <string>

// What layers with a router are fed with, and how some experts are made to be wanted by most
// tokens, on every backend.

namespace talpa::bench {

/// What the tokens of a line are like.
struct token_kind {
  int deviation = 1;  ///< of the elements of x
  int skew = 0;       ///< deviation of the experts' mean logits
};
/// As routers are initialised, with deviation 1 most tokens are uncertain, with 5 few are; with 2
/// logits are about as normal as those of the benchmarks of selectors, and skewed as these.
inline constexpr token_kind even_tokens{1, 0}, certain_tokens{5, 0}, skewed_tokens{2, 2};
inline constexpr token_kind token_kinds[] = {even_tokens, certain_tokens, skewed_tokens};

/// What names say of it.
inline std::string kind_name(const token_kind& kind) {
  return "/x:" + std::to_string(kind.deviation) +
         (kind.skew != 0 ? "/skew:" + std::to_string(kind.skew) : std::string());
}

/// Tokens with a skew begin with a one, by which a row of a router gives its expert a mean logit.
inline matrix<float, cpu> tokens_of_kind(index tokens, index width, const token_kind& kind,
                                         generator& random) {
  matrix<float, cpu> x(tokens, width);
  fill_normal(x.view(), kind.deviation, random);
  for (index n = 0; kind.skew != 0 && n < tokens; ++n) x(n, 0) = 1.0f;
  return x;
}

/// Mean logits [1, E].
inline matrix<float, cpu> mean_logits(index experts, const token_kind& kind, generator& random) {
  matrix<float, cpu> mean(1, experts);
  fill_normal(mean.view(), kind.skew, random);
  return mean;
}

/// Adds mean logits to rows [E, D] that score tokens.
template <class B>
void add_mean_logits(parameter<float, B>& rows, const matrix<float, cpu>& mean) {
  matrix<float, cpu> weight = to_host(rows.value());
  for (index e = 0; e < weight.rows(); ++e) weight(e, 0) += mean(0, e);
  to_device(weight.view(), rows.value());
}
/// The same to the parameters of a linear scorer, or of all sub-routers of a mixture.
template <class Params>
void add_mean_logits(Params& scorer, const matrix<float, cpu>& mean) {
  if constexpr (requires { scorer.sub; }) {
    for (auto& router : scorer.sub) add_mean_logits(router, mean);
  } else {
    add_mean_logits(scorer.weight, mean);
  }
}

/// The routing of which lines show the load: that of adapters with a router of their own, else of
/// what they adapt, else of the layer.
template <class Saved>
auto routing_of(const Saved& kept) {
  if constexpr (requires { kept.placement.routed; }) {
    return kept.placement.routed;
  } else if constexpr (requires { kept.base.routed; }) {
    return kept.base.routed;
  } else {
    return kept.routed;
  }
}

}  // namespace talpa::bench
