// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "device.hpp"
#include "support/padded.hpp"
#include "support/random.hpp"
#include "support/tolerance.hpp"

#include <talpa/core/transfer.hpp>

#include <cstring>
#include <string>
#include <utility>

// Ops of a device beside those of the host. `device` is the simulated device or a real one, by the
// include path.

namespace talpa::support {

/// A matrix of the host and its copy on the device, which lies inside longer rows: its stride
/// exceeds its columns, and what is outside must stay as it is.
template <class T>
class on_device {
 public:
  explicit on_device(matrix<T, cpu> values)
      : host_(std::move(values)),
        padded_(make_padded(host_)),
        device_(to_device<device>(padded_.view())) {}

  const matrix<T, cpu>& host() const { return host_; }
  matrix_view<T, device> view() {
    return device_.view().row_range(1, host_.rows()).col_range(1, host_.cols());
  }
  /// What the device holds now.
  matrix<T, cpu> now() { return to_host(view()); }
  /// Whether nothing outside was written.
  bool intact() {
    const matrix<T, cpu> all = to_host(device_.view());
    for (index r = 0; r < all.rows(); ++r) {
      for (index c = 0; c < all.cols(); ++c) {
        const bool inside = r >= 1 && r <= host_.rows() && c >= 1 && c <= host_.cols();
        if (!inside && std::memcmp(&all(r, c), &padded_(r, c), sizeof(T)) != 0) return false;
      }
    }
    return true;
  }

 private:
  static matrix<T, cpu> make_padded(const matrix<T, cpu>& inner) {
    matrix<T, cpu> all(inner.rows() + 2, inner.cols() + 3);
    std::memset(static_cast<void*>(all.data()), 0xff,
                static_cast<std::size_t>(all.size()) * sizeof(T));
    for (index r = 0; r < inner.rows(); ++r) {
      for (index c = 0; c < inner.cols(); ++c) all(r + 1, c + 1) = inner(r, c);
    }
    return all;
  }

  matrix<T, cpu> host_;
  matrix<T, cpu> padded_;
  matrix<T, device> device_;
};

/// The same numbers in double, which the reference computes with.
template <class T>
matrix<double, cpu> in_double(const matrix<T, cpu>& m) {
  matrix<double, cpu> wide(m.rows(), m.cols());
  for (index i = 0; i < m.size(); ++i) wide.data()[i] = static_cast<double>(m.data()[i]);
  return wide;
}

/// Empty when two matrices have the same bits, but for the payload of a NaN; else where they
/// differ.
template <class T>
std::string bit_difference(const matrix<T, cpu>& a, const matrix<T, cpu>& b) {
  if (a.rows() != b.rows() || a.cols() != b.cols()) return "shapes differ";
  for (index r = 0; r < a.rows(); ++r) {
    for (index c = 0; c < a.cols(); ++c) {
      const T x = a(r, c), y = b(r, c);
      if (x != x && y != y) continue;
      if (std::memcmp(&x, &y, sizeof(T)) != 0) {
        return "element [" + std::to_string(r) + ", " + std::to_string(c) + "] is " +
               std::to_string(x) + ", expected " + std::to_string(y);
      }
    }
  }
  return "";
}

}  // namespace talpa::support
