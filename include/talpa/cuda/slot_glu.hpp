// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/cuda/loops.hpp>
#include <talpa/cuda/quad.hpp>
#include <talpa/ops/slot_glu.hpp>

namespace talpa::kernels {

template <int Width, class F, class S, class B>
struct slot_glu_element {
  F f;
  const index* used;
  matrix_view<const S, B> ab;
  const float* gates;
  matrix_view<S, B> z;

  TALPA_HD void operator()(index s, index block) const {
    if (s >= *used) return;
    const S* const from = ab.row(s) + Width * block;
    const auto a = load_wide<float, Width>(from), b = load_wide<float, Width>(from + z.cols);
    neighbours<float, Width> product;
    TALPA_UNROLL
    for (int i = 0; i < Width; ++i) product.v[i] = gates[s] * (f.value(a.v[i]) * b.v[i]);
    store_wide(z.row(s) + Width * block, product);
  }
};

/// One warp a slot.
template <int Width, class F, class S, class B>
struct slot_glu_backward_row {
  F f;
  const index* used;
  matrix_view<const S, B> ab;
  const float* gates;
  matrix_view<S, B> dz;
  bool recompute;
  float* dgates;
  matrix_view<S, B> dab;

  template <class Warp>
  TALPA_HD void operator()(const Warp& warp, index s) const {
    if (s >= *used) return;
    const index hidden = dz.cols;
    const float gate = gates[s];
    const float sum = warp.template sum<float>(hidden / Width, [&](index block) {
      const S* const from = ab.row(s) + Width * block;
      S* const up = dz.row(s) + Width * block;
      S* const to = dab.row(s) + Width * block;
      const auto a = load_wide<float, Width>(from), b = load_wide<float, Width>(from + hidden),
                 d = load_wide<float, Width>(up);
      neighbours<float, Width> da, db, z;
      float share = 0.0f;
      TALPA_UNROLL
      for (int i = 0; i < Width; ++i) {
        const float value = f.value(a.v[i]), h = value * b.v[i], dh = gate * d.v[i];
        da.v[i] = dh * b.v[i] * f.derivative(a.v[i]);
        db.v[i] = dh * value;
        z.v[i] = gate * h;
        share = share + d.v[i] * h;
      }
      store_wide(to, da);
      store_wide(to + hidden, db);
      if (recompute) store_wide(up, z);
      return share;
    });
    if (warp.lane() == 0) dgates[s] = sum;
  }
};

}  // namespace talpa::kernels

namespace talpa::ops {

template <kernel_backend B>
struct slot_glu_impl<B> {
  template <class F, class S>
  static void forward(context<B>& ctx, const F& f, const segments<B>& s, matrix_view<const S, B> ab,
                      vector_view<const float, B> gates, matrix_view<S, B> z) {
    const index* const used = s.offsets.data + s.experts();
    if (wide(ab, z)) {
      kernels::for_each_element(ctx, z.rows, z.cols / 4,
                                kernels::slot_glu_element<4, F, S, B>{f, used, ab, gates.data, z});
    } else {
      kernels::for_each_element(ctx, z.rows, z.cols,
                                kernels::slot_glu_element<1, F, S, B>{f, used, ab, gates.data, z});
    }
  }

  template <class F, class S>
  static void backward(context<B>& ctx, const F& f, const segments<B>& s,
                       matrix_view<const S, B> ab, vector_view<const float, B> gates,
                       matrix_view<S, B> dz, bool recompute, vector_view<float, B> dgates,
                       matrix_view<S, B> dab) {
    const index* const used = s.offsets.data + s.experts();
    if (wide(ab, dz) && kernels::holds_quads(dab)) {
      kernels::for_each_row(ctx, dz.rows,
                            kernels::slot_glu_backward_row<4, F, S, B>{
                                f, used, ab, gates.data, dz, recompute, dgates.data, dab});
    } else {
      kernels::for_each_row(ctx, dz.rows,
                            kernels::slot_glu_backward_row<1, F, S, B>{
                                f, used, ab, gates.data, dz, recompute, dgates.data, dab});
    }
  }

 private:
  template <class S>
  static bool wide(const matrix_view<const S, B>& ab, const matrix_view<S, B>& z) {
    return z.cols % 4 == 0 && kernels::holds_quads(ab) && kernels::holds_quads(z);
  }
};

}  // namespace talpa::ops
