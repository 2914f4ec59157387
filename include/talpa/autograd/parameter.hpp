// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/check.hpp>
#include <talpa/core/matrix.hpp>
#include <talpa/core/mode.hpp>
#include <talpa/core/row_run.hpp>
#include <talpa/core/scalar.hpp>
#include <talpa/ops/fill.hpp>
#include <talpa/ops/packed_gemm.hpp>

#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

namespace talpa {

/// Which products with a frozen weight W [O, D] read packed copies of it.
enum class packing {
  forward,  ///< y = x W^T
  both,     ///< and dx = dy W, at twice the memory
};

/// A named matrix of weights with the gradient of the rows that train.
///
/// Storage: value [rows, cols], owned or borrowed; grad [trained rows, cols], absent when frozen.
/// Trainability may be given per block of rows (the experts of a stacked bank): the gradient then
/// holds those blocks only, one behind the other, and an optimiser keeps state of that size.
/// Changing trainability zeroes the gradient.
template <floating T, backend B>
class parameter {
 public:
  parameter() = default;
  /// Owns its value; trains.
  parameter(std::string name, matrix<T, B> value)
      : name_(std::move(name)), owned_(std::move(value)) {
    train();
  }
  /// Works on memory of somebody else, which must outlive it; frozen until train().
  static parameter borrow(std::string name, matrix_view<T, B> value) {
    parameter p;
    p.name_ = std::move(name);
    p.borrowed_ = value;
    return p;
  }

  const std::string& name() const { return name_; }
  void rename(std::string name) { name_ = std::move(name); }
  index rows() const { return value().rows; }
  index cols() const { return value().cols; }
  index size() const { return rows() * cols(); }
  /// False for a default-made parameter, which stands for "this layer has none".
  bool exists() const { return value().data != nullptr; }

  /// Drops packed copies, for what it gives away can be changed.
  matrix_view<T, B> value() {
    unpack();
    return owned_.data() != nullptr ? owned_.view() : borrowed_;
  }
  matrix_view<const T, B> value() const {
    return owned_.data() != nullptr ? owned_.view() : matrix_view<const T, B>(borrowed_);
  }
  /// [trained rows, cols].
  matrix_view<T, B> grad() { return grad_.view(); }
  matrix_view<const T, B> grad() const { return grad_.view(); }

  /// Clears the gradient for the next step.
  void zero_grad(context<B>& ctx) { ops::fill(ctx, T{0}, grad()); }

  /// Packs a frozen value W [O, D] once for many products (`packed_matrix`, CPU). Copies of the
  /// parameter share the packed ones, which live until a row trains, somebody asks a parameter that
  /// is not const for value(), or unpack(). Changes of borrowed memory by its owner, or through a
  /// view from before, do not reach them.
  /// With weight_storage::bfloat16 products with packed copies see W rounded to 8 significant bits;
  /// value() and what reads it keep the exact one.
  ///
  /// Memory: D times O rounded up to a cache line for products with W^T, O times D rounded up for
  /// those with W; half of that as bfloat16.
  /// Determinism: a product with a packed copy may be rounded otherwise than without.
  /// Throws: value_error when rows train, or when doubles are to be stored as bfloat16.
  void pack(context<B>& ctx, packing which = packing::both,
            weight_storage storage = weight_storage::exact) {
    check_frozen();
    const matrix_view<const T, B> w = std::as_const(*this).value();
    auto transposed = std::make_shared<const packed_matrix<T, B>>(ctx, w, transpose::yes, storage);
    unpack();
    packed_transpose_ = std::move(transposed);
    if (which == packing::both) {
      packed_ = std::make_shared<const packed_matrix<T, B>>(ctx, w, transpose::no, storage);
    }
  }
  /// Takes packed copies of a frozen value W [O, D] that the caller made: W^T [D, O] and W [O, D],
  /// the second empty for packing::forward. So they can lie in memory of the caller's
  /// (packed_matrix::borrow), which then must outlive them here. Whether they hold W is not looked
  /// at.
  /// Throws: value_error when rows train; shape_error for other shapes. Copies from before stay.
  void pack(packed_matrix<T, B> transposed, packed_matrix<T, B> plain = {}) {
    check_frozen();
    const auto check = [](const char* argument, const packed_matrix<T, B>& m, index rows,
                          index cols, const char* meaning) {
      if (m.rows() == rows && m.cols() == cols) return;
      detail::throw_shape("parameter::pack", argument, m.rows(), m.cols(), rows, cols, meaning);
    };
    const bool has_plain = plain.rows() != 0 || plain.cols() != 0;
    check("transposed", transposed, cols(), rows(), "value transposed");
    if (has_plain) check("plain", plain, rows(), cols(), "value");
    unpack();
    packed_transpose_ = std::make_shared<const packed_matrix<T, B>>(std::move(transposed));
    if (has_plain) packed_ = std::make_shared<const packed_matrix<T, B>>(std::move(plain));
  }
  /// Releases what pack made or took.
  void unpack() {
    // Where nothing is packed nothing is written: several threads may ask for value().
    if (packed_transpose_) packed_transpose_.reset();
    if (packed_) packed_.reset();
  }
  /// W^T [D, O] and W [O, D] as right operands, null where they are not packed.
  const packed_matrix<T, B>* packed_transpose() const { return packed_transpose_.get(); }
  const packed_matrix<T, B>* packed() const { return packed_.get(); }

  bool trainable() const { return !runs_.empty(); }
  /// Runs of consecutive trained rows in ascending order; one run when all train, none when frozen.
  std::span<const row_run> trained() const { return runs_; }
  /// Number of weights that train.
  index trained_size() const { return grad_.size(); }

  /// No row trains; the gradient's memory is released.
  void freeze() {
    runs_.clear();
    grad_ = matrix<T, B>();
  }
  /// Every row trains.
  void train() {
    unpack();
    runs_.clear();
    if (size() > 0) runs_.push_back({0, rows(), 0});
    grad_ = matrix<T, B>(rows(), cols());
  }
  /// Only the given blocks of `block_rows` rows train: block b is rows [b * block_rows, ...).
  /// Throws value_error when block_rows does not divide the rows, or a block does not exist or
  /// comes twice; the parameter is then unchanged.
  void train_blocks(index block_rows, std::span<const index> blocks) {
    check_at_least("parameter::train_blocks", "block_rows", block_rows, 1, "rows of one block");
    if (rows() % block_rows != 0) {
      detail::throw_value(
          "parameter::train_blocks", "block_rows", std::to_string(block_rows),
          detail::concat("a divisor of ", std::to_string(rows()), " = rows of ", name_));
    }
    const index count = rows() / block_rows;
    std::vector<bool> on(static_cast<std::size_t>(count), false);
    for (const index b : blocks) {
      check_range("parameter::train_blocks", "blocks", b, 0, count - 1, "blocks of the parameter");
      if (on[static_cast<std::size_t>(b)]) {
        detail::throw_value("parameter::train_blocks", "blocks",
                            detail::concat(std::to_string(b), " twice"), "each block once");
      }
      on[static_cast<std::size_t>(b)] = true;
    }
    std::vector<row_run> runs;
    index grad_rows = 0;
    for (index b = 0; b < count; ++b) {
      if (!on[static_cast<std::size_t>(b)]) continue;
      if (!runs.empty() && runs.back().first + runs.back().rows == b * block_rows) {
        runs.back().rows += block_rows;
      } else {
        runs.push_back({b * block_rows, block_rows, grad_rows});
      }
      grad_rows += block_rows;
    }
    if (!runs.empty()) unpack();
    grad_ = matrix<T, B>(grad_rows, cols());
    runs_ = std::move(runs);
  }

 private:
  void check_frozen() const {
    if (trainable()) {
      detail::throw_value("parameter::pack", "value", "trainable",
                          detail::concat("frozen = state in which ", name_, " can be packed"));
    }
  }

  std::string name_;
  matrix<T, B> owned_;
  matrix_view<T, B> borrowed_;
  matrix<T, B> grad_;
  std::vector<row_run> runs_;
  // Shared, so that a backend without packed_matrix needs no such type.
  std::shared_ptr<const packed_matrix<T, B>> packed_transpose_;
  std::shared_ptr<const packed_matrix<T, B>> packed_;
};

}  // namespace talpa
