// SPDX-License-Identifier: Apache-2.0
#include "golden/case.hpp"

#include "golden/json.hpp"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <utility>

namespace talpa::golden {

namespace {

using nlohmann::json;

std::string digits(double value) {
  char text[40];
  std::snprintf(text, sizeof text, "%.17g", value);
  return text;
}

std::string shape_text(const std::vector<index>& shape) {
  std::string text = "[";
  for (const index d : shape) text += (text.size() > 1 ? ", " : "") + std::to_string(d);
  return text + "]";
}

bool is_number(const json& v) {
  return v.is_number() || v.is_boolean() ||
         (v.is_string() && (v == "nan" || v == "inf" || v == "-inf"));
}
double to_number(const json& v) {
  if (v.is_boolean()) return v.get<bool>() ? 1.0 : 0.0;
  if (v.is_number()) return v.get<double>();
  if (v == "nan") return std::numeric_limits<double>::quiet_NaN();
  return v == "inf" ? HUGE_VAL : -HUGE_VAL;
}

/// {shape, data}.
bool is_shaped(const json& v) { return v.is_object() && v.contains("shape") && v.contains("data"); }

/// Appends a nested list of numbers, which must be rectangular; dimension `depth` of shape.
void append(const std::string& field, const json& v, std::size_t depth, tensor& t) {
  if (is_number(v)) {
    if (depth != t.shape.size()) throw malformed("'" + field + "' is a ragged list");
    t.data.push_back(to_number(v));
    return;
  }
  if (!v.is_array()) throw malformed("'" + field + "' holds " + v.dump() + ", expected a number");
  if (t.data.empty() && depth == t.shape.size()) t.shape.push_back(static_cast<index>(v.size()));
  if (depth >= t.shape.size() || t.shape[depth] != static_cast<index>(v.size())) {
    throw malformed("'" + field + "' is a ragged list");
  }
  for (const json& element : v) append(field, element, depth + 1, t);
}

tensor to_tensor(const std::string& field, const json& v) {
  tensor t;
  if (!is_shaped(v)) {
    append(field, v, 0, t);
    return t;
  }
  if (!v["shape"].is_array() || !v["data"].is_array()) {
    throw malformed("'" + field + "' has a shape or data that is no list");
  }
  index size = 1;
  for (const json& d : v["shape"]) {
    if (!d.is_number_integer() || d.get<long long>() < 0) {
      throw malformed("'" + field + "' has the shape " + v["shape"].dump());
    }
    t.shape.push_back(static_cast<index>(d.get<long long>()));
    size *= t.shape.back();
  }
  for (const json& element : v["data"]) {
    if (!is_number(element)) {
      throw malformed("'" + field + "' holds " + element.dump() + ", expected a number");
    }
    t.data.push_back(to_number(element));
  }
  if (size != t.size()) {
    throw malformed("'" + field + "' has " + std::to_string(t.size()) + " numbers, expected " +
                    std::to_string(size) + " = product of its shape " + shape_text(t.shape));
  }
  return t;
}

/// The node at a path of keys joined by dots. Keys have dots themselves ("experts.w1"): each way to
/// cut the path is tried, the shortest key first.
const json* find(const json& root, const std::string& field) {
  if (root.is_array()) {
    const std::size_t dot = std::min(field.find('.'), field.size());
    const std::string key = field.substr(0, dot);
    const bool digits = !key.empty() && key.find_first_not_of("0123456789") == std::string::npos;
    if (!digits || std::stoul(key) >= root.size()) return nullptr;
    const json& next = root[std::stoul(key)];
    return dot == field.size() ? &next : find(next, field.substr(dot + 1));
  }
  for (std::size_t from = 0; root.is_object() && from <= field.size();) {
    const std::size_t dot = std::min(field.find('.', from), field.size());
    const auto entry = root.find(field.substr(0, dot));
    if (entry != root.end()) {
      const json* const found = dot == field.size() ? &*entry : find(*entry, field.substr(dot + 1));
      if (found != nullptr) return found;
    }
    from = dot + 1;
  }
  return nullptr;
}

const json& get(const json& root, const std::string& field) {
  const json* const found = find(root, field);
  if (found == nullptr) throw malformed("no field '" + field + "'");
  if (found->is_null()) throw malformed("'" + field + "' is null");
  return *found;
}

/// Names of the comparable fields below `v`: lists of tensors and plain objects are entered.
void leaves(const std::string& name, const json& v, std::vector<std::string>& out) {
  if (v.is_null()) return;
  if (v.is_object() && !is_shaped(v)) {
    for (const auto& [key, value] : v.items()) leaves(name + "." + key, value, out);
  } else if (v.is_array() && !v.empty() && is_shaped(v[0])) {
    for (std::size_t i = 0; i < v.size(); ++i) leaves(name + "." + std::to_string(i), v[i], out);
  } else {
    out.push_back(name);
  }
}

}  // namespace

matrix<double, cpu> tensor::rows() const {
  const index cols = shape.empty() ? 1 : shape.back();
  matrix<double, cpu> m(cols == 0 ? 0 : size() / cols, cols);
  std::copy(data.begin(), data.end(), m.data());
  return m;
}

matrix<double, cpu> tensor::transposed_blocks() const {
  const index blocks = dim(0), p = dim(1), q = dim(2);
  matrix<double, cpu> m(blocks * q, p);
  for (index e = 0; e < blocks; ++e) {
    for (index i = 0; i < p; ++i) {
      for (index j = 0; j < q; ++j) {
        m(e * q + j, i) = data[static_cast<std::size_t>((e * p + i) * q + j)];
      }
    }
  }
  return m;
}

golden_case::golden_case(std::string name, std::string folder, std::string dtype,
                         std::shared_ptr<const node> root)
    : name_(std::move(name)),
      folder_(std::move(folder)),
      dtype_(std::move(dtype)),
      root_(std::move(root)) {}

tolerance golden_case::forward() const {
  if (folder_ == "routers") return {1e-9, rounding_floor};
  return dtype_.rfind("float32", 0) == 0 ? tolerance{1e-5, 1e-5} : tolerance{1e-10, rounding_floor};
}
tolerance golden_case::gradient() const {
  if (folder_ == "routers") return {1e-8, rounding_floor};
  return dtype_.rfind("float32", 0) == 0 ? tolerance{1e-4, 1e-4} : tolerance{1e-9, rounding_floor};
}

bool golden_case::has(const std::string& field) const {
  const json* const found = find(root_->value, field);
  return found != nullptr && !found->is_null();
}
bool golden_case::flag(const std::string& field) const {
  const json* const found = find(root_->value, field);
  return found != nullptr && found->is_boolean() && found->get<bool>();
}
double golden_case::number(const std::string& field) const {
  const json& v = get(root_->value, field);
  if (!is_number(v)) throw malformed("'" + field + "' is " + v.dump() + ", expected a number");
  return to_number(v);
}
index golden_case::integer(const std::string& field) const {
  const json& v = get(root_->value, field);
  if (!v.is_number_integer()) {
    throw malformed("'" + field + "' is " + v.dump() + ", expected a whole number");
  }
  return static_cast<index>(v.get<long long>());
}
std::string golden_case::text(const std::string& field) const {
  const json& v = get(root_->value, field);
  if (!v.is_string()) throw malformed("'" + field + "' is " + v.dump() + ", expected a string");
  return v.get<std::string>();
}
index golden_case::length(const std::string& field) const {
  const json& v = get(root_->value, field);
  if (!v.is_array()) throw malformed("'" + field + "' is no list");
  return static_cast<index>(v.size());
}
tensor golden_case::at(const std::string& field) const {
  return to_tensor(field, get(root_->value, field));
}
tensor golden_case::at(const std::string& field, const std::vector<index>& shape) const {
  tensor t = at(field);
  if (t.shape != shape) {
    throw malformed("'" + field + "' has shape " + shape_text(t.shape) + ", expected " +
                    shape_text(shape));
  }
  return t;
}

std::vector<std::string> golden_case::expected() const {
  std::vector<std::string> fields;
  for (const char* const section : {"outputs", "grads", "loss"}) {
    const json* const v = find(root_->value, section);
    if (v != nullptr) leaves(section, *v, fields);
  }
  return fields;
}

std::string position(const tensor& t, index i) {
  std::string text;
  for (std::size_t d = t.shape.size(); d-- > 0;) {
    text = "[" + std::to_string(i % t.shape[d]) + "]" + text;
    i /= t.shape[d];
  }
  return text;
}

void checker::mismatch(const std::string& text) {
  if (mismatch_.empty()) mismatch_ = text;
}

void checker::equal(const std::string& field, matrix_view<const double, cpu> found,
                    tolerance allowed) {
  seen_.push_back(field);
  const tensor expected = case_->at(field);
  const index cols = expected.shape.empty() ? 1 : expected.shape.back();
  if (found.cols != cols || found.size() != expected.size()) {
    mismatch(field + " has shape [" + std::to_string(found.rows) + ", " +
             std::to_string(found.cols) + "], expected " + shape_text(expected.shape));
    return;
  }
  for (index i = 0; i < expected.size(); ++i) {
    const double is = found(i / cols, i % cols),
                 should = expected.data[static_cast<std::size_t>(i)];
    const double bound = std::max(allowed.relative * std::abs(should), allowed.absolute);
    const bool same = std::isfinite(should) ? std::abs(is - should) <= bound
                                            : is == should || (is != is && should != should);
    if (same) continue;
    mismatch(field + position(expected, i) + " is " + digits(is) + ", expected " + digits(should) +
             " within " + digits(bound));
    return;
  }
}

void checker::equal(const std::string& field, double found, tolerance allowed) {
  equal(field, matrix_view<const double, cpu>(&found, 1, 1), allowed);
}

void checker::account(const std::string& field, const std::string& problem) {
  seen_.push_back(field);
  if (!problem.empty()) mismatch(field + ": " + problem);
}

void checker::leave(const std::string& field, const std::string& reason) {
  left_.emplace_back(field, reason);
}

std::string checker::failure() const {
  if (!mismatch_.empty()) return mismatch_;
  for (const std::string& field : case_->expected()) {
    const bool seen = std::find(seen_.begin(), seen_.end(), field) != seen_.end();
    const bool left = std::find_if(left_.begin(), left_.end(), [&](const auto& entry) {
                        return entry.first == field;
                      }) != left_.end();
    if (!seen && !left) return field + " was neither compared nor left out with a reason";
  }
  return {};
}

std::string checker::skipped() const {
  std::string text;
  for (std::size_t i = 0; i < left_.size(); ++i) {
    text += (i > 0 ? ", " : "") + left_[i].first;
    if (i + 1 == left_.size() || left_[i + 1].second != left_[i].second) {
      text += ": " + left_[i].second;
    }
  }
  return text;
}

}  // namespace talpa::golden
