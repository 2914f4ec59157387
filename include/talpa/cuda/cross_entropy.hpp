// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/error.hpp>
#include <talpa/core/math.hpp>
#include <talpa/core/transfer.hpp>
#include <talpa/cuda/loops.hpp>
#include <talpa/ops/cross_entropy.hpp>

#include <cstdint>
#include <limits>
#include <string>

namespace talpa::kernels {

/// The loss of row n, whose maximum and sum it saves.
template <class T, class B>
struct cross_entropy_row {
  matrix_view<const T, B> logits;
  vector_view<const std::int32_t, B> labels;
  cross_entropy_saved<T, B> saved;
  template <class Warp>
  TALPA_HD T operator()(const Warp& warp, index n) const {
    const index label = labels[n];
    if (label == ignore_label) return T{0};
    const T* const x = logits.row(n);
    const T top = warp.template max<T>(logits.cols, [&](index c) { return x[c]; });
    const T mass =
        warp.template sum<T>(logits.cols, [&](index c) { return math::exp(x[c] - top); });
    if (warp.lane() == 0) {
      saved.row_max[n] = top;
      saved.row_sum[n] = mass;
    }
    // A label that is none is looked for in a checked context only; else its row is no number.
    const bool there = label >= 0 && label < logits.cols;
    const T mine = there ? x[label] : std::numeric_limits<T>::quiet_NaN();
    return math::log(mass) + (top - mine);
  }
};

template <class T, class B, class Put>
struct cross_entropy_gradient_row {
  matrix_view<const T, B> logits;
  vector_view<const std::int32_t, B> labels;
  cross_entropy_saved<T, B> saved;
  matrix_view<const T, B> dvalue;
  matrix_view<T, B> dlogits;
  Put put;
  template <class Warp>
  TALPA_HD void operator()(const Warp& warp, index n) const {
    const T* const x = logits.row(n);
    T* const dx = dlogits.row(n);
    const index label = labels[n];
    if (label == ignore_label) {
      warp.for_each(logits.cols, [&](index c) { put(dx[c], T{0}); });
      return;
    }
    const T top = saved.row_max[n], mass = saved.row_sum[n];
    const T weight = dvalue(0, 0) / static_cast<T>(saved.counted[0]);
    warp.for_each(logits.cols, [&](index c) {
      const T p = math::exp(x[c] - top) / mass;
      put(dx[c], weight * (c == label ? p - T{1} : p));
    });
  }
};

}  // namespace talpa::kernels

namespace talpa::ops {

template <kernel_backend B>
struct cross_entropy_impl<B> {
  /// In a checked context, where it copies the labels to the host and waits.
  static void check_labels(context<B>& ctx, vector_view<const std::int32_t, B> labels,
                           index classes) {
    if (!ctx.checked) return;
    const matrix<std::int32_t, cpu> values = to_host(as_column(labels));
    for (index n = 0; n < labels.size; ++n) {
      const std::int32_t label = values(n, 0);
      if (label != ignore_label && (label < 0 || label >= classes)) {
        detail::throw_value("ops::cross_entropy", "labels",
                            detail::concat(std::to_string(label), " in row ", std::to_string(n)),
                            detail::concat("0..", std::to_string(classes - 1),
                                           " = classes, or -1 to leave the row out"));
      }
    }
  }

  template <class T>
  static void forward(context<B>& ctx, matrix_view<const T, B> logits,
                      vector_view<const std::int32_t, B> labels,
                      const cross_entropy_saved<T, B>& saved, matrix_view<T, B> value) {
    const vector_view<index, B> counted = saved.counted;
    kernels::sum_columns(
        ctx, labels.size, 1, index{0}, counted.data,
        [=] TALPA_DEVICE(index n, index) -> index { return labels[n] != ignore_label ? 1 : 0; });
    kernels::sum_rows(ctx, logits.rows, value.data,
                      kernels::cross_entropy_row<T, B>{logits, labels, saved});
    kernels::for_each_element(ctx, 1, 1, [=] TALPA_DEVICE(index, index) {
      value(0, 0) = counted[0] == 0 ? T{0} : value(0, 0) / static_cast<T>(counted[0]);
    });
  }

  template <class T>
  static void backward(context<B>& ctx, const cross_entropy_saved<T, B>& saved,
                       matrix_view<const T, B> logits, vector_view<const std::int32_t, B> labels,
                       matrix_view<const T, B> dvalue, matrix_view<T, B> dlogits,
                       grad_mode dlogits_mode) {
    kernels::with_put(dlogits_mode, [&](auto put) {
      kernels::for_each_row(ctx, logits.rows,
                            kernels::cross_entropy_gradient_row<T, B, decltype(put)>{
                                logits, labels, saved, dvalue, dlogits, put});
    });
  }
};

}  // namespace talpa::ops
