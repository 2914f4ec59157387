// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/check.hpp>
#include <talpa/routing/statistics.hpp>

namespace talpa {

/// Steers the coefficient of a loss on the gates so that tokens use k of E experts on average.
///
/// Once a step, after it: with the sparsity 1 - selections / (tokens E) of all layers and batches
/// of the step, coefficient *= factor where it is below 1 - k / E, otherwise coefficient /= factor,
/// also where both are equal. The coefficient is kept in double.
/// Edges: a step without tokens changes nothing. Reports of several routings merge by adding; all
/// must have as many experts.
/// Throws: value_error for a number out of its range.
/// Source: Wang et al. 2024, ReMoE (arXiv 2412.14711), for the selector rectified.
struct sparsity_controller {
  static constexpr const char* name = "sparsity_controller";

  double k = 2.0;             ///< experts a token is to use on average, in (0, E]
  double factor = 1.2;        ///< of one step, > 1
  double coefficient = 1e-8;  ///< what the loss is multiplied by, > 0; changes with each step

  /// Share of the gates that are off; 0 without tokens.
  static double sparsity(const statistics_report& report) {
    const double all = static_cast<double>(report.tokens) * static_cast<double>(report.experts());
    return all > 0.0 ? 1.0 - static_cast<double>(report.selections()) / all : 0.0;
  }

  void step(const statistics_report& report) {
    const auto experts = static_cast<double>(report.experts());
    check_value(k > 0.0 && k <= experts, name, "k", k, "in (0, experts] = experts a token");
    check_value(factor > 1.0, name, "factor", factor, "> 1");
    check_value(coefficient > 0.0, name, "coefficient", coefficient, "> 0");
    if (report.tokens == 0) return;
    const bool below = sparsity(report) < 1.0 - k / experts;
    coefficient = below ? coefficient * factor : coefficient / factor;
  }
};

}  // namespace talpa
