// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/transfer.hpp>
#include <talpa/core/workspace.hpp>
#include <talpa/ops/routing_sums.hpp>
#include <talpa/routing/routing.hpp>

#include <cmath>
#include <cstddef>
#include <cstdio>
#include <string>
#include <type_traits>
#include <vector>

namespace talpa {

/// What the real tokens of one or more routings with E experts add up to, in memory of the backend.
/// Everything a statistics_report says is made of these sums, so routings merge by adding.
template <class T, backend B>
struct routing_statistics {
  routing_totals<T, B> totals;  // one group: [1] and [1, E]

  index experts() const { return totals.counts.cols; }
  /// For a forward that measures as it routes; `mode` as in measure.
  wanted_totals<T, B> wanted(grad_mode mode) const { return {totals, mode}; }
};

/// Uninitialised statistics of E experts in `memory`.
template <class T, backend B>
routing_statistics<T, B> make_statistics(workspace<B>& memory, index experts) {
  routing_statistics<T, B> s;
  s.totals.tokens = memory.template take<index>(1);
  s.totals.counts = memory.template take<index>(1, experts);   // [1, E]
  s.totals.probability = memory.template take<T>(1, experts);  // [1, E]
  s.totals.importance = memory.template take<T>(1, experts);   // [1, E]
  s.totals.squared_logsumexp = memory.template take<T>(1);
  s.totals.entropy = memory.template take<T>(1);
  return s;
}

/// Measures a routing into `statistics`: overwrite starts anew, accumulate merges with what they
/// hold (more batches, or more layers with as many experts).
///
/// Shapes: logits, gates [N, E], mask [N, ceil(E / 32)]; padding counts as absent.
/// Cost: one pass with N E exponentials; no synchronisation.
/// Determinism: same bits on every backend and number of threads.
/// Throws: shape_error.
template <class T, class B>
void measure(context<B>& ctx, const std::type_identity_t<routed_view<T, B>>& routed,
             const routing_statistics<T, B>& statistics, grad_mode mode) {
  ops::routing_sums(ctx,
                    {routed.logits, routed.routing.gates, routed.routing.mask, routed.padding_mask},
                    statistics.totals, mode);
}

/// Measures one routing into fresh memory of the context.
template <class T, class B>
routing_statistics<T, B> measure(context<B>& ctx, const routed_view<T, B>& routed) {
  const routing_statistics<T, B> s = make_statistics<T>(ctx.memory, routed.logits.cols);
  measure(ctx, routed, s, grad_mode::overwrite);
  return s;
}

/// Statistics as a plain value on the host, to print, compare, keep and merge.
struct statistics_report {
  index tokens = 0;                 ///< real tokens
  std::vector<index> counts;        ///< [E] tokens that use the expert
  std::vector<double> importance;   ///< [E] sum of gates
  std::vector<double> probability;  ///< [E] sum of softmax(logits)
  double squared_logsumexp = 0.0;   ///< sum
  double entropy = 0.0;             ///< sum, in nats

  statistics_report() = default;
  /// A copy; from a device once what measured them is done.
  template <class T, backend B>
  explicit statistics_report(const routing_statistics<T, B>& s)
      : tokens(number(s.totals.tokens)),
        squared_logsumexp(static_cast<double>(number(s.totals.squared_logsumexp))),
        entropy(static_cast<double>(number(s.totals.entropy))) {
    const auto used = to_host(s.totals.counts);
    const auto gates = to_host(s.totals.importance);
    const auto mass = to_host(s.totals.probability);
    for (index e = 0; e < s.experts(); ++e) {
      counts.push_back(used(0, e));
      importance.push_back(static_cast<double>(gates(0, e)));
      probability.push_back(static_cast<double>(mass(0, e)));
    }
  }

  index experts() const { return static_cast<index>(counts.size()); }
  /// Selections of all experts.
  index selections() const {
    index sum = 0;
    for (const index count : counts) sum += count;
    return sum;
  }
  /// Share of expert e in all selections; 0 without any.
  double share(index e) const { return ratio(count(e), static_cast<double>(selections())); }
  /// Mean of softmax(logits)_e over tokens.
  double mean_probability(index e) const {
    return ratio(probability[static_cast<std::size_t>(e)], static_cast<double>(tokens));
  }
  /// Mean gate of expert e over the tokens that use it; 0 if none does.
  double mean_gate(index e) const {
    return ratio(importance[static_cast<std::size_t>(e)], count(e));
  }
  /// Mean Shannon entropy of softmax(logits) of a token, in nats.
  double mean_entropy() const { return ratio(entropy, static_cast<double>(tokens)); }
  /// Mean entropy as a part of ln E, its greatest value; 0 for one expert.
  double normalised_entropy() const {
    return experts() > 1 ? mean_entropy() / std::log(static_cast<double>(experts())) : 0.0;
  }
  /// Mean squared logsumexp of a token: the router z-loss.
  double mean_squared_logsumexp() const {
    return ratio(squared_logsumexp, static_cast<double>(tokens));
  }
  /// Mean number of experts a token uses.
  double active_experts() const {
    return ratio(static_cast<double>(selections()), static_cast<double>(tokens));
  }
  /// max_e count_e / mean count - 1: 0 at perfect balance, E - 1 when one expert has everything
  /// (Wang et al. 2024, arXiv 2408.15664). 0 without selections.
  double max_violation() const {
    double largest = 0.0;
    for (index e = 0; e < experts(); ++e) largest = count(e) > largest ? count(e) : largest;
    const double mean = ratio(static_cast<double>(selections()), static_cast<double>(experts()));
    return mean > 0.0 ? largest / mean - 1.0 : 0.0;
  }
  /// Experts that no token uses.
  index dead_experts() const {
    index dead = 0;
    for (const index count : counts) dead += count == 0 ? 1 : 0;
    return dead;
  }

  /// Adds another layer or batch. Throws value_error when the numbers of experts differ; a report
  /// without experts, as made by default, takes over the other.
  void merge(const statistics_report& other) {
    if (experts() == 0) {
      *this = other;
      return;
    }
    check_range("statistics_report::merge", "experts", other.experts(), experts(), experts(),
                "experts of the report");
    tokens += other.tokens;
    squared_logsumexp += other.squared_logsumexp;
    entropy += other.entropy;
    for (std::size_t e = 0; e < counts.size(); ++e) {
      counts[e] += other.counts[e];
      importance[e] += other.importance[e];
      probability[e] += other.probability[e];
    }
  }

  /// A table for people: two lines on all experts, then one line an expert.
  std::string text() const {
    char line[160];
    std::string s;
    const auto add = [&](int) { s += line; };
    add(std::snprintf(line, sizeof line,
                      "%td tokens, %td experts, %.3g active a token, %td dead\n"
                      "entropy %.3g nats (%.3g of ln E), max violation %.3g\n",
                      tokens, experts(), active_experts(), dead_experts(), mean_entropy(),
                      normalised_entropy(), max_violation()));
    add(std::snprintf(line, sizeof line, "%8s %10s %8s %8s %12s\n", "expert", "count", "share",
                      "gate", "probability"));
    for (index e = 0; e < experts(); ++e) {
      add(std::snprintf(line, sizeof line, "%8td %10td %8.4f %8.4f %12.4f\n", e,
                        counts[static_cast<std::size_t>(e)], share(e), mean_gate(e),
                        mean_probability(e)));
    }
    return s;
  }

 private:
  template <class T, backend B>
  static T number(vector_view<T, B> one) {
    return to_host(as_column(one))(0, 0);
  }
  double count(index e) const { return static_cast<double>(counts[static_cast<std::size_t>(e)]); }
  static double ratio(double a, double b) { return b > 0.0 ? a / b : 0.0; }
};

}  // namespace talpa
