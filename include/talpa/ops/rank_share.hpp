// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/check.hpp>
#include <talpa/core/error.hpp>
#include <talpa/core/scalar.hpp>
#include <talpa/core/view.hpp>
#include <talpa/ops/rank_gate.hpp>

namespace talpa::ops {

template <class B>
struct rank_share_impl {
  static_assert(detail::always_false<B>,
                "talpa: ops::rank_spread and its fellows have no implementation for this backend "
                "here, include "
                "talpa/cpu/rank_share.hpp for cpu, talpa/cuda/rank_share.hpp for gpu "
                "(docs/architecture.md)");
};

/// Gates ranks that the experts share, one copy an expert: z[n, e R + r] = (scale gates[n, e])
/// u[n, r].
///
/// Backward: du is rank_collapse of dz, dgates is rank_share_gates(dz, u).
/// Shapes: gates [N, E], u [N, R], z [N, E R].
/// Cost: N E R multiplications. Determinism: same bits for any number of threads.
/// Throws: shape_error.
template <class B, floating T>
void rank_spread(context<B>& ctx, T scale, input<T, B> gates, input<T, B> u, matrix_view<T, B> z) {
  detail::check_ranks("ops::rank_spread", gates, matrix_view<const T, B>(z));
  check_shape("ops::rank_spread", "u", u, gates.rows, z.cols / gates.cols, "tokens, ranks");
  rank_share_impl<B>::spread(ctx, scale, gates, u, z);
}

/// Gates each expert's ranks and adds them up over the experts: z[n, r] = sum_e (scale gates[n, e])
/// u[n, e R + r], experts in order.
///
/// Backward: du is rank_spread of dz, dgates is rank_share_gates(u, dz).
/// Shapes: gates [N, E], u [N, E R], z [N, R].
/// Cost: N E R multiplications. Determinism: same bits for any number of threads.
/// Throws: shape_error.
template <class B, floating T>
void rank_collapse(context<B>& ctx, T scale, input<T, B> gates, input<T, B> u,
                   matrix_view<T, B> z) {
  detail::check_ranks("ops::rank_collapse", gates, u);
  check_shape("ops::rank_collapse", "z", z, gates.rows, u.cols / gates.cols, "tokens, ranks");
  rank_share_impl<B>::collapse(ctx, scale, gates, u, z);
}

/// Gradient of the gates of either: dgates[n, e] = scale sum_r each[n, e R + r] shared[n, r].
///
/// Shapes: each [N, E R], shared [N, R], dgates [N, E], overwritten.
/// Cost: N E R multiplications. Determinism: same bits for any number of threads.
/// Throws: shape_error.
template <class B, floating T>
void rank_share_gates(context<B>& ctx, T scale, input<T, B> each, input<T, B> shared,
                      matrix_view<T, B> dgates) {
  detail::check_ranks("ops::rank_share_gates", matrix_view<const T, B>(dgates), each);
  check_shape("ops::rank_share_gates", "shared", shared, dgates.rows, each.cols / dgates.cols,
              "tokens, ranks");
  rank_share_impl<B>::gates(ctx, scale, each, shared, dgates);
}

}  // namespace talpa::ops
