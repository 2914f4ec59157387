// SPDX-License-Identifier: Apache-2.0
// What meta/kernel_stack looks at.
#include <talpa/cpu/indexed_tile.hpp>
#include <talpa/cpu/register_tile.hpp>
#include <talpa/cpu/streamed_tile.hpp>

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
  static constexpr auto kept_rows = &tile::sum_kept_rows;
  static constexpr auto outer = &tile::template outer<tile::outer_tokens>;
};
template struct indexed_loops<float>;
template struct indexed_loops<double>;

template <class T>
struct streamed_loops {
  static constexpr index panels = register_bytes == panel_bytes ? 2 : 1;
  static constexpr index rows = streamed_tile_rows<panels>;
  using wide = streamed_tile<T, panels, rows>;
  using narrow = streamed_tile<T, 1, rows>;
  using tall = streamed_tile<T, 1, streamed_tile_rows<1>>;
  static constexpr auto wide_by_rows = &wide::template run<true>;
  static constexpr auto wide_packed = &wide::template run<false>;
  static constexpr auto narrow_by_rows = &narrow::template run<true>;
  static constexpr auto narrow_packed = &narrow::template run<false>;
  static constexpr auto tall_by_rows = &tall::template run<true>;
  static constexpr auto tall_packed = &tall::template run<false>;
};
template struct streamed_loops<float>;
template struct streamed_loops<double>;

template <class T>
struct row_loops {
  using loops = streamed_rows<T>;
  static constexpr auto inner = &loops::inner;
  static constexpr auto sum = &loops::template sum<panel_width<T>>;
};
template struct row_loops<float>;
template struct row_loops<double>;

}  // namespace talpa::detail
