// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/matrix.hpp>
#include <talpa/routing/routing.hpp>
#include <talpa/testing/inputs.hpp>

#include <cstdint>

namespace talpa::testing::detail {

/// What a batch has beside its tokens, owned.
template <floating U>
struct surroundings {
  index sequence_length = 0;
  vector<std::int32_t, cpu> labels;   // [S], go round 0..classes - 1
  matrix<U, cpu> rows;                // [S L, C]
  vector<std::uint8_t, cpu> present;  // [S L], or empty

  /// For N tokens as `sizes` says: sequence_length, classes, conditioning_rows, conditioning_width.
  /// Some rows are absent, and the last of several sequences has none; the one row of a sequence is
  /// always there.
  template <class Sizes>
  surroundings(const Sizes& sizes, index tokens) : sequence_length(sizes.sequence_length) {
    const index sequences =
        batch_info<U, cpu>{.sequence_length = sizes.sequence_length}.sequences(tokens);
    if (sizes.classes > 0) {
      labels = vector<std::int32_t, cpu>(sequences);
      for (index i = 0; i < sequences; ++i)
        labels[i] = static_cast<std::int32_t>(i % sizes.classes);
    }
    if (sizes.conditioning_rows == 0) return;
    const index count = sequences * sizes.conditioning_rows;
    generator random(11);
    rows = uneven<U>(count, sizes.conditioning_width, random);
    if (sizes.conditioning_rows == 1) return;
    present = vector<std::uint8_t, cpu>(count);
    for (index i = 0; i < count; ++i) {
      const bool last = sequences > 1 && i / sizes.conditioning_rows == sequences - 1;
      present[i] = !last && i % 3 != 1 ? 1 : 0;
    }
  }

  /// The batch; gradients of the rows go to `drows`.
  batch_info<U, cpu> batch(matrix<U, cpu>& drows, generator& noise) const {
    batch_info<U, cpu> b;
    b.sequence_length = sequence_length;
    b.random = &noise;
    b.labels = labels.view();
    b.conditioning = {rows.view(), present.view(), drows.view()};
    return b;
  }
};

}  // namespace talpa::testing::detail
