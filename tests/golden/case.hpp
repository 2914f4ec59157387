// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/matrix.hpp>

#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

// Golden vectors as methods see them: tests/data/golden/README.md says what the files hold. Only
// case.cpp and runner.cpp know that they are JSON.

namespace talpa::golden {

/// A file or a case is not what the README says.
struct malformed : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// Numbers with a shape, row-major; a single number has no dimension.
struct tensor {
  std::vector<index> shape;
  std::vector<double> data;

  index size() const { return static_cast<index>(data.size()); }
  index dim(std::size_t i) const { return i < shape.size() ? shape[i] : 1; }
  /// [product of all dimensions but the last, last].
  matrix<double, cpu> rows() const;
  /// [E, P, Q] -> [E Q, P]: each block transposed, blocks one below the other.
  matrix<double, cpu> transposed_blocks() const;
};

/// How far a result may be from the file: |found - expected| <= max(relative |expected|, absolute).
struct tolerance {
  double relative = 0.0;
  double absolute = 0.0;
};

/// What is left of a number whose exact value is zero: a difference of numbers of size about one
/// after at most 256 roundings.
inline constexpr double rounding_floor = 256.0 * 0x1p-53;

/// For fields that the original rounds to float32 on the way, from numbers of size about one.
inline constexpr tolerance float32_inside{1e-6, 1e-6};

/// One case of a file.
class golden_case {
 public:
  struct node;

  golden_case(std::string name, std::string folder, std::string dtype,
              std::shared_ptr<const node> root);

  const std::string& name() const { return name_; }
  /// Tolerances of the README for this file.
  tolerance forward() const;
  tolerance gradient() const;

  /// Fields are named as in the file, with dots: "inputs.x", "grads.logits.0". Reading one that is
  /// not there, or is of another kind, throws malformed.
  bool has(const std::string& field) const;   ///< present and not null
  bool flag(const std::string& field) const;  ///< present and true
  double number(const std::string& field) const;
  index integer(const std::string& field) const;
  std::string text(const std::string& field) const;
  index length(const std::string& field) const;  ///< of a list
  tensor at(const std::string& field) const;
  /// The same with the shape it must have.
  tensor at(const std::string& field, const std::vector<index>& shape) const;

  /// What a method has to account for: every field of outputs and grads, and the loss.
  std::vector<std::string> expected() const;

 private:
  std::string name_;
  std::string folder_;
  std::string dtype_;
  std::shared_ptr<const node> root_;
};

/// Compares what a method computed with the fields of a case. Every expected field must be compared
/// or left out with a reason.
class checker {
 public:
  explicit checker(const golden_case& c) : case_(&c) {}

  /// `found` has the shape of the field with all dimensions but the last merged.
  void equal(const std::string& field, matrix_view<const double, cpu> found, tolerance allowed);
  void equal(const std::string& field, double found, tolerance allowed);
  /// Accounts for a field that is compared in another way; `problem` is empty if all is well.
  void account(const std::string& field, const std::string& problem);
  /// The library does not have what this field is about.
  void leave(const std::string& field, const std::string& reason);

  /// The first mismatch, or a field that nothing was said about; empty if there is none.
  std::string failure() const;
  /// Why the case is not a full pass; empty if it is.
  std::string skipped() const;

 private:
  void mismatch(const std::string& text);

  const golden_case* case_;
  std::vector<std::string> seen_;
  std::vector<std::pair<std::string, std::string>> left_;
  std::string mismatch_;
};

/// [e][i] and so on of element i of a tensor.
std::string position(const tensor& t, index i);

}  // namespace talpa::golden
