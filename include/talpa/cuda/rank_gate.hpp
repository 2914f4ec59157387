// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/cuda/loops.hpp>
#include <talpa/cuda/quad.hpp>
#include <talpa/ops/rank_gate.hpp>

namespace talpa::kernels {

/// Width neighbours of a row of z, of one expert: `ranks` is a multiple of Width.
template <int Width, class F, class S, class B>
struct mixed_rank_gate_element {
  F f;
  float scale;
  int ranks;
  matrix_view<const float, B> gates, u;
  matrix_view<S, B> z;

  TALPA_HD void operator()(index n, index block) const {
    const int j = Width * static_cast<int>(block);
    neighbours<float, Width> y{};
    const float factor = j < u.cols ? scale * gates(n, j / ranks) : 0.0f;
    if (factor != 0.0f) {
      const auto x = load_wide<float, Width>(u.row(n) + j);
      TALPA_UNROLL
      for (int i = 0; i < Width; ++i) y.v[i] = factor * f.value(x.v[i]);
    }
    store_wide(z.row(n) + j, y);
  }
};

/// One thread an expert of a token, which sums over its ranks in order, and one a column of du that
/// is beyond the ranks.
template <int Width, class F, class S, class B>
struct mixed_rank_gate_backward_element {
  F f;
  float scale;
  int ranks;
  matrix_view<const float, B> gates, u, dz;
  matrix_view<S, B> du;
  matrix_view<float, B> dgates;

  TALPA_HD void operator()(index n, index e) const {
    S* const to = du.row(n);
    if (e >= gates.cols) {
      to[u.cols + e - gates.cols] = static_cast<S>(0.0f);
      return;
    }
    const float factor = scale * gates(n, e);
    float sum = 0.0f;
    for (index j = e * ranks; j < (e + 1) * ranks; j += Width) {
      const auto x = load_wide<float, Width>(u.row(n) + j),
                 d = load_wide<float, Width>(dz.row(n) + j);
      neighbours<float, Width> y{};
      TALPA_UNROLL
      for (int i = 0; i < Width; ++i) {
        sum = math::fma(d.v[i], f.value(x.v[i]), sum);
        if (factor != 0.0f) y.v[i] = factor * d.v[i] * f.derivative(x.v[i]);
      }
      store_wide(to + j, y);
    }
    dgates(n, e) = scale * sum;
  }
};

}  // namespace talpa::kernels

namespace talpa::ops {

template <kernel_backend B>
struct rank_gate_impl<B> {
  template <class T>
  static void forward(context<B>& ctx, T scale, matrix_view<const T, B> gates,
                      matrix_view<const T, B> u, matrix_view<T, B> z) {
    const index ranks = u.cols / gates.cols;
    kernels::for_each_element(ctx, u.rows, u.cols, [=] TALPA_DEVICE(index n, index j) {
      z(n, j) = scale * gates(n, j / ranks) * u(n, j);
    });
  }

  /// One thread an expert of a token, which sums over its ranks in order; du may be dz.
  template <class T>
  static void backward(context<B>& ctx, T scale, matrix_view<const T, B> gates,
                       matrix_view<const T, B> u, matrix_view<const T, B> dz, matrix_view<T, B> du,
                       matrix_view<T, B> dgates) {
    const index ranks = u.cols / gates.cols;
    kernels::for_each_element(ctx, u.rows, gates.cols, [=] TALPA_DEVICE(index n, index e) {
      const T factor = scale * gates(n, e);
      T sum{0};
      for (index j = e * ranks; j < (e + 1) * ranks; ++j) {
        const T up = dz(n, j);
        sum += up * u(n, j);
        du(n, j) = factor * up;
      }
      dgates(n, e) = scale * sum;
    });
  }

  template <class F, class S>
  static void mixed(context<B>& ctx, const F& f, float scale, matrix_view<const float, B> gates,
                    matrix_view<const float, B> u, matrix_view<S, B> z) {
    const int ranks = static_cast<int>(u.cols / gates.cols);
    if (ranks % 4 == 0 && z.cols % 4 == 0 && kernels::holds_quads(u) && kernels::holds_quads(z)) {
      kernels::for_each_element(
          ctx, z.rows, z.cols / 4,
          kernels::mixed_rank_gate_element<4, F, S, B>{f, scale, ranks, gates, u, z});
    } else {
      kernels::for_each_element(
          ctx, z.rows, z.cols,
          kernels::mixed_rank_gate_element<1, F, S, B>{f, scale, ranks, gates, u, z});
    }
  }

  template <class F, class S>
  static void mixed_backward(context<B>& ctx, const F& f, float scale,
                             matrix_view<const float, B> gates, matrix_view<const float, B> u,
                             matrix_view<const float, B> dz, matrix_view<S, B> du,
                             matrix_view<float, B> dgates) {
    const index threads = gates.cols + du.cols - u.cols;
    const int ranks = static_cast<int>(u.cols / gates.cols);
    if (ranks % 4 == 0 && kernels::holds_quads(u) && kernels::holds_quads(dz) &&
        kernels::holds_quads(du)) {
      kernels::for_each_element(ctx, u.rows, threads,
                                kernels::mixed_rank_gate_backward_element<4, F, S, B>{
                                    f, scale, ranks, gates, u, dz, du, dgates});
    } else {
      kernels::for_each_element(ctx, u.rows, threads,
                                kernels::mixed_rank_gate_backward_element<1, F, S, B>{
                                    f, scale, ranks, gates, u, dz, du, dgates});
    }
  }
};

}  // namespace talpa::ops
