// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/math.hpp>
#include <talpa/cpu/loops.hpp>
#include <talpa/ops/noise.hpp>

#include <cstdint>

namespace talpa::ops {

template <>
struct noise_impl<cpu> {
  template <class T>
  static void constant(context<cpu>& ctx, random_stream stream, T deviation,
                       matrix_view<const T, cpu> x, matrix_view<T, cpu> y) {
    detail::for_each_row(ctx, y.rows, y.cols, [&](index n) {
      for (index d = 0; d < y.cols; ++d) {
        y(n, d) = math::fma(deviation, normal<T>(stream, at(n, d, y.cols)), x(n, d));
      }
    });
  }

  template <class T>
  static void learned(context<cpu>& ctx, random_stream stream, T floor, matrix_view<const T, cpu> x,
                      matrix_view<const T, cpu> raw, matrix_view<T, cpu> deviation,
                      matrix_view<T, cpu> y) {
    detail::for_each_row(ctx, y.rows, y.cols, [&](index n) {
      for (index d = 0; d < y.cols; ++d) {
        const T size = math::softplus(raw(n, d)) + floor;
        deviation(n, d) = size;
        y(n, d) = math::fma(size, normal<T>(stream, at(n, d, y.cols)), x(n, d));
      }
    });
  }

  template <class T>
  static void learned_backward(context<cpu>& ctx, random_stream stream,
                               matrix_view<const T, cpu> raw, matrix_view<const T, cpu> dy,
                               matrix_view<const T, cpu> ddeviation, matrix_view<T, cpu> draw) {
    detail::for_each_row(ctx, draw.rows, draw.cols, [&](index n) {
      for (index d = 0; d < draw.cols; ++d) {
        const T direct = ddeviation.empty() ? T{0} : ddeviation(n, d);
        const T whole = math::fma(dy(n, d), normal<T>(stream, at(n, d, draw.cols)), direct);
        draw(n, d) = math::mul(whole, math::sigmoid(raw(n, d)));
      }
    });
  }

  template <class T>
  static void jitter(context<cpu>& ctx, random_stream stream, T width, matrix_view<const T, cpu> x,
                     matrix_view<T, cpu> y, grad_mode y_mode) {
    detail::with_grad_mode(y_mode, [&](auto put) {
      detail::for_each_row(ctx, y.rows, y.cols, [&](index n) {
        for (index d = 0; d < y.cols; ++d) {
          const T u = math::fma(T{2}, uniform<T>(stream, at(n, d, y.cols)), T{-1});
          put(y(n, d), math::mul(x(n, d), math::fma(width, u, T{1})));
        }
      });
    });
  }

 private:
  static std::uint64_t at(index n, index d, index cols) {
    return static_cast<std::uint64_t>(n * cols + d);
  }
};

}  // namespace talpa::ops
