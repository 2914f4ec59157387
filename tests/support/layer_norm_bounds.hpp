// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "support/tolerance.hpp"

#include <cmath>

namespace talpa::support::layer_norm_bounds {

constexpr double epsilon = 1e-5;

struct norm_bounds {
  table xhat;    // [N, D], of the normalised values
  table y;       // [N, D]
  table dx;      // [N, D]
  table dgamma;  // [1, D]
  table dbeta;   // [1, D]
};

// The mean is off by e <= gamma_D mean|x|. The deviations from it sum to zero, so the variance is
// off by gamma_(D + 4) relative and e^2 absolute, and xhat = (x - mean) rstd by
// rstd e + |xhat| (gamma_(D + 8) + rstd^2 e^2).
template <class T>
norm_bounds bounds_of(const table& x, const table& gamma, const table& beta, const table& dy) {
  const index rows = x.rows, cols = x.cols;
  const double width = static_cast<double>(cols);
  const layer_norm_result f = layer_norm(x, gamma, beta, epsilon);
  norm_bounds b{table(rows, cols), table(rows, cols), table(rows, cols), table(1, cols),
                table(1, cols)};
  table dgamma_mass(1, cols), dbeta_mass(1, cols);
  for (index n = 0; n < rows; ++n) {
    double mean_abs = 0.0;
    for (index d = 0; d < cols; ++d) mean_abs += std::abs(x(n, d)) / width;
    const double rstd = f.rstd(n, 0);
    const double off = sum_bound<T>(cols + 1, mean_abs);
    const double relative = gamma_bound<T>(width + 8.0) + rstd * rstd * off * off;
    double g_mass = 0.0, gx_mass = 0.0, gx_error = 0.0, mean_g = 0.0, mean_gx = 0.0;
    for (index d = 0; d < cols; ++d) {
      const double xhat = (x(n, d) - f.mean(n, 0)) * rstd;
      const double g = dy(n, d) * gamma(0, d);
      b.xhat(n, d) = rstd * off + std::abs(xhat) * relative;
      b.y(n, d) = std::abs(gamma(0, d)) * b.xhat(n, d) +
                  rounding_bound<T>(3, std::abs(gamma(0, d) * xhat) + std::abs(beta(0, d)));
      g_mass += std::abs(g) / width;
      gx_mass += std::abs(g * xhat) / width;
      gx_error += std::abs(g) * b.xhat(n, d) / width;
      mean_g += g / width;
      mean_gx += g * xhat / width;
      dgamma_mass(0, d) += std::abs(dy(n, d) * xhat);
      dbeta_mass(0, d) += std::abs(dy(n, d));
      b.dgamma(0, d) += std::abs(dy(n, d)) * b.xhat(n, d);
    }
    // dx = rstd (g - mean g - xhat mean(g xhat)), term by term.
    for (index d = 0; d < cols; ++d) {
      const double xhat = std::abs((x(n, d) - f.mean(n, 0)) * rstd);
      const double g = std::abs(dy(n, d) * gamma(0, d));
      const double terms = g + std::abs(mean_g) + xhat * std::abs(mean_gx);
      b.dx(n, d) = rstd * (rounding_bound<T>(5, terms) + relative * terms +
                           sum_bound<T>(cols + 2, g_mass) + b.xhat(n, d) * std::abs(mean_gx) +
                           xhat * (sum_bound<T>(cols + 4, gx_mass) + gx_error));
    }
  }
  for (index d = 0; d < cols; ++d) {
    b.dgamma(0, d) += sum_bound<T>(rows + 1, dgamma_mass(0, d));
    b.dbeta(0, d) = sum_bound<T>(rows, dbeta_mass(0, d));
  }
  return b;
}

}  // namespace talpa::support::layer_norm_bounds
