// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/math.hpp>
#include <talpa/core/random.hpp>
#include <talpa/cuda/loops.hpp>
#include <talpa/ops/noise.hpp>

#include <cstdint>

namespace talpa::ops {

template <kernel_backend B>
struct noise_impl<B> {
  template <class T>
  static void constant(context<B>& ctx, random_stream stream, T deviation,
                       matrix_view<const T, B> x, matrix_view<T, B> y) {
    const index cols = y.cols;
    kernels::for_each_element(ctx, y.rows, y.cols, [=] TALPA_DEVICE(index n, index d) {
      const auto i = static_cast<std::uint64_t>(n * cols + d);
      y(n, d) = math::fma(deviation, normal<T>(stream, i), x(n, d));
    });
  }

  template <class T>
  static void learned(context<B>& ctx, random_stream stream, T floor, matrix_view<const T, B> x,
                      matrix_view<const T, B> raw, matrix_view<T, B> deviation,
                      matrix_view<T, B> y) {
    const index cols = y.cols;
    kernels::for_each_element(ctx, y.rows, y.cols, [=] TALPA_DEVICE(index n, index d) {
      const auto i = static_cast<std::uint64_t>(n * cols + d);
      const T size = math::softplus(raw(n, d)) + floor;
      deviation(n, d) = size;
      y(n, d) = math::fma(size, normal<T>(stream, i), x(n, d));
    });
  }

  template <class T>
  static void learned_backward(context<B>& ctx, random_stream stream, matrix_view<const T, B> raw,
                               matrix_view<const T, B> dy, matrix_view<const T, B> ddeviation,
                               matrix_view<T, B> draw) {
    const index cols = draw.cols;
    kernels::for_each_element(ctx, draw.rows, draw.cols, [=] TALPA_DEVICE(index n, index d) {
      const auto i = static_cast<std::uint64_t>(n * cols + d);
      const T direct = ddeviation.empty() ? T{0} : ddeviation(n, d);
      const T whole = math::fma(dy(n, d), normal<T>(stream, i), direct);
      draw(n, d) = math::mul(whole, math::sigmoid(raw(n, d)));
    });
  }

  template <class T>
  static void jitter(context<B>& ctx, random_stream stream, T width, matrix_view<const T, B> x,
                     matrix_view<T, B> y, grad_mode y_mode) {
    if (y_mode == grad_mode::ignore) return;
    const bool adds = y_mode == grad_mode::accumulate;
    const index cols = y.cols;
    kernels::for_each_element(ctx, y.rows, y.cols, [=] TALPA_DEVICE(index n, index d) {
      const auto i = static_cast<std::uint64_t>(n * cols + d);
      const T u = math::fma(T{2}, uniform<T>(stream, i), T{-1});
      const T jittered = math::mul(x(n, d), math::fma(width, u, T{1}));
      y(n, d) = adds ? y(n, d) + jittered : jittered;
    });
  }
};

}  // namespace talpa::ops
