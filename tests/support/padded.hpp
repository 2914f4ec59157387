// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/matrix.hpp>

#include <cmath>
#include <limits>

namespace talpa::support {

/// A matrix whose rows lie inside longer ones: its stride exceeds its columns, its rows start at
/// odd addresses, and what is outside must stay NaN.
template <class T>
class padded {
 public:
  padded(index rows, index cols) : rows_(rows), cols_(cols), all_(rows + 2, cols + 3) {
    for (index i = 0; i < all_.size(); ++i) all_.data()[i] = std::numeric_limits<T>::quiet_NaN();
  }
  /// A padded copy.
  explicit padded(const matrix<T, cpu>& inner) : padded(inner.rows(), inner.cols()) {
    for (index r = 0; r < rows_; ++r) {
      for (index c = 0; c < cols_; ++c) view()(r, c) = inner(r, c);
    }
  }

  matrix_view<T, cpu> view() { return all_.view().row_range(1, rows_).col_range(1, cols_); }
  /// Whether nothing outside was written.
  bool intact() const {
    for (index r = 0; r < all_.rows(); ++r) {
      for (index c = 0; c < all_.cols(); ++c) {
        const bool inside = r >= 1 && r <= rows_ && c >= 1 && c <= cols_;
        if (!inside && !std::isnan(all_(r, c))) return false;
      }
    }
    return true;
  }

 private:
  index rows_;
  index cols_;
  matrix<T, cpu> all_;
};

}  // namespace talpa::support
