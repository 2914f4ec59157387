// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/math.hpp>
#include <talpa/cpu/loops.hpp>
#include <talpa/ops/sequence_rows.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>

namespace talpa::ops {

template <>
struct sequence_rows_impl<cpu> {
  template <class T>
  static void repeat(context<cpu>& ctx, matrix_view<const T, cpu> x, matrix_view<T, cpu> y,
                     index length) {
    detail::for_each_row(ctx, y.rows, y.cols,
                         [&](index n) { std::copy_n(x.row(n / length), y.cols, y.row(n)); });
  }

  template <class T>
  static void sum(context<cpu>& ctx, matrix_view<const T, cpu> x, matrix_view<T, cpu> y,
                  index length) {
    detail::for_each_row(ctx, y.rows, y.cols * std::max<index>(1, length), [&](index s) {
      std::fill_n(y.row(s), y.cols, T{0});
      for (index i = 0; i < length; ++i) {
        for (index d = 0; d < y.cols; ++d) y(s, d) += x(s * length + i, d);
      }
    });
  }

  template <class T>
  static void lookup(context<cpu>&, const char* name, vector_view<const std::int32_t, cpu> labels,
                     matrix_view<const T, cpu> table, matrix_view<T, cpu> y) {
    for (index s = 0; s < labels.size; ++s) {
      if (labels[s] < 0 || labels[s] >= table.rows) {
        detail::throw_value(
            name, "labels", detail::concat(std::to_string(labels[s]), " at ", std::to_string(s)),
            detail::concat("0..", std::to_string(table.rows - 1), " = rows of the table"));
      }
    }
    for (index s = 0; s < labels.size; ++s) std::copy_n(table.row(labels[s]), y.cols, y.row(s));
  }

  template <class T>
  static void lookup_backward(context<cpu>&, vector_view<const std::int32_t, cpu> labels,
                              matrix_view<const T, cpu> dy, index first,
                              matrix_view<T, cpu> dtable) {
    for (index s = 0; s < labels.size; ++s) {
      const index row = labels[s] - first;
      if (row < 0 || row >= dtable.rows) continue;
      for (index d = 0; d < dy.cols; ++d) dtable(row, d) += dy(s, d);
    }
  }

  template <class T>
  static void attend(context<cpu>& ctx, T scale, matrix_view<const T, cpu> q,
                     matrix_view<const T, cpu> h, vector_view<const std::uint8_t, cpu> present,
                     matrix_view<T, cpu> a, matrix_view<T, cpu> u) {
    constexpr T infinity = std::numeric_limits<T>::infinity();
    detail::for_each_row(ctx, u.rows, u.cols * std::max<index>(1, a.cols), [&](index s) {
      const index length = a.cols, c = u.cols;
      T* const us = u.row(s);
      std::fill_n(us, c, T{0});
      if (length == 0) return;
      T* const weight = a.row(s);
      bool some = false;
      for (index j = 0; j < length; ++j) {
        const index row = s * length + j;
        const bool on = present.empty() || present[row] != 0;
        weight[j] = on ? scale * dot(q.row(s), h.row(row), c) : -infinity;
        some = some || on;
      }
      if (!some) {
        std::fill_n(weight, length, T{0});
        return;
      }
      const T top = detail::lane_max(weight, length);
      for (index j = 0; j < length; ++j) {
        // An absent row stays without weight even where the others are not numbers.
        const bool on = present.empty() || present[s * length + j] != 0;
        weight[j] = on ? math::exp(weight[j] - top) : T{0};
      }
      const T sum = detail::lane_sum<T>(length, [&](index j) { return weight[j]; });
      for (index j = 0; j < length; ++j) {
        const index row = s * length + j;
        if (!present.empty() && present[row] == 0) continue;
        weight[j] /= sum;
        for (index d = 0; d < c; ++d) us[d] += weight[j] * h(row, d);
      }
    });
  }

  template <class T>
  static void attend_backward(context<cpu>& ctx, T scale, matrix_view<const T, cpu> q,
                              matrix_view<const T, cpu> h, matrix_view<const T, cpu> a,
                              matrix_view<const T, cpu> du, matrix_view<T, cpu> dq,
                              grad_mode dq_mode, matrix_view<T, cpu> dh) {
    const index length = a.cols, c = q.cols;
    detail::for_each_row(ctx, q.rows, c * std::max<index>(1, length), [&](index s) {
      if (dq_mode == grad_mode::overwrite) std::fill_n(dq.row(s), c, T{0});
      T mean{0};
      for (index j = 0; j < length; ++j) {
        const T weight = a(s, j);
        if (weight != T{0}) mean += weight * dot(du.row(s), h.row(s * length + j), c);
      }
      for (index j = 0; j < length; ++j) {
        const index row = s * length + j;
        const T weight = a(s, j);
        if (weight == T{0}) continue;
        const T slope = scale * (weight * (dot(du.row(s), h.row(row), c) - mean));
        if (dq_mode != grad_mode::ignore) {
          for (index d = 0; d < c; ++d) dq(s, d) += slope * h(row, d);
        }
        if (dh.empty()) continue;
        for (index d = 0; d < c; ++d) dh(row, d) += weight * du(s, d) + slope * q(s, d);
      }
    });
  }

 private:
  template <class T>
  static T dot(const T* a, const T* b, index n) {
    return detail::lane_sum<T>(n, [&](index d) { return a[d] * b[d]; });
  }
};

}  // namespace talpa::ops
