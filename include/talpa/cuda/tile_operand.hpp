// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/config.hpp>
#include <talpa/core/index.hpp>

#include <cstdint>

namespace talpa::kernels {

/// Element (i, k) of an operand of a tile is data[i * outer_step + k * inner_step], i < outer; one
/// of the steps is 1. Where `rows` is given the other one counts rows of a matrix, and row r stands
/// at rows[r]; `by_inner` says that this is the inner step.
template <class T>
struct tile_operand {
  const T* data;
  index outer_step, inner_step, outer;
  const std::int32_t* rows = nullptr;
  bool by_inner = false;

  TALPA_HD index row(index r) const { return rows == nullptr ? r : index{rows[r]}; }
};

}  // namespace talpa::kernels
