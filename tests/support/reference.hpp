// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/index.hpp>
#include <talpa/core/view.hpp>

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

// Slow references in double precision: plain loops that follow the written mathematics and share no
// code with the library. Compiled once for all tests.

namespace talpa::support {

/// A row-major matrix of doubles.
struct table {
  index rows = 0;
  index cols = 0;
  std::vector<double> values;

  table() = default;
  table(index rows_, index cols_, double fill = 0.0)
      : rows(rows_), cols(cols_), values(static_cast<std::size_t>(rows_ * cols_), fill) {}
  /// Written out row by row.
  table(index rows_, index cols_, std::vector<double> values_);

  index size() const { return rows * cols; }
  double& operator()(index r, index c) { return values[static_cast<std::size_t>(r * cols + c)]; }
  double operator()(index r, index c) const {
    return values[static_cast<std::size_t>(r * cols + c)];
  }
};

/// What a view shows, widened.
template <class T>
table to_table(const matrix_view<T, cpu>& view) {
  table t(view.rows, view.cols);
  for (index r = 0; r < view.rows; ++r) {
    for (index c = 0; c < view.cols; ++c) t(r, c) = static_cast<double>(view(r, c));
  }
  return t;
}
template <class T>
table to_table(const vector_view<T, cpu>& view) {
  return to_table(matrix_view<T, cpu>(view.data, 1, view.size));
}

/// A number with all its digits.
std::string exact_text(double value);

/// f applied to each element.
template <class F>
table each(const table& a, F f) {
  table r(a.rows, a.cols);
  for (std::size_t i = 0; i < a.values.size(); ++i) r.values[i] = f(a.values[i]);
  return r;
}
/// f applied to each pair of elements of two tables of one shape.
template <class F>
table each(const table& a, const table& b, F f) {
  table r(a.rows, a.cols);
  for (std::size_t i = 0; i < a.values.size(); ++i) r.values[i] = f(a.values[i], b.values[i]);
  return r;
}
table absolute(const table& a);
table transposed(const table& a);
/// a b.
table matmul(const table& a, const table& b);
/// Sums of columns [1, cols].
table column_sums(const table& a);
/// Sum of all elements.
double total(const table& a);
/// Largest absolute value; 0 of nothing.
double largest(const table& a);

// Scalar functions by libm.
double relu_value(double x);
double relu_slope(double x);
double sigmoid_value(double x);
double sigmoid_slope(double x);
double tanh_value(double x);
double tanh_slope(double x);
double silu_value(double x);
double silu_slope(double x);
/// x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))).
double gelu_tanh_value(double x);
double gelu_tanh_slope(double x);

/// Row softmax.
table softmax(const table& x);
/// Gradient of row softmax with y = softmax(x): y (dy - sum(dy y)).
table softmax_gradient(const table& y, const table& dy);

struct scalar_and_gradient {
  double value = 0.0;
  table gradient;
};
/// Mean over rows with a label >= 0 of -log softmax(x)[label], and its gradient; 0 without rows.
scalar_and_gradient cross_entropy(const table& x, const std::vector<std::int32_t>& labels);
/// Mean of squared differences and its gradient with respect to y.
scalar_and_gradient mean_squared_error(const table& y, const table& target);

struct layer_norm_result {
  table y;     // [N, D]
  table mean;  // [N, 1]
  table rstd;  // [N, 1]
};
layer_norm_result layer_norm(const table& x, const table& gamma, const table& beta, double epsilon);
struct layer_norm_gradients {
  table dx;      // [N, D]
  table dgamma;  // [1, D]
  table dbeta;   // [1, D]
};
layer_norm_gradients layer_norm_gradient(const table& x, const table& gamma, double epsilon,
                                         const table& dy);

/// One step of stochastic gradient descent as torch.optim.SGD documents it, dampening 0. `velocity`
/// starts as zeros.
struct sgd_reference {
  double learning_rate = 0.0;
  double momentum = 0.0;
  double weight_decay = 0.0;
  bool nesterov = false;
  table velocity{};
  void step(table& value, const table& gradient);
};

/// AdamW as in algorithm 2 of Loshchilov and Hutter (2019) with epsilon outside the square root, as
/// torch.optim.AdamW documents it.
struct adamw_reference {
  double learning_rate = 0.0;
  double beta1 = 0.9;
  double beta2 = 0.999;
  double epsilon = 1e-8;
  double weight_decay = 0.0;
  index steps = 0;
  table first{};
  table second{};
  void step(table& value, const table& gradient);
};

/// Central differences of a scalar function of `x`: f is called with perturbed copies.
template <class F>
table central_differences(const table& x, double step, F f) {
  table gradient(x.rows, x.cols);
  table probe = x;
  for (std::size_t i = 0; i < x.values.size(); ++i) {
    probe.values[i] = x.values[i] + step;
    const double above = f(probe);
    probe.values[i] = x.values[i] - step;
    const double below = f(probe);
    probe.values[i] = x.values[i];
    gradient.values[i] = (above - below) / (2.0 * step);
  }
  return gradient;
}

}  // namespace talpa::support
