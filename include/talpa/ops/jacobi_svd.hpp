// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/lane_sum.hpp>
#include <talpa/core/view.hpp>
#include <talpa/core/workspace.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>

// One-sided Jacobi on the host, which every backend's ops::svd is made of.

namespace talpa::detail::jacobi {

/// Convergence is quadratic from the fourth sweep or so on; more than this many never come.
inline constexpr index most_sweeps = 60;

// Not inlined: multiply-adds may be made of sums in one place and not in another, and every backend
// is to get the same bits.

[[gnu::noinline]] inline double dot(const double* a, const double* b, index n) {
  return lane_sum<double>(n, [&](index i) { return a[i] * b[i]; });
}

/// That of the first among the largest elements by absolute value; of zeros, 1.
inline double sign_of(const double* row, index n) {
  double largest = 0.0, sign = 1.0;
  for (index i = 0; i < n; ++i) {
    if (std::abs(row[i]) > largest) {
      largest = std::abs(row[i]);
      sign = row[i] < 0.0 ? -1.0 : 1.0;
    }
  }
  return sign;
}

/// Makes rows a and b of m orthogonal, and turns those of j likewise; whether they were not.
[[gnu::noinline]] inline bool rotate(matrix_view<double, cpu> m, matrix_view<double, cpu> j,
                                     index a, index b) {
  double *const x = m.row(a), *const y = m.row(b);
  const double xx = dot(x, x, m.cols), yy = dot(y, y, m.cols), xy = dot(x, y, m.cols);
  constexpr double rounding = std::numeric_limits<double>::epsilon();
  const double bound = rounding * std::sqrt(static_cast<double>(m.cols));
  if (!(std::abs(xy) > bound * std::sqrt(xx) * std::sqrt(yy))) return false;
  const double zeta = (yy - xx) / (2.0 * xy);
  const double t = (zeta < 0.0 ? -1.0 : 1.0) / (std::abs(zeta) + std::sqrt(1.0 + zeta * zeta));
  const double c = 1.0 / std::sqrt(1.0 + t * t), s = c * t;
  const auto turn = [&](double* p, double* q, index n) {
    for (index i = 0; i < n; ++i) {
      const double before = p[i];
      p[i] = c * before - s * q[i];
      q[i] = s * before + c * q[i];
    }
  };
  turn(x, y, m.cols);
  turn(j.row(a), j.row(b), j.cols);
  return true;
}

/// One sweep over all pairs of rows; whether a pair had to be turned. In each round of a
/// tournament every row meets one other, so the pairs of a round are independent tasks.
template <class Parallel>
bool rotate_all(const Parallel& parallel, matrix_view<double, cpu> m, matrix_view<double, cpu> j,
                vector_view<std::uint8_t, cpu> turned) {
  const index players = m.rows + m.rows % 2;  // with an odd number of rows one rests
  bool any = false;
  for (index round = 0; round + 1 < players; ++round) {
    const index circle = players - 1;
    parallel(players / 2, [&](index pair) {
      index a = (round + pair) % circle;
      index b = pair == 0 ? circle : (round + circle - pair) % circle;
      if (a > b) std::swap(a, b);
      turned[pair] = b < m.rows && rotate(m, j, a, b) ? 1 : 0;
    });
    for (index pair = 0; pair < players / 2; ++pair) any = any || turned[pair] != 0;
  }
  return any;
}

/// ops::svd of a matrix of the host; parallel(n, task) calls task(i) once for each i < n.
template <class T, class Parallel>
void svd(workspace<cpu>& memory, const Parallel& parallel, matrix_view<const T, cpu> w,
         matrix_view<T, cpu> u, matrix_view<T, cpu> s, matrix_view<T, cpu> v) {
  // The rows of M = W or W^T, whichever has fewer, are rotated until they are orthogonal:
  // J M = diag(s) Q, so M = J^T diag(s) Q; rows of J and of Q are the singular vectors.
  const bool wide = w.rows <= w.cols;
  const index rank = wide ? w.rows : w.cols, length = wide ? w.cols : w.rows;
  if (rank == 0) return;
  const workspace<cpu>::scope scope(memory);
  const auto m = memory.take<double>(rank, length);
  const auto j = memory.take<double>(rank, rank);
  const auto turned = memory.take<std::uint8_t>(rank / 2 + 1);
  bool finite = true;
  for (index k = 0; k < rank; ++k) {
    for (index i = 0; i < length; ++i) {
      m(k, i) = static_cast<double>(wide ? w(k, i) : w(i, k));
      finite = finite && std::isfinite(m(k, i));
    }
    for (index i = 0; i < rank; ++i) j(k, i) = i == k ? 1.0 : 0.0;
  }
  if (!finite) {
    constexpr T nan = std::numeric_limits<T>::quiet_NaN();
    for (const matrix_view<T, cpu>& result : {u, s, v}) {
      for (index k = 0; k < result.rows; ++k) std::fill_n(result.row(k), result.cols, nan);
    }
    return;
  }
  for (index sweep = 0; sweep < most_sweeps && rotate_all(parallel, m, j, turned); ++sweep) {
  }

  const auto norm = memory.take<double>(rank);
  const auto order = memory.take<index>(rank);
  for (index k = 0; k < rank; ++k) {
    norm[k] = std::sqrt(dot(m.row(k), m.row(k), length));
    order[k] = k;
  }
  std::stable_sort(order.data, order.data + rank,
                   [&](index a, index b) { return norm[a] > norm[b]; });
  const matrix_view<T, cpu> from_j = wide ? u : v, from_m = wide ? v : u;
  for (index k = 0; k < rank; ++k) {
    const index row = order[k];
    const double inverse = norm[row] == 0.0 ? 0.0 : 1.0 / norm[row];
    for (index i = 0; i < length; ++i) m(row, i) *= inverse;
    const double sign = sign_of(wide ? j.row(row) : m.row(row), u.cols);
    s(0, k) = static_cast<T>(norm[row]);
    for (index i = 0; i < rank; ++i) from_j(k, i) = static_cast<T>(sign * j(row, i));
    for (index i = 0; i < length; ++i) from_m(k, i) = static_cast<T>(sign * m(row, i));
  }
}

}  // namespace talpa::detail::jacobi
