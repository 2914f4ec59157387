// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/cpu/copy.hpp>
#include <talpa/cpu/fill.hpp>
#include <talpa/cpu/select.hpp>
#include <talpa/ops/mix_logits.hpp>

namespace talpa::ops {

template <>
struct mix_logits_impl<cpu> {
  template <class T>
  static void gates(context<cpu>& ctx, index keep, matrix_view<const T, cpu> main,
                    const mix_weights<T, cpu>& w, matrix_view<std::uint32_t, cpu> mask) {
    const detail::mix_gates_functor functor{keep};
    detail::for_each_selected_row<T>(
        ctx, main.rows, main.cols, [&](const auto& group, index first, int) {
          functor(group, mix_gates_row<T>{
                             detail::row_at(main, first), detail::row_at(w.gates, first),
                             detail::row_at(w.log_gates, first), detail::row_at(mask, first)});
        });
  }

  template <class T>
  static void gates_backward(context<cpu>& ctx, matrix_view<const T, cpu> gates,
                             matrix_view<const T, cpu> dlog_gates, matrix_view<T, cpu> dmain) {
    detail::for_each_selected_row<T>(
        ctx, dmain.rows, dmain.cols, [&](const auto& group, index first, int) {
          detail::mix_gates_gradient_functor{}(
              group, mix_gates_gradient_row<T>{detail::row_at(gates, first),
                                               detail::row_at(dlog_gates, first),
                                               detail::row_at(dmain, first)});
        });
  }

  template <class Mix, class T>
  static void forward(context<cpu>& ctx, matrix_view<const T, cpu> subs,
                      const mix_weights<T, cpu>& w, matrix_view<T, cpu> normaliser,
                      matrix_view<T, cpu> logits) {
    const index routers = w.gates.cols;
    if (routers == 1) {
      copy(ctx, subs, logits);
      fill(ctx, T{0}, normaliser);
      return;
    }
    detail::for_each_selected_row<T>(
        ctx, logits.rows, logits.cols, [&](const auto& group, index first, int) {
          Mix::forward(group, routers,
                       mix_row<T>{detail::row_at(subs, first), constant(w.gates, first),
                                  constant(w.log_gates, first), detail::row_at(normaliser, first),
                                  detail::row_at(logits, first)});
        });
  }

  template <class Mix, class T>
  static void backward(context<cpu>& ctx, matrix_view<const T, cpu> subs,
                       const mix_weights<T, cpu>& w, matrix_view<const T, cpu> normaliser,
                       matrix_view<const T, cpu> logits, matrix_view<const T, cpu> dlogits,
                       matrix_view<T, cpu> dsubs, matrix_view<T, cpu> dlog_gates) {
    const index routers = w.gates.cols;
    if (routers == 1) {
      copy(ctx, dlogits, dsubs);
      fill(ctx, T{0}, dlog_gates);
      return;
    }
    detail::for_each_selected_row<T>(
        ctx, logits.rows, logits.cols, [&](const auto& group, index first, int) {
          Mix::backward(
              group, routers,
              mix_gradient_row<T>{detail::row_at(subs, first), constant(w.gates, first),
                                  constant(w.log_gates, first), detail::row_at(normaliser, first),
                                  detail::row_at(logits, first), detail::row_at(dlogits, first),
                                  detail::row_at(dsubs, first), detail::row_at(dlog_gates, first)});
        });
  }

 private:
  template <class T>
  static row_pointer<const T> constant(matrix_view<T, cpu> view, index row) {
    return {view.row(row), view.stride};
  }
};

}  // namespace talpa::ops
