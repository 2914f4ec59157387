// SPDX-License-Identifier: Apache-2.0
#include "support/reference.hpp"

#include <cmath>
#include <cstdio>
#include <stdexcept>
#include <utility>

namespace talpa::support {

table::table(index rows_, index cols_, std::vector<double> values_)
    : rows(rows_), cols(cols_), values(std::move(values_)) {
  if (static_cast<index>(values.size()) != rows * cols) {
    throw std::logic_error("a table of another size than its values");
  }
}

std::string exact_text(double value) {
  char text[40];
  std::snprintf(text, sizeof text, "%.17g", value);
  return text;
}

table absolute(const table& a) {
  return each(a, [](double v) { return std::abs(v); });
}

table transposed(const table& a) {
  table t(a.cols, a.rows);
  for (index r = 0; r < a.rows; ++r) {
    for (index c = 0; c < a.cols; ++c) t(c, r) = a(r, c);
  }
  return t;
}

table matmul(const table& a, const table& b) {
  if (a.cols != b.rows) throw std::logic_error("a product of tables that do not fit");
  table p(a.rows, b.cols);
  for (index r = 0; r < a.rows; ++r) {
    for (index c = 0; c < b.cols; ++c) {
      for (index k = 0; k < a.cols; ++k) p(r, c) += a(r, k) * b(k, c);
    }
  }
  return p;
}

table column_sums(const table& a) {
  table s(1, a.cols);
  for (index r = 0; r < a.rows; ++r) {
    for (index c = 0; c < a.cols; ++c) s(0, c) += a(r, c);
  }
  return s;
}

double total(const table& a) {
  double sum = 0.0;
  for (const double v : a.values) sum += v;
  return sum;
}

double largest(const table& a) {
  double most = 0.0;
  for (const double v : a.values) most = std::fmax(most, std::abs(v));
  return most;
}

double relu_value(double x) { return x > 0.0 ? x : 0.0; }
double relu_slope(double x) { return x > 0.0 ? 1.0 : 0.0; }
double sigmoid_value(double x) { return 1.0 / (1.0 + std::exp(-x)); }
double sigmoid_slope(double x) {
  const double s = sigmoid_value(x);
  return s * sigmoid_value(-x);
}
double tanh_value(double x) { return std::tanh(x); }
double tanh_slope(double x) {
  const double c = std::cosh(x);
  return 1.0 / (c * c);
}
double silu_value(double x) { return x * sigmoid_value(x); }
double silu_slope(double x) { return sigmoid_value(x) + x * sigmoid_slope(x); }

namespace {
const double gelu_factor = std::sqrt(2.0 / std::acos(-1.0));
constexpr double gelu_cubic = 0.044715;
}  // namespace

double gelu_tanh_value(double x) {
  return 0.5 * x * (1.0 + std::tanh(gelu_factor * (x + gelu_cubic * x * x * x)));
}
double gelu_tanh_slope(double x) {
  const double inner = gelu_factor * (x + gelu_cubic * x * x * x);
  const double inner_slope = gelu_factor * (1.0 + 3.0 * gelu_cubic * x * x);
  return 0.5 * (1.0 + std::tanh(inner)) + 0.5 * x * tanh_slope(inner) * inner_slope;
}

table softmax(const table& x) {
  table y(x.rows, x.cols);
  for (index r = 0; r < x.rows; ++r) {
    double top = -HUGE_VAL;
    for (index c = 0; c < x.cols; ++c) top = std::fmax(top, x(r, c));
    double sum = 0.0;
    for (index c = 0; c < x.cols; ++c) sum += y(r, c) = std::exp(x(r, c) - top);
    for (index c = 0; c < x.cols; ++c) y(r, c) /= sum;
  }
  return y;
}

table softmax_gradient(const table& y, const table& dy) {
  table dx(y.rows, y.cols);
  for (index r = 0; r < y.rows; ++r) {
    double mean = 0.0;
    for (index c = 0; c < y.cols; ++c) mean += y(r, c) * dy(r, c);
    for (index c = 0; c < y.cols; ++c) dx(r, c) = y(r, c) * (dy(r, c) - mean);
  }
  return dx;
}

scalar_and_gradient cross_entropy(const table& x, const std::vector<std::int32_t>& labels) {
  scalar_and_gradient result{0.0, table(x.rows, x.cols)};
  double counted = 0.0;
  for (const std::int32_t label : labels) counted += label >= 0 ? 1.0 : 0.0;
  if (counted == 0.0) return result;
  for (index r = 0; r < x.rows; ++r) {
    const std::int32_t label = labels[static_cast<std::size_t>(r)];
    if (label < 0) continue;
    double top = -HUGE_VAL;
    for (index c = 0; c < x.cols; ++c) top = std::fmax(top, x(r, c));
    double sum = 0.0;
    for (index c = 0; c < x.cols; ++c) sum += std::exp(x(r, c) - top);
    result.value += (std::log(sum) + top - x(r, label)) / counted;
    for (index c = 0; c < x.cols; ++c) {
      const double hit = c == label ? 1.0 : 0.0;
      result.gradient(r, c) = (std::exp(x(r, c) - top) / sum - hit) / counted;
    }
  }
  return result;
}

scalar_and_gradient mean_squared_error(const table& y, const table& target) {
  scalar_and_gradient result{0.0, table(y.rows, y.cols)};
  const double n = static_cast<double>(y.size());
  for (std::size_t i = 0; i < y.values.size(); ++i) {
    const double d = y.values[i] - target.values[i];
    result.value += d * d / n;
    result.gradient.values[i] = 2.0 * d / n;
  }
  return result;
}

layer_norm_result layer_norm(const table& x, const table& gamma, const table& beta,
                             double epsilon) {
  layer_norm_result result{table(x.rows, x.cols), table(x.rows, 1), table(x.rows, 1)};
  const double d = static_cast<double>(x.cols);
  for (index r = 0; r < x.rows; ++r) {
    double mean = 0.0, variance = 0.0;
    for (index c = 0; c < x.cols; ++c) mean += x(r, c) / d;
    for (index c = 0; c < x.cols; ++c) variance += (x(r, c) - mean) * (x(r, c) - mean) / d;
    const double rstd = 1.0 / std::sqrt(variance + epsilon);
    result.mean(r, 0) = mean;
    result.rstd(r, 0) = rstd;
    for (index c = 0; c < x.cols; ++c) {
      result.y(r, c) = (x(r, c) - mean) * rstd * gamma(0, c) + beta(0, c);
    }
  }
  return result;
}

layer_norm_gradients layer_norm_gradient(const table& x, const table& gamma, double epsilon,
                                         const table& dy) {
  layer_norm_gradients g{table(x.rows, x.cols), table(1, x.cols), table(1, x.cols)};
  const layer_norm_result f = layer_norm(x, gamma, table(1, x.cols), epsilon);
  // The Jacobian of one row, entry by entry:
  // d xhat_i / d x_j = rstd (delta_ij - 1 / D - xhat_i xhat_j / D).
  const double d = static_cast<double>(x.cols);
  for (index r = 0; r < x.rows; ++r) {
    const double mean = f.mean(r, 0), rstd = f.rstd(r, 0);
    for (index i = 0; i < x.cols; ++i) {
      const double xhat_i = (x(r, i) - mean) * rstd;
      g.dgamma(0, i) += dy(r, i) * xhat_i;
      g.dbeta(0, i) += dy(r, i);
      for (index j = 0; j < x.cols; ++j) {
        const double xhat_j = (x(r, j) - mean) * rstd;
        const double jacobian = rstd * ((i == j ? 1.0 : 0.0) - 1.0 / d - xhat_i * xhat_j / d);
        g.dx(r, j) += dy(r, i) * gamma(0, i) * jacobian;
      }
    }
  }
  return g;
}

void sgd_reference::step(table& value, const table& gradient) {
  if (velocity.values.empty()) velocity = table(value.rows, value.cols);
  for (std::size_t i = 0; i < value.values.size(); ++i) {
    const double g = gradient.values[i] + weight_decay * value.values[i];
    velocity.values[i] = momentum * velocity.values[i] + g;
    value.values[i] -=
        learning_rate * (nesterov ? g + momentum * velocity.values[i] : velocity.values[i]);
  }
}

void adamw_reference::step(table& value, const table& gradient) {
  if (first.values.empty()) {
    first = table(value.rows, value.cols);
    second = table(value.rows, value.cols);
  }
  ++steps;
  const double correction1 = 1.0 - std::pow(beta1, static_cast<double>(steps));
  const double correction2 = 1.0 - std::pow(beta2, static_cast<double>(steps));
  for (std::size_t i = 0; i < value.values.size(); ++i) {
    const double g = gradient.values[i];
    first.values[i] = beta1 * first.values[i] + (1.0 - beta1) * g;
    second.values[i] = beta2 * second.values[i] + (1.0 - beta2) * g * g;
    const double m = first.values[i] / correction1;
    const double v = second.values[i] / correction2;
    value.values[i] -= learning_rate * weight_decay * value.values[i];
    value.values[i] -= learning_rate * m / (std::sqrt(v) + epsilon);
  }
}

}  // namespace talpa::support
