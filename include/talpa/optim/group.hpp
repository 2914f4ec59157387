// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/autograd/parameter.hpp>
#include <talpa/core/check.hpp>
#include <talpa/core/error.hpp>

#include <concepts>
#include <cstddef>
#include <limits>
#include <span>
#include <string>
#include <utility>
#include <vector>

namespace talpa {

/// Parameters that share a learning rate and a weight decay. Frozen ones may be among them: they
/// get no state and no update.
template <floating T, backend B>
struct parameter_group {
  std::string name{};  ///< for errors
  std::vector<parameter<T, B>*>
      parameters{};             ///< must outlive the optimiser and stay where they are
  double learning_rate = 1e-3;  ///< >= 0
  double weight_decay = 0.0;    ///< >= 0; what it means is the optimiser's affair

  /// Appends a parameter, or every parameter that `params.visit(f)` shows, in its order.
  template <class Params>
  parameter_group& add(Params& params) {
    if constexpr (std::same_as<Params, parameter<T, B>>) {
      parameters.push_back(&params);
    } else {
      params.visit([&](parameter<T, B>& p) { parameters.push_back(&p); });
    }
    return *this;
  }
};

/// What every optimiser keeps of its groups: each parameter once, its group, and the rows that
/// trained when the optimiser was made, because its state has their shape.
template <floating T, backend B>
class parameter_set {
 public:
  struct entry {
    parameter<T, B>* source;
    std::size_t group;
    std::vector<row_run> runs;
  };

  /// `function` is the optimiser's name in errors. Throws value_error for a null parameter, one
  /// that stands in two places, a rate or decay below 0 or not finite, and groups in which nothing
  /// trains.
  parameter_set(const char* function, std::vector<parameter_group<T, B>> groups)
      : groups_(std::move(groups)) {
    bool trains = false;
    for (std::size_t g = 0; g < groups_.size(); ++g) {
      const parameter_group<T, B>& group = groups_[g];
      check_rate(function, "learning_rate", group.learning_rate, group.name);
      check_rate(function, "weight_decay", group.weight_decay, group.name);
      for (parameter<T, B>* p : group.parameters) {
        if (p == nullptr) {
          detail::throw_value(function, "parameters", "null",
                              detail::concat("a parameter in group ", group.name));
        }
        for (const entry& other : entries_) {
          if (other.source != p) continue;
          detail::throw_value(
              function, p->name().c_str(),
              detail::concat("in groups ", groups_[other.group].name, " and ", group.name),
              "each parameter in one place of one group");
        }
        entries_.push_back({p, g, {p->trained().begin(), p->trained().end()}});
        parameters_.push_back(p);
        trains = trains || p->trainable();
      }
    }
    if (!trains) {
      std::string names;
      for (const parameter_group<T, B>& group : groups_) {
        names.append(names.empty() ? "" : ", ").append(group.name);
      }
      detail::throw_value(function, "groups",
                          detail::concat("[", names, "] in which nothing trains"),
                          "at least one parameter that trains");
    }
  }

  const std::vector<entry>& entries() const { return entries_; }
  const parameter_group<T, B>& group_of(const entry& e) const { return groups_[e.group]; }
  /// All parameters in the order of the groups.
  std::span<parameter<T, B>* const> parameters() const { return parameters_; }

  /// Throws value_error when other rows of a parameter train than did at construction.
  void check_unchanged(const char* function) const {
    for (const entry& e : entries_) {
      const std::span<const row_run> now = e.source->trained();
      bool same = now.size() == e.runs.size();
      for (std::size_t i = 0; same && i < now.size(); ++i) same = now[i] == e.runs[i];
      if (same) continue;
      detail::throw_value(
          function, e.source->name().c_str(), detail::concat("trained in rows ", rows_text(now)),
          detail::concat(rows_text(e.runs),
                         " = rows that trained when the optimiser was made; make a new one after "
                         "freeze, train or train_blocks"));
    }
  }

  void zero_grad(context<B>& ctx) {
    for (parameter<T, B>* p : parameters_) p->zero_grad(ctx);
  }

  /// Position of a parameter among the entries; throws value_error for one of somebody else.
  std::size_t find(const char* function, const parameter<T, B>& p) const {
    for (std::size_t i = 0; i < entries_.size(); ++i) {
      if (entries_[i].source == &p) return i;
    }
    detail::throw_value(function, p.name().c_str(), "in no group", "a parameter of this optimiser");
  }

 private:
  static void check_rate(const char* function, const char* argument, double value,
                         const std::string& group) {
    if (value >= 0.0 && value <= std::numeric_limits<double>::max()) return;
    detail::throw_value(function, argument, detail::number_text(value),
                        detail::concat("a finite number >= 0 in group ", group));
  }

  /// [0, 4) and [8, 10): half-open ranges, or none.
  static std::string rows_text(std::span<const row_run> runs) {
    std::string text;
    for (const row_run& run : runs) {
      text.append(text.empty() ? "[" : " and [")
          .append(std::to_string(run.first))
          .append(", ")
          .append(std::to_string(run.first + run.rows))
          .append(")");
    }
    return text.empty() ? "none" : text;
  }

  std::vector<parameter_group<T, B>> groups_;
  std::vector<entry> entries_;
  std::vector<parameter<T, B>*> parameters_;
};

}  // namespace talpa
