// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/check.hpp>
#include <talpa/core/matrix.hpp>

#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <vector>

namespace talpa {

/// Labels of the k experts whose outputs add up best to a target, found by trying all sets of k.
///
/// mask_n = the set S of k experts with the least sum over d of (sum_{e in S} f_e(x_n)_d - t_nd)^2;
/// of equal ones the first in lexicographic order.
/// Shapes: outputs [E N, O], an expert's tokens one behind the other, target [N, O] -> mask
/// [N, ceil(E / 32)].
/// Edges: k = E names all experts; NaN in a token's target or in its first k outputs names those k,
/// elsewhere NaN is never chosen.
/// Cost: N O binomial(E, k) k on one thread. Determinism: sums in double, in fixed order.
/// Throws: value_error for k outside 1..E or E below 1, shape_error.
/// Source: `get_label` of the code of FactorLLM (arXiv 2408.11855), which its forward does not use;
/// what it uses ranks experts one by one (factored_ffn::label).
struct best_subset {
  static constexpr const char* name = "best_subset";

  index k = 2;  ///< experts of a token, 1..E

  template <class U, class T = std::remove_const_t<U>>
  matrix<std::uint32_t, cpu> operator()(matrix_view<U, cpu> outputs,
                                        std::type_identity_t<matrix_view<const T, cpu>> target,
                                        index experts) const {
    check_at_least(name, "experts", experts, 1, "at least one expert");
    check_range(name, "k", k, 1, experts, "experts");
    check_shape(name, "outputs", outputs, experts * target.rows, target.cols,
                "experts x tokens, width of target");
    matrix<std::uint32_t, cpu> mask(target.rows, mask_words(experts));
    for (index n = 0; n < target.rows; ++n) {
      for (const index e : best<T>(outputs, target, experts, n)) {
        mask(n, e / mask_word_bits) |= std::uint32_t{1} << (e % mask_word_bits);
      }
    }
    return mask;
  }

 private:
  template <class T>
  std::vector<index> best(matrix_view<const T, cpu> outputs, matrix_view<const T, cpu> target,
                          index experts, index n) const {
    std::vector<index> set(static_cast<std::size_t>(k));
    for (index i = 0; i < k; ++i) set[static_cast<std::size_t>(i)] = i;
    std::vector<index> chosen = set;
    double least = error(outputs, target, n, set);
    while (advance(set, experts)) {
      const double now = error(outputs, target, n, set);
      if (now < least) {
        least = now;
        chosen = set;
      }
    }
    return chosen;
  }
  template <class T>
  static double error(matrix_view<const T, cpu> outputs, matrix_view<const T, cpu> target, index n,
                      const std::vector<index>& set) {
    double squares = 0.0;
    for (index d = 0; d < target.cols; ++d) {
      double sum = 0.0;
      for (const index e : set) sum += static_cast<double>(outputs(e * target.rows + n, d));
      const double difference = sum - static_cast<double>(target(n, d));
      squares += difference * difference;
    }
    return squares;
  }
  /// The next set in lexicographic order; false behind the last.
  static bool advance(std::vector<index>& set, index experts) {
    const auto size = static_cast<index>(set.size());
    for (index i = size - 1; i >= 0; --i) {
      if (set[static_cast<std::size_t>(i)] == experts - size + i) continue;
      ++set[static_cast<std::size_t>(i)];
      for (index j = i + 1; j < size; ++j) {
        set[static_cast<std::size_t>(j)] = set[static_cast<std::size_t>(j - 1)] + 1;
      }
      return true;
    }
    return false;
  }
};

}  // namespace talpa
