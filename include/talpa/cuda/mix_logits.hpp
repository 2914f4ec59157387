// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/cuda/copy.hpp>
#include <talpa/cuda/fill.hpp>
#include <talpa/cuda/select.hpp>
#include <talpa/ops/mix_logits.hpp>

#include <cstdint>

namespace talpa::kernels {

template <class T, class B>
TALPA_HD row_pointer<const T> constant_row_at(matrix_view<T, B> view, index row) {
  return {view.row(row), view.stride};
}

template <class T, class B>
struct mix_gates_one_row {
  talpa::detail::mix_gates_functor functor;
  matrix_view<const T, B> main;
  mix_weights<T, B> weights;
  matrix_view<std::uint32_t, B> mask;

  template <class G>
  TALPA_HD void operator()(const G& g, index n) const {
    functor(g, mix_gates_row<T>{row_at(main, n), row_at(weights.gates, n),
                                row_at(weights.log_gates, n), row_at(mask, n)});
  }
};

template <class T, class B>
struct mix_gates_gradient_one_row {
  matrix_view<const T, B> gates, dlog_gates;
  matrix_view<T, B> dmain;

  template <class G>
  TALPA_HD void operator()(const G& g, index n) const {
    talpa::detail::mix_gates_gradient_functor{}(
        g, mix_gates_gradient_row<T>{row_at(gates, n), row_at(dlog_gates, n), row_at(dmain, n)});
  }
};

template <class Mix, class T, class B>
struct mix_one_row {
  matrix_view<const T, B> subs;
  mix_weights<T, B> weights;
  matrix_view<T, B> normaliser, logits;

  template <class G>
  TALPA_HD void operator()(const G& g, index n) const {
    Mix::forward(g, weights.gates.cols,
                 mix_row<T>{row_at(subs, n), constant_row_at(weights.gates, n),
                            constant_row_at(weights.log_gates, n), row_at(normaliser, n),
                            row_at(logits, n)});
  }
};

template <class Mix, class T, class B>
struct mix_gradient_one_row {
  matrix_view<const T, B> subs;
  mix_weights<T, B> weights;
  matrix_view<const T, B> normaliser, logits, dlogits;
  matrix_view<T, B> dsubs, dlog_gates;

  template <class G>
  TALPA_HD void operator()(const G& g, index n) const {
    Mix::backward(g, weights.gates.cols,
                  mix_gradient_row<T>{row_at(subs, n), constant_row_at(weights.gates, n),
                                      constant_row_at(weights.log_gates, n), row_at(normaliser, n),
                                      row_at(logits, n), row_at(dlogits, n), row_at(dsubs, n),
                                      row_at(dlog_gates, n)});
  }
};

}  // namespace talpa::kernels

namespace talpa::ops {

template <kernel_backend B>
struct mix_logits_impl<B> {
  template <class T>
  static void gates(context<B>& ctx, index keep, matrix_view<const T, B> main,
                    const mix_weights<T, B>& weights, matrix_view<std::uint32_t, B> mask) {
    kernels::for_each_group(ctx, "ops::mix_gates", main.rows, main.cols,
                            kernels::mix_gates_one_row<T, B>{{keep}, main, weights, mask});
  }

  template <class T>
  static void gates_backward(context<B>& ctx, matrix_view<const T, B> gates,
                             matrix_view<const T, B> dlog_gates, matrix_view<T, B> dmain) {
    kernels::for_each_group(ctx, "ops::mix_gates_backward", dmain.rows, dmain.cols,
                            kernels::mix_gates_gradient_one_row<T, B>{gates, dlog_gates, dmain});
  }

  template <class Mix, class T>
  static void forward(context<B>& ctx, matrix_view<const T, B> subs,
                      const mix_weights<T, B>& weights, matrix_view<T, B> normaliser,
                      matrix_view<T, B> logits) {
    if (weights.gates.cols == 1) {
      copy(ctx, subs, logits);
      fill(ctx, T{0}, normaliser);
      return;
    }
    kernels::for_each_group(ctx, "ops::mix_logits", logits.rows, logits.cols,
                            kernels::mix_one_row<Mix, T, B>{subs, weights, normaliser, logits});
  }

  template <class Mix, class T>
  static void backward(context<B>& ctx, matrix_view<const T, B> subs,
                       const mix_weights<T, B>& weights, matrix_view<const T, B> normaliser,
                       matrix_view<const T, B> logits, matrix_view<const T, B> dlogits,
                       matrix_view<T, B> dsubs, matrix_view<T, B> dlog_gates) {
    if (weights.gates.cols == 1) {
      copy(ctx, dlogits, dsubs);
      fill(ctx, T{0}, dlog_gates);
      return;
    }
    kernels::for_each_group(ctx, "ops::mix_logits_backward", logits.rows, logits.cols,
                            kernels::mix_gradient_one_row<Mix, T, B>{
                                subs, weights, normaliser, logits, dlogits, dsubs, dlog_gates});
  }
};

}  // namespace talpa::ops
