// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/math.hpp>
#include <talpa/cpu/loops.hpp>
#include <talpa/ops/cross_entropy.hpp>

#include <string>

namespace talpa::ops {

template <>
struct cross_entropy_impl<cpu> {
  // Always: a label is a position in a row, and N integers are little beside N C exponentials.
  static void check_labels(context<cpu>&, vector_view<const std::int32_t, cpu> labels,
                           index classes) {
    for (index n = 0; n < labels.size; ++n) {
      if (labels[n] != ignore_label && (labels[n] < 0 || labels[n] >= classes)) {
        detail::throw_value(
            "ops::cross_entropy", "labels",
            detail::concat(std::to_string(labels[n]), " in row ", std::to_string(n)),
            detail::concat("0..", std::to_string(classes - 1),
                           " = classes, or -1 to leave the row out"));
      }
    }
  }

  template <class T>
  static void forward(context<cpu>& ctx, matrix_view<const T, cpu> logits,
                      vector_view<const std::int32_t, cpu> labels,
                      const cross_entropy_saved<T, cpu>& saved, matrix_view<T, cpu> value) {
    const index classes = logits.cols;
    const T sum = detail::sum_over_rows<T>(ctx, logits.rows, classes, [&](index n) {
      if (labels[n] == ignore_label) return T{0};
      const T* const x = logits.row(n);
      const T top = detail::lane_max(x, classes);
      const T mass = detail::lane_sum<T>(classes, [&](index c) { return math::exp(x[c] - top); });
      saved.row_max[n] = top;
      saved.row_sum[n] = mass;
      return math::log(mass) + (top - x[labels[n]]);
    });
    index counted = 0;
    for (index n = 0; n < labels.size; ++n) counted += labels[n] != ignore_label ? 1 : 0;
    saved.counted[0] = counted;
    value(0, 0) = counted == 0 ? T{0} : sum / static_cast<T>(counted);
  }

  template <class T>
  static void backward(context<cpu>& ctx, const cross_entropy_saved<T, cpu>& saved,
                       matrix_view<const T, cpu> logits,
                       vector_view<const std::int32_t, cpu> labels,
                       matrix_view<const T, cpu> dvalue, matrix_view<T, cpu> dlogits,
                       grad_mode dlogits_mode) {
    const index classes = logits.cols;
    const T weight = dvalue(0, 0) / static_cast<T>(saved.counted[0]);
    detail::with_grad_mode(dlogits_mode, [&](auto put) {
      detail::for_each_row(ctx, logits.rows, classes, [&](index n) {
        const T* const x = logits.row(n);
        T* const dx = dlogits.row(n);
        if (labels[n] == ignore_label) {
          for (index c = 0; c < classes; ++c) put(dx[c], T{0});
          return;
        }
        const T top = saved.row_max[n], mass = saved.row_sum[n];
        const index label = labels[n];
        for (index c = 0; c < classes; ++c) {
          const T p = math::exp(x[c] - top) / mass;
          put(dx[c], weight * (c == label ? p - T{1} : p));
        }
      });
    });
  }
};

}  // namespace talpa::ops
