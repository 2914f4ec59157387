// SPDX-License-Identifier: Apache-2.0
// What meta/kernel_stack looks at.
#include <talpa/cpu/indexed_tile.hpp>
#include <talpa/cpu/register_tile.hpp>

namespace talpa::detail {

template struct register_tile<float>;
template struct register_tile<double>;

template <class T>
struct indexed_loops {
  using tile = indexed_tile<T>;
  static constexpr auto several = &tile::template inner<tile::tokens>;
  static constexpr auto single = &tile::template inner<1>;
  static constexpr auto rows = &tile::sum_rows;
  static constexpr auto outer = &tile::template outer<tile::outer_tokens>;
};
template struct indexed_loops<float>;
template struct indexed_loops<double>;

}  // namespace talpa::detail
