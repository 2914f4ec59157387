// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/index.hpp>

namespace talpa {

/// Consecutive rows of a stacked matrix that train, and where their gradient begins in a matrix
/// that holds the trained rows only.
struct row_run {
  index first = 0;       ///< first row in the value
  index rows = 0;        ///< how many
  index grad_first = 0;  ///< first row in the gradient

  friend constexpr bool operator==(const row_run&, const row_run&) = default;
};

}  // namespace talpa
