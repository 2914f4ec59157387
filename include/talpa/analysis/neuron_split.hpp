// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/check.hpp>

#include <cstddef>
#include <string>
#include <utility>
#include <vector>

namespace talpa {

/// Which neurons of a dense feed-forward network form which expert: the `hidden` neurons of one
/// expert lie one behind the other in `order`, first those of `shared` experts that are always on.
///
/// One list for gate, up and down: a neuron is a row of each, and stays whole. Keep it with the
/// model, since ties decide it.
struct neuron_split {
  std::vector<index> order;  ///< each of the F neurons once
  index hidden = 0;          ///< neurons of one expert
  index shared = 0;          ///< experts that are always on
  /// The neuron that stands for each routed expert, where the procedure names one.
  std::vector<index> representative;

  index neurons() const { return static_cast<index>(order.size()); }
  /// Routed experts.
  index experts() const { return hidden > 0 ? neurons() / hidden - shared : 0; }
};

namespace detail {

/// Neurons of one of `experts` experts of equal size; throws unless they divide.
inline index neurons_of_expert(const char* function, index neurons, index experts) {
  check_at_least(function, "experts", experts, 1, "at least one expert");
  if (neurons < 1 || neurons % experts != 0) {
    throw_value(
        function, "experts", std::to_string(experts),
        concat("a divisor of ", std::to_string(neurons), " = neurons of the dense network"));
  }
  return neurons / experts;
}

/// Throws unless `order` names each of 0..neurons - 1 once.
inline void check_order(const char* function, const std::vector<index>& order, index neurons) {
  check_range(function, "order", static_cast<index>(order.size()), neurons, neurons,
              "neurons of the dense network, each once");
  std::vector<bool> seen(order.size(), false);
  for (const index i : order) {
    check_range(function, "order", i, 0, neurons - 1, "neurons of the dense network");
    if (seen[static_cast<std::size_t>(i)]) {
      throw_value(function, "order", concat(std::to_string(i), " twice"), "each neuron once");
    }
    seen[static_cast<std::size_t>(i)] = true;
  }
}

}  // namespace detail

/// Experts that are blocks of neighbours: expert e has neurons e F / E .. (e + 1) F / E - 1.
///
/// Throws: value_error when E does not divide F.
/// Source: the code of FactorLLM (arXiv 2408.11855), which drops a remainder without a word.
inline neuron_split contiguous_split(index neurons, index experts) {
  neuron_split split;
  split.hidden = detail::neurons_of_expert("contiguous_split", neurons, experts);
  for (index i = 0; i < neurons; ++i) split.order.push_back(i);
  return split;
}

/// Experts as somebody else has them: expert e has the neurons order[e F / E .. (e + 1) F / E - 1].
///
/// Throws: value_error when `order` is no permutation of 0..F - 1 or E does not divide F.
/// Source: FactorLLM (arXiv 2408.11855) permutes the neurons before it cuts them into blocks.
inline neuron_split given_split(std::vector<index> order, index experts) {
  const auto neurons = static_cast<index>(order.size());
  neuron_split split;
  split.hidden = detail::neurons_of_expert("given_split", neurons, experts);
  detail::check_order("given_split", order, neurons);
  split.order = std::move(order);
  return split;
}

}  // namespace talpa
