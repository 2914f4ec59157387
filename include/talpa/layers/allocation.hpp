// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/check.hpp>
#include <talpa/core/error.hpp>
#include <talpa/core/index.hpp>

#include <algorithm>
#include <span>
#include <vector>

namespace talpa {

/// How many experts each layer of a model gets, from the first layer to the last: one list, of
/// which entry l is `experts` of layer l (or its k, or its rank).
///
/// Source: MoLA (arXiv 2402.08562), which compares 8642, 2468, 8228 and 5555 over the quarters of
/// 32 layers, each 160 experts, and takes 2468. The diamond is the hourglass the other way round.
namespace allocation {

/// values[0] for the first of P parts of equal length, values[1] for the next, ...: layer l of L
/// gets values[floor(l P / L)]. Where P does not divide L, lengths differ by one at most.
/// Throws value_error for fewer layers than parts, no part, or a part below 1.
inline std::vector<index> parts(index layers, std::span<const index> values) {
  const auto count = static_cast<index>(values.size());
  check_at_least("allocation::parts", "values.size()", count, 1, "parts of a model");
  check_at_least("allocation::parts", "layers", layers, count, "layers, one a part at least");
  for (const index v : values) {
    check_at_least("allocation::parts", "values", v, 1, "experts of a layer");
  }
  std::vector<index> all;
  for (index l = 0; l < layers; ++l) {
    all.push_back(values[static_cast<std::size_t>(l * count / layers)]);
  }
  return all;
}

/// Few experts in the first quarter, many in the last: few, a third and two thirds of the way,
/// rounded to the nearest, many. 2, 4, 6, 8 by default.
inline std::vector<index> inverted_triangle(index layers, index few = 2, index many = 8) {
  check_range("allocation::inverted_triangle", "few", few, 1, many, "'many'");
  const index rise = many - few;
  const index values[] = {few, few + (2 * rise + 3) / 6, few + (4 * rise + 3) / 6, many};
  return parts(layers, values);
}

/// Many experts in the first quarter, few in the last: 8, 6, 4, 2 by default.
inline std::vector<index> triangle(index layers, index few = 2, index many = 8) {
  std::vector<index> all = inverted_triangle(layers, few, many);
  std::reverse(all.begin(), all.end());
  return all;
}

/// Many experts in the first and the last quarter, few between: 8, 2, 2, 8 by default.
inline std::vector<index> hourglass(index layers, index few = 2, index many = 8) {
  check_range("allocation::hourglass", "few", few, 1, many, "'many'");
  const index values[] = {many, few, few, many};
  return parts(layers, values);
}

/// Few experts in the first and the last quarter, many between: 2, 8, 8, 2 by default.
inline std::vector<index> diamond(index layers, index few = 2, index many = 8) {
  check_range("allocation::diamond", "few", few, 1, many, "'many'");
  const index values[] = {few, many, many, few};
  return parts(layers, values);
}

/// The same number everywhere: 5 by default.
inline std::vector<index> rectangle(index layers, index experts = 5) {
  const index values[] = {experts};
  return parts(layers, values);
}

/// A list of one's own, checked: one number a layer, each at least 1.
inline std::vector<index> list(index layers, std::vector<index> experts) {
  check_range("allocation::list", "experts.size()", static_cast<index>(experts.size()), layers,
              layers, "layers");
  for (const index e : experts) {
    check_at_least("allocation::list", "experts", e, 1, "experts of a layer");
  }
  return experts;
}

/// k for each layer: the wanted one, or all experts where there are fewer.
inline std::vector<index> selected(index k, std::span<const index> experts) {
  check_at_least("allocation::selected", "k", k, 1, "experts a token");
  std::vector<index> all;
  for (const index e : experts) all.push_back(std::min(k, e));
  return all;
}

}  // namespace allocation

}  // namespace talpa
