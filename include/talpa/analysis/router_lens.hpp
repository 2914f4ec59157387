// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/check.hpp>
#include <talpa/routing/routing.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace talpa {

/// Chosen experts: one list a layer, in the order in which they were chosen.
using expert_selection = std::vector<std::vector<index>>;

/// Counts which experts the tokens of samples use, layer by layer: attach it to any routing.
///
/// A token counts unless it is padding or `answer` leaves it out. A sample is one sequence of a
/// batch; one without a token that counts is no sample. With n_s counted tokens in sample s,
///   counts_e = sum_s sum_n 1[e on for n], gate_mass_e = sum_s sum_n g_ne,
///   token_score_e = mean_s 1/n_s sum_n 1[e on for n] / k, gate_score_e = mean_s 1/n_s sum_n g_ne.
/// Shapes: scores [L, E], a row a layer.
/// Edges: a batch without tokens, or with padding only, adds nothing.
/// Cost: N E reads of host memory an add.
/// Determinism: sums in double, in the order of calls and tokens.
/// Throws: shape_error; value_error for a layer that does not exist, other numbers of experts, and
/// for scores while layers have counted different numbers of tokens, or none.
/// Source: Router Lens / CEFT (counts: all tokens of the samples, so long samples weigh more) and
/// ESFT (arXiv 2407.01906), section 3.3 (scores: samples weigh the same).
class router_lens {
 public:
  static constexpr const char* name = "router_lens";

  /// For `layers` routers over `experts` experts, `k` of them on a token.
  router_lens(index layers, index experts, index k) : k_(k) {
    check_at_least(name, "layers", layers, 1, "layers with a router");
    check_at_least(name, "experts", experts, 1, "experts of a layer");
    check_range(name, "k", k, 1, experts, "experts");
    for (matrix<double, cpu>* m : {&counts_, &mass_, &token_sum_, &gate_sum_}) {
      *m = matrix<double, cpu>(layers, experts);
    }
    tokens_.assign(static_cast<std::size_t>(layers), 0);
    samples_.assign(static_cast<std::size_t>(layers), 0);
  }

  index layers() const { return counts_.rows(); }
  index experts() const { return counts_.cols(); }
  /// Tokens and samples that layer l has counted.
  index tokens(index l) const { return tokens_[static_cast<std::size_t>(l)]; }
  index samples(index l) const { return samples_[static_cast<std::size_t>(l)]; }

  /// Adds what layer `layer` decided for a batch of sequences of `sequence_length` tokens (0: the
  /// batch is one). `padding` and `answer` [N] or empty: 0 for a token that does not count.
  template <class T>
  void add(index layer, const routing_view<T, cpu>& routing,
           vector_view<const std::uint8_t, cpu> padding = {},
           vector_view<const std::uint8_t, cpu> answer = {}, index sequence_length = 0) {
    const index tokens = routing.tokens();
    check_range(name, "layer", layer, 0, layers() - 1, "layers");
    check_range(name, "experts of the routing", routing.experts(), experts(), experts(),
                "experts of the lens");
    if (!padding.empty()) check_size(name, "padding", padding, tokens, "one flag a token");
    if (!answer.empty()) check_size(name, "answer", answer, tokens, "one flag a token");
    check_sequence_length(name, sequence_length, tokens);
    const index length = sequence_length > 0 ? sequence_length : tokens;
    std::vector<double> count(static_cast<std::size_t>(experts()));
    std::vector<double> mass(static_cast<std::size_t>(experts()));
    for (index first = 0; first < tokens; first += length) {
      std::fill(count.begin(), count.end(), 0.0);
      std::fill(mass.begin(), mass.end(), 0.0);
      index counted = 0;
      for (index n = first; n < first + length; ++n) {
        if (!padding.empty() && padding[n] == 0) continue;
        if (!answer.empty() && answer[n] == 0) continue;
        ++counted;
        for (index e = 0; e < experts(); ++e) {
          if (!routing.on(n, e)) continue;
          count[static_cast<std::size_t>(e)] += 1.0;
          mass[static_cast<std::size_t>(e)] += static_cast<double>(routing.gates(n, e));
        }
      }
      if (counted == 0) continue;
      tokens_[static_cast<std::size_t>(layer)] += counted;
      samples_[static_cast<std::size_t>(layer)] += 1;
      const double size = static_cast<double>(counted);
      for (index e = 0; e < experts(); ++e) {
        const auto i = static_cast<std::size_t>(e);
        counts_(layer, e) += count[i];
        mass_(layer, e) += mass[i];
        token_sum_(layer, e) += count[i] / (size * static_cast<double>(k_));
        gate_sum_(layer, e) += mass[i] / size;
      }
    }
  }
  /// The same with padding and sequences as the router had them.
  template <class T>
  void add(index layer, const routed_view<T, cpu>& routed,
           vector_view<const std::uint8_t, cpu> answer = {}) {
    add(layer, routed.routing, routed.padding_mask, answer, routed.sequence_length);
  }

  /// Tokens that use the expert.
  const matrix<double, cpu>& counts() const { return counts_; }
  /// Sum of gates.
  const matrix<double, cpu>& gate_mass() const { return mass_; }
  /// Share of the expert in a sample's k selections a token, mean over samples: sums to 1 a layer
  /// where every token has k experts.
  matrix<double, cpu> token_scores() const { return mean(token_sum_); }
  /// Mean gate in a sample, 0 where off, mean over samples.
  matrix<double, cpu> gate_scores() const { return mean(gate_sum_); }

 private:
  matrix<double, cpu> mean(const matrix<double, cpu>& sums) const {
    check_at_least(name, "tokens", tokens(0), 1, "tokens that count");
    matrix<double, cpu> m(layers(), experts());
    for (index l = 0; l < layers(); ++l) {
      check_range(name, "tokens of a layer", tokens(l), tokens(0), tokens(0),
                  "tokens of the first layer");
      check_range(name, "samples of a layer", samples(l), samples(0), samples(0),
                  "samples of the first layer");
      for (index e = 0; e < experts(); ++e) m(l, e) = sums(l, e) / static_cast<double>(samples(l));
    }
    return m;
  }

  index k_;
  matrix<double, cpu> counts_, mass_, token_sum_, gate_sum_;
  std::vector<index> tokens_, samples_;
};

/// What scores are divided by before experts are chosen.
enum class score_scale {
  per_layer,        ///< the sum over the experts of the layer: shares of the layer
  none,             ///< nothing: gate scores of routers that do not renormalise (ESFT's files)
  released_script,  ///< compatibility: the sum over LAYERS for each expert, as ESFT's script has it
};

namespace detail {

/// The experts of row l by descending score, ties to the lower index.
inline std::vector<index> by_score(const matrix<double, cpu>& scores, index l) {
  std::vector<index> order;
  for (index e = 0; e < scores.cols(); ++e) order.push_back(e);
  std::stable_sort(order.begin(), order.end(),
                   [&](index a, index b) { return scores(l, a) > scores(l, b); });
  return order;
}

inline void check_scores(const char* function, const matrix<double, cpu>& scores) {
  check_at_least(function, "layers", scores.rows(), 1, "rows of scores");
  check_at_least(function, "experts", scores.cols(), 1, "columns of scores");
  for (index i = 0; i < scores.size(); ++i) {
    const double s = scores.data()[i];
    check_value(std::isfinite(s) && s >= 0.0, function, "scores", s, "finite numbers >= 0");
  }
}

}  // namespace detail

/// Scores [L, E] divided as `scale` says; a sum of 0 leaves zeros.
///
/// Throws: value_error for scores that are not finite and >= 0, or of no expert.
inline matrix<double, cpu> scale_scores(const matrix<double, cpu>& scores, score_scale scale) {
  detail::check_scores("scale_scores", scores);
  matrix<double, cpu> scaled(scores.view());
  if (scale == score_scale::none) return scaled;
  for (index l = 0; l < scores.rows(); ++l) {
    for (index e = 0; e < scores.cols(); ++e) {
      double sum = 0.0;
      if (scale == score_scale::per_layer) {
        for (index j = 0; j < scores.cols(); ++j) sum += scores(l, j);
      } else {
        for (index j = 0; j < scores.rows(); ++j) sum += scores(j, e);
      }
      scaled(l, e) = sum > 0.0 ? scores(l, e) / sum : 0.0;
    }
  }
  return scaled;
}

/// The n experts with the largest scores of each layer, the largest first, ties to the lower index.
///
/// Shapes: scores [L, E], such as router_lens::counts. Throws: value_error for n outside 1..E, and
/// as scale_scores.
/// Source: Router Lens / CEFT, with n = k by default there.
inline expert_selection top_experts(const matrix<double, cpu>& scores, index n) {
  detail::check_scores("top_experts", scores);
  check_range("top_experts", "n", n, 1, scores.cols(), "experts");
  expert_selection chosen;
  for (index l = 0; l < scores.rows(); ++l) {
    chosen.push_back(detail::by_score(scores, l));
    chosen.back().resize(static_cast<std::size_t>(n));
  }
  return chosen;
}

/// Chooses the experts of each layer that hold a share p of its scores.
///
/// Per layer: experts by descending score, ties to the lower index, are added until the sum of
/// those before is >= p. With `decimals` >= 0 scores are rounded to so many first.
/// Shapes: scores [L, E], such as router_lens::token_scores.
/// Edges: p = 1 with rounding may take every expert, those with score 0 too, when the rounded
/// scores add up to less; a layer whose scores are all 0 gets every expert.
/// Throws: value_error for p outside 0..1, for p = 0, which would choose no expert, and as
/// scale_scores.
/// Source: ESFT (arXiv 2407.01906): p = 0.2 for token scores, 0.1 for gate scores. Its script
/// rounds to 4 decimals; divides by sums over layers where the paper and the files published with
/// it do not (score_scale::released_script); with gate scores as they are the published files
/// follow from score_scale::none.
struct cumulative_experts {
  static constexpr const char* name = "cumulative_experts";

  double p = 0.2;                              ///< share, above 0, up to 1
  score_scale scale = score_scale::per_layer;  ///< what scores are divided by
  index decimals = -1;                         ///< -1..15: rounding of scores; -1 for none

  void validate() const {
    check_value(p >= 0.0 && p <= 1.0, name, "p", p, "above 0, up to 1 = share of the scores");
    check_value(p > 0.0, name, "p", p, "above 0, since 0 is an empty selection");
    check_range(name, "decimals", decimals, -1, 15, "decimals of a score, or -1");
  }
  expert_selection operator()(const matrix<double, cpu>& scores) const {
    validate();
    matrix<double, cpu> scaled = scale_scores(scores, scale);
    if (decimals >= 0) {
      const double unit = std::pow(10.0, static_cast<double>(decimals));
      for (index i = 0; i < scaled.size(); ++i) {
        scaled.data()[i] = std::nearbyint(scaled.data()[i] * unit) / unit;
      }
    }
    expert_selection chosen;
    for (index l = 0; l < scaled.rows(); ++l) {
      chosen.emplace_back();
      double sum = 0.0;
      for (const index e : detail::by_score(scaled, l)) {
        if (sum >= p) break;
        chosen.back().push_back(e);
        sum += scaled(l, e);
      }
    }
    return chosen;
  }
};

}  // namespace talpa
