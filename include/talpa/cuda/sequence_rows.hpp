// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/error.hpp>
#include <talpa/core/math.hpp>
#include <talpa/core/transfer.hpp>
#include <talpa/cuda/loops.hpp>
#include <talpa/ops/sequence_rows.hpp>

#include <cstdint>
#include <limits>
#include <string>

namespace talpa::kernels {

/// a[s, j] = scale q_s . h_sj, one warp a row of h; 0 for an absent row, which is not read.
template <class T, class B>
struct attention_score_row {
  T scale;
  matrix_view<const T, B> q, h;
  vector_view<const std::uint8_t, B> present;
  matrix_view<T, B> a;
  template <class Warp>
  TALPA_HD void operator()(const Warp& warp, index row) const {
    const index s = row / a.cols;
    // All lanes read one flag: they agree.
    const bool on = present.empty() || present[row] != 0;
    const T product =
        warp.template sum<T>(on ? q.cols : 0, [&](index d) { return q(s, d) * h(row, d); });
    if (warp.lane() == 0) a(s, row - s * a.cols) = on ? scale * product : T{0};
  }
};

/// The scores of a sequence to weights, in place.
template <class T, class B>
struct attention_softmax_row {
  vector_view<const std::uint8_t, B> present;
  matrix_view<T, B> a;
  template <class Warp>
  TALPA_HD void operator()(const Warp& warp, index s) const {
    const index length = a.cols;
    T* const weight = a.row(s);
    const auto on = [&](index j) { return present.empty() || present[s * length + j] != 0; };
    const T top = warp.template max<T>(
        length, [&](index j) { return on(j) ? weight[j] : -std::numeric_limits<T>::infinity(); });
    // An absent row stays without weight even where the others are not numbers.
    const T sum = warp.template sum<T>(
        length, [&](index j) { return weight[j] = on(j) ? math::exp(weight[j] - top) : T{0}; });
    warp.for_each(length, [&](index j) {
      if (on(j)) weight[j] /= sum;
    });
  }
};

/// r[s, j] = du_s . h_sj, one warp a row of h; 0 for a row without weight, which is not read.
template <class T, class B>
struct attention_slope_row {
  matrix_view<const T, B> h, a, du;
  matrix_view<T, B> r;
  template <class Warp>
  TALPA_HD void operator()(const Warp& warp, index row) const {
    const index s = row / a.cols, j = row - s * a.cols;
    const T product = warp.template sum<T>(a(s, j) != T{0} ? h.cols : 0,
                                           [&](index d) { return du(s, d) * h(row, d); });
    if (warp.lane() == 0) r(s, j) = product;
  }
};

/// r to scale t, the gradient of the products of a sequence, in place.
template <class T, class B>
struct attention_gradient_row {
  T scale;
  matrix_view<const T, B> a;
  matrix_view<T, B> r;
  template <class Warp>
  TALPA_HD void operator()(const Warp& warp, index s) const {
    const T* const weight = a.row(s);
    T* const slope = r.row(s);
    const T mean = warp.template sum<T>(a.cols, [&](index j) { return weight[j] * slope[j]; });
    warp.for_each(a.cols, [&](index j) {
      slope[j] = weight[j] != T{0} ? scale * (weight[j] * (slope[j] - mean)) : T{0};
    });
  }
};

/// out_s = sum_j factor_sj h_sj over the rows with weight, in order of j.
template <class T, class B, class Put>
struct attention_sum {
  matrix_view<const T, B> weight, factor, h;
  matrix_view<T, B> out;
  Put put;
  TALPA_HD void operator()(index s, index d) const {
    T sum{0};
    for (index j = 0; j < weight.cols; ++j) {
      if (weight(s, j) != T{0}) sum += factor(s, j) * h(s * weight.cols + j, d);
    }
    put(out(s, d), sum);
  }
};

}  // namespace talpa::kernels

namespace talpa::ops {

template <kernel_backend B>
struct sequence_rows_impl<B> {
  template <class T>
  static void repeat(context<B>& ctx, matrix_view<const T, B> x, matrix_view<T, B> y,
                     index length) {
    kernels::for_each_element(ctx, y.rows, y.cols,
                              [=] TALPA_DEVICE(index n, index d) { y(n, d) = x(n / length, d); });
  }

  template <class T>
  static void sum(context<B>& ctx, matrix_view<const T, B> x, matrix_view<T, B> y, index length) {
    kernels::for_each_element(ctx, y.rows, y.cols, [=] TALPA_DEVICE(index s, index d) {
      T sum{0};
      for (index i = 0; i < length; ++i) sum += x(s * length + i, d);
      y(s, d) = sum;
    });
  }

  /// Labels are looked at in a checked context, where they are copied to the host; elsewhere a
  /// label outside its range gives a row of NaN.
  template <class T>
  static void lookup(context<B>& ctx, const char* name, vector_view<const std::int32_t, B> labels,
                     matrix_view<const T, B> table, matrix_view<T, B> y) {
    if (ctx.checked) check_labels(name, labels, table.rows);
    kernels::for_each_element(ctx, y.rows, y.cols, [=] TALPA_DEVICE(index s, index d) {
      const index row = labels[s];
      y(s, d) = row >= 0 && row < table.rows ? table(row, d) : std::numeric_limits<T>::quiet_NaN();
    });
  }

  /// One thread an element of the table, which passes over all labels: tables of labels are small.
  template <class T>
  static void lookup_backward(context<B>& ctx, vector_view<const std::int32_t, B> labels,
                              matrix_view<const T, B> dy, index first, matrix_view<T, B> dtable) {
    kernels::for_each_element(ctx, dtable.rows, dtable.cols, [=] TALPA_DEVICE(index row, index d) {
      T sum = dtable(row, d);
      for (index s = 0; s < labels.size; ++s) {
        if (labels[s] - first == row) sum += dy(s, d);
      }
      dtable(row, d) = sum;
    });
  }

  template <class T>
  static void attend(context<B>& ctx, T scale, matrix_view<const T, B> q, matrix_view<const T, B> h,
                     vector_view<const std::uint8_t, B> present, matrix_view<T, B> a,
                     matrix_view<T, B> u) {
    kernels::for_each_row(ctx, h.rows, kernels::attention_score_row<T, B>{scale, q, h, present, a});
    if (a.cols > 0) {
      kernels::for_each_row(ctx, a.rows, kernels::attention_softmax_row<T, B>{present, a});
    }
    kernels::for_each_element(ctx, u.rows, u.cols, [=] TALPA_DEVICE(index s, index d) {
      T sum{0};
      for (index j = 0; j < a.cols; ++j) {
        const index row = s * a.cols + j;
        if (present.empty() || present[row] != 0) sum += a(s, j) * h(row, d);
      }
      u(s, d) = sum;
    });
  }

  template <class T>
  static void attend_backward(context<B>& ctx, T scale, matrix_view<const T, B> q,
                              matrix_view<const T, B> h, matrix_view<const T, B> a,
                              matrix_view<const T, B> du, matrix_view<T, B> dq, grad_mode dq_mode,
                              matrix_view<T, B> dh) {
    const typename workspace<B>::scope scope(ctx.scratch);
    const matrix_view<T, B> slope = ctx.scratch.template take<T>(a.rows, a.cols);  // [S, L]
    kernels::for_each_row(ctx, h.rows, kernels::attention_slope_row<T, B>{h, a, du, slope});
    kernels::for_each_row(ctx, a.rows, kernels::attention_gradient_row<T, B>{scale, a, slope});
    kernels::with_put(dq_mode, [&](auto put) {
      kernels::for_each_element(ctx, q.rows, q.cols,
                                kernels::attention_sum<T, B, decltype(put)>{a, slope, h, dq, put});
    });
    if (dh.empty()) return;
    kernels::for_each_element(ctx, dh.rows, dh.cols, [=] TALPA_DEVICE(index row, index d) {
      const index s = row / a.cols, j = row - s * a.cols;
      const T weight = a(s, j);
      if (weight != T{0}) dh(row, d) += weight * du(s, d) + slope(s, j) * q(s, d);
    });
  }

 private:
  static void check_labels(const char* name, vector_view<const std::int32_t, B> labels,
                           index rows) {
    const matrix<std::int32_t, cpu> values = to_host(as_column(labels));
    for (index s = 0; s < labels.size; ++s) {
      if (values(s, 0) < 0 || values(s, 0) >= rows) {
        detail::throw_value(
            name, "labels", detail::concat(std::to_string(values(s, 0)), " at ", std::to_string(s)),
            detail::concat("0..", std::to_string(rows - 1), " = rows of the table"));
      }
    }
  }
};

}  // namespace talpa::ops
