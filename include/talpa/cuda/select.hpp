// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/transfer.hpp>
#include <talpa/cuda/loops.hpp>
#include <talpa/cuda/warp_tile.hpp>
#include <talpa/ops/select.hpp>

#include <algorithm>
#include <cstdint>
#include <type_traits>

namespace talpa::kernels {

/// Threads of a block that routes.
inline constexpr int row_threads = 128;
/// Registers of a multiprocessor, of every device from 8.0 on.
inline constexpr int multiprocessor_registers = 65536;
/// Most experts of a row on a device: 32 lanes with 16 registers each.
inline constexpr index most_row_experts = 512;

/// What F says with `template <int Slots> static constexpr int least_blocks` of least_blocks<Body>.
template <class F, int Slots>
constexpr int row_function_blocks() {
  if constexpr (requires { F::template least_blocks<Slots>; }) {
    return F::template least_blocks<Slots>;
  } else {
    return 1;
  }
}

/// Calls f(group, n) for each row, W lanes each in turn. A warp goes on while one of its rows is
/// there; beyond the last the group neither reads nor writes.
template <int W, int Slots, class F, bool Whole = false>
struct group_loop {
  static constexpr int least_blocks = row_function_blocks<F, Slots>();

  F f;
  index rows;
  index experts;

  template <class Block>
  TALPA_HD void operator()(Block& block) const {
    constexpr index groups = Block::threads() / W;
    const warp_tile<W, Slots, Block, Whole> group(block, experts);
    for (index first = block.index() * groups; first < rows; first += block.count() * groups) {
      const index n = first + static_cast<unsigned>(block.thread()) / W;
      f(group.only(n < rows), n < rows ? n : rows - 1);
    }
  }
};

/// run(width, slots), two constants, for the lane group that suits E. Throws value_error for more
/// experts than a group holds.
template <class Run>
void with_group(const char* function, index experts, Run run) {
  check_range(function, "experts", experts, 1, most_row_experts, "experts of a row on a device");
  const auto with = [&]<int W, int Slots>() {
    run(std::integral_constant<int, W>{}, std::integral_constant<int, Slots>{});
  };
  // Few lanes with many registers each: what lanes do together serves 32 / W rows at once.
  if (experts <= 8) {
    with.template operator()<2, 4>();
  } else if (experts <= 16) {
    with.template operator()<2, 8>();
  } else if (experts <= 32) {
    with.template operator()<4, 8>();
  } else if (experts <= 64) {
    with.template operator()<4, 16>();
  } else if (experts <= 128) {
    with.template operator()<8, 16>();
  } else if (experts <= 256) {
    with.template operator()<16, 16>();
  } else {
    with.template operator()<32, 16>();
  }
}

/// run(width, slots, whole) likewise; `whole` tells whether E fills the group: where it does,
/// nothing is asked of single elements.
template <class Run>
void with_fitting_group(const char* function, index experts, Run run) {
  with_group(function, experts, [&](auto width, auto slots) {
    if (experts == decltype(width)::value * decltype(slots)::value) {
      run(width, slots, std::true_type{});
    } else {
      run(width, slots, std::false_type{});
    }
  });
}

/// Blocks for a loop over rows, so many of them in a block at a time.
constexpr index row_blocks(index rows, int rows_a_block) {
  return std::min(ceil_div(rows, rows_a_block), index{1} << 20);
}

/// f(group, n) for each row on the lane group that suits E; f is a struct with `template <class G>
/// TALPA_HD void operator()(const G& g, index n) const`. Throws value_error for more experts than a
/// group holds.
template <class B, class F>
void for_each_group(context<B>& ctx, const char* function, index rows, index experts, const F& f) {
  with_group(function, experts, [&](auto width, auto slots) {
    constexpr int w = decltype(width)::value, s = decltype(slots)::value;
    detail::launch<row_threads>(ctx, row_blocks(rows, row_threads / w), 0,
                                group_loop<w, s, F>{f, rows, experts});
  });
}

/// The same with kernels of their own for E that fill a group.
template <class B, class F>
void for_each_fitting_group(context<B>& ctx, const char* function, index rows, index experts,
                            const F& f) {
  with_fitting_group(function, experts, [&](auto width, auto slots, auto whole) {
    constexpr int w = decltype(width)::value, s = decltype(slots)::value;
    detail::launch<row_threads>(ctx, row_blocks(rows, row_threads / w), 0,
                                group_loop<w, s, F, decltype(whole)::value>{f, rows, experts});
  });
}

/// The same with a whole warp a row, for functions of a row that may return early.
template <class B, class F>
void for_each_warp_group(context<B>& ctx, const char* function, index rows, index experts,
                         const F& f) {
  check_range(function, "experts", experts, 1, most_row_experts, "experts of a row on a device");
  const auto run = [&]<int Slots>() {
    detail::launch<row_threads>(ctx, row_blocks(rows, row_threads / 32), 0,
                                group_loop<32, Slots, F>{f, rows, experts});
  };
  if (experts <= 32) {
    run.template operator()<1>();
  } else if (experts <= 128) {
    run.template operator()<4>();
  } else {
    run.template operator()<16>();
  }
}

template <class T, class B>
TALPA_HD row_pointer<T> row_at(matrix_view<T, B> view, index row) {
  return {view.row(row), view.stride};
}
/// The number of a token in a column [N, 1]; no data where there is no column.
template <class T, class B>
TALPA_HD row_scalar<T> scalar_at(matrix_view<T, B> column, index row) {
  return {column.data == nullptr ? nullptr : column.row(row), column.stride};
}

/// Selects (or replays the mask of) one row; padding gets neither gates nor mask.
template <bool Replays, class Selector, class T, class B>
struct select_one_row {
  /// Unless told, the compiler holds more than a row in registers to have independent work at hand;
  /// other warps are better at that.
  static constexpr int registers() {
    if constexpr (tuned_selector<Selector>) {
      return Selector::thread_registers;
    } else {
      return Replays || sizeof(T) > 4 ? 128 : 96;
    }
  }
  template <int Slots>
  static constexpr int least_blocks = Slots * sizeof(T) > 64
                                          ? 1
                                          : multiprocessor_registers / (row_threads * registers());

  Selector selector;
  matrix_view<const T, B> logits;
  vector_view<const std::uint8_t, B> padding_mask;
  matrix_view<T, B> gates;
  matrix_view<std::uint32_t, B> mask;
  select_inputs<T, B> more;

  template <class G>
  TALPA_HD void operator()(const G& all, index n) const {
    const select_row<T> row{row_at(logits, n), row_at(gates, n), row_at(mask, n),
                            row_pointer<const T>{more.bias.data, 0}, scalar_at(more.control, n)};
    const bool real = padding_mask.empty() || padding_mask[n] != 0;
    const auto g = all.only(all.works() && real);
    if constexpr (Replays) {
      selector.replay(g, row);
    } else {
      selector.select(g, row);
    }
    const auto rest = all.only(all.works() && !real);
    if (rest.any(rest.works())) {
      rest.store_mask(row.mask, [&](auto) { return false; });
      rest.store_row(row.gates, [&](auto) { return T{0}; });
    }
  }
};

template <class Selector, class T, class B>
struct select_backward_one_row {
  Selector selector;
  matrix_view<const T, B> logits, gates;
  matrix_view<const std::uint32_t, B> mask;
  matrix_view<const T, B> dgates;
  matrix_view<T, B> dlogits;
  select_inputs<T, B> more;
  matrix_view<T, B> dcontrol;

  template <class G>
  TALPA_HD void operator()(const G& all, index n) const {
    const select_gradient_row<T> row{
        row_at(logits, n),          row_at(gates, n),      row_at(mask, n),
        row_at(dgates, n),          row_at(dlogits, n),    row_pointer<const T>{more.bias.data, 0},
        scalar_at(more.control, n), scalar_at(dcontrol, n)};
    std::uint32_t bits = 0;
    for (index w = 0; w < mask.cols; ++w) bits |= mask(n, w);
    selector.select_backward(all.only(all.works() && bits != 0), row);
    const auto rest = all.only(all.works() && bits == 0);
    rest.store_row(row.dlogits, [&](auto) { return T{0}; });
    if (dcontrol.data != nullptr) rest.store(row.dcontrol, T{0});
  }
};

}  // namespace talpa::kernels

namespace talpa::ops {

template <kernel_backend B>
struct select_impl<B> {
  template <class T, class Selector>
  static void select(context<B>& ctx, const Selector& selector, matrix_view<const T, B> logits,
                     vector_view<const std::uint8_t, B> padding_mask, matrix_view<T, B> gates,
                     matrix_view<std::uint32_t, B> mask, const select_inputs<T, B>& more) {
    kernels::for_each_fitting_group(ctx, Selector::name, logits.rows, logits.cols,
                                    kernels::select_one_row<false, Selector, T, B>{
                                        selector, logits, padding_mask, gates, mask, more});
  }

  template <class T, class Selector>
  static void replay(context<B>& ctx, const Selector& selector, matrix_view<const T, B> logits,
                     vector_view<const std::uint8_t, B> padding_mask,
                     matrix_view<std::uint32_t, B> mask, matrix_view<T, B> gates,
                     const select_inputs<T, B>& more) {
    kernels::for_each_group(ctx, Selector::name, logits.rows, logits.cols,
                            kernels::select_one_row<true, Selector, T, B>{
                                selector, logits, padding_mask, gates, mask, more});
  }

  template <class T, class Selector>
  static void select_backward(context<B>& ctx, const Selector& selector,
                              matrix_view<const T, B> logits, matrix_view<const T, B> gates,
                              matrix_view<const std::uint32_t, B> mask,
                              matrix_view<const T, B> dgates, matrix_view<T, B> dlogits,
                              const select_inputs<T, B>& more, matrix_view<T, B> dcontrol) {
    kernels::for_each_group(ctx, Selector::name, logits.rows, logits.cols,
                            kernels::select_backward_one_row<Selector, T, B>{
                                selector, logits, gates, mask, dgates, dlogits, more, dcontrol});
  }

  /// Throws value_error at the first real token whose logits cannot be normalised; copies them to
  /// the host and waits.
  template <class T>
  static void check_logits(const char* function, matrix_view<const T, B> logits,
                           vector_view<const std::uint8_t, B> padding_mask) {
    const matrix<T, cpu> values = to_host(logits);
    const matrix<std::uint8_t, cpu> real = to_host(as_column(padding_mask));
    detail::check_logit_rows<T>(function, values.view(),
                                {real.data(), padding_mask.empty() ? 0 : padding_mask.size});
  }
};

}  // namespace talpa::ops
