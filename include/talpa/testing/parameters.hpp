// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/autograd/parameter.hpp>
#include <talpa/testing/bounds.hpp>
#include <talpa/testing/gradient_check.hpp>
#include <talpa/testing/inputs.hpp>

#include <algorithm>
#include <memory>
#include <string>
#include <utility>
#include <vector>

// What the laws do to all parameters of a policy, through its `params.visit`.

namespace talpa::testing::detail {

/// The params of some policy, whatever their type.
template <floating T>
class parameter_bag {
 public:
  template <class Params>
  explicit parameter_bag(Params p) {
    auto owner = std::make_shared<Params>(std::move(p));
    owner->visit([&](parameter<T, cpu>& q) { all_.push_back(&q); });
    owner_ = std::move(owner);
  }
  template <class F>
  void visit(F f) {
    for (parameter<T, cpu>* q : all_) f(*q);
  }
  /// The params that it was made of.
  template <class Params>
  Params& as() {
    return *static_cast<Params*>(owner_.get());
  }

 private:
  std::shared_ptr<void> owner_;
  std::vector<parameter<T, cpu>*> all_;
};

/// Pointers to the parameters in visiting order.
template <floating T, class Params>
std::vector<parameter<T, cpu>*> parameters_of(Params& p) {
  std::vector<parameter<T, cpu>*> all;
  p.visit([&](parameter<T, cpu>& q) { all.push_back(&q); });
  return all;
}

template <floating T, class Params>
void fill_gradients(Params& p, T value) {
  for (parameter<T, cpu>* q : parameters_of<T>(p)) {
    std::fill_n(q->grad().data, q->grad().size(), value);
  }
}

/// Adds uneven numbers to every weight, so that none keeps a special initial value.
template <floating T, class Params>
void shake(Params& p, generator& random, double scale) {
  for (parameter<T, cpu>* q : parameters_of<T>(p)) {
    const matrix<T, cpu> noise = uneven<T>(q->rows(), q->cols(), random, scale);
    for (index r = 0; r < q->rows(); ++r) {
      for (index c = 0; c < q->cols(); ++c) q->value()(r, c) += noise(r, c);
    }
  }
}

/// Copies of all gradients.
template <floating T, class Params>
std::vector<matrix<T, cpu>> gradients_of(Params& p) {
  std::vector<matrix<T, cpu>> all;
  for (parameter<T, cpu>* q : parameters_of<T>(p)) all.emplace_back(q->grad());
  return all;
}

using testing::first_difference;

/// Empty, or the first gradient that differs.
template <floating T>
std::string first_difference(const std::vector<matrix<T, cpu>>& found,
                             const std::vector<matrix<T, cpu>>& expected) {
  for (std::size_t i = 0; i < expected.size(); ++i) {
    const std::string text = testing::first_difference(found[i], expected[i]);
    if (!text.empty()) {
      return talpa::detail::concat("gradient of parameter ", std::to_string(i), ": ", text);
    }
  }
  return {};
}

/// Largest absolute weight.
template <floating T, class Params>
double largest_weight(Params& p) {
  double most = 0.0;
  for (parameter<T, cpu>* q : parameters_of<T>(p)) most = std::max(most, largest(q->value()));
  return most;
}

/// A probe for each parameter that trains and its gradient.
template <class Params>
void add_probes(Params& p, std::vector<gradient_probe>& probes) {
  for (parameter<double, cpu>* q : parameters_of<double>(p)) {
    if (q->trainable()) probes.push_back({q->name(), q->value(), q->grad()});
  }
}

/// Names begin with the prefix and differ, everything trains, and the same generator gives the same
/// weights. `make(generator, prefix)` returns fresh parameters.
template <floating T, class Make>
void initialisation_laws(report& out, Make make) {
  law named(out, "parameters have different names that begin with the prefix, and train");
  law repeated(out, "the same generator gives the same parameters in the same order");
  generator one(77), two(77), three(78);
  auto a = make(one, std::string("here.")), b = make(two, std::string("here."));
  auto c = make(three, std::string("here."));
  std::vector<std::string> names;
  const auto first = parameters_of<T>(a), second = parameters_of<T>(b), other = parameters_of<T>(c);
  bool differs = false, any = false;
  for (std::size_t i = 0; i < first.size(); ++i) {
    const std::string& name = first[i]->name();
    named.expect(name.rfind("here.", 0) == 0 && name.size() > 5 &&
                     std::find(names.begin(), names.end(), name) == names.end() &&
                     first[i]->trained_size() == first[i]->size() && first[i]->exists(),
                 [&] { return talpa::detail::concat("not '", name, "'"); });
    names.push_back(name);
    repeated.expect(i < second.size() && second[i]->name() == name, [&] { return name; });
    if (i >= second.size() || i >= other.size()) continue;
    repeated.expect_none(testing::first_difference<T>(second[i]->value(), first[i]->value()), name);
    any = any || largest(first[i]->value()) > 0.0;
    differs =
        differs || !testing::first_difference<T>(other[i]->value(), first[i]->value()).empty();
  }
  repeated.expect(one == two, [] { return std::string("the generators stand elsewhere"); });
  repeated.expect(differs || !any,
                  [] { return std::string("another generator gives them as well"); });
}

}  // namespace talpa::testing::detail
