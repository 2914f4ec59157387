// SPDX-License-Identifier: Apache-2.0
// What meta/kernel_stack looks at.
#include <talpa/cpu/indexed_tile.hpp>
#include <talpa/cpu/register_tile.hpp>

namespace talpa::detail {

template <class T, class Stored>
struct tile_loop {
  static constexpr auto run = &stored_tile<T, Stored>::template run<Stored>;
};
template struct tile_loop<float, float>;
template struct tile_loop<float, bfloat16>;
template struct tile_loop<double, double>;

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
