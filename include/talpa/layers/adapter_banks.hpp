// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/autograd/affine.hpp>
#include <talpa/core/check.hpp>
#include <talpa/core/random.hpp>

#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace talpa {

/// Named adapters over one base, of which a call takes one or none: the base is owned once, every
/// adapter borrows it.
///
/// `Layer` is one with an affine base: lora_linear, mole_linear. Each entry is the params of the
/// layer, so that a call is layer.forward(ctx, banks.at("name"), ...); `base()` without an adapter
/// is the base to the bit: affine_forward(ctx, banks.base(), x, y).
/// Edges: the borrowed base is frozen in every entry; train base() by itself.
/// Shapes, determinism: those of the layer.
/// Cost: memory of the base once and of each adapter; a call costs what it costs the layer.
/// Throws: value_error for a name that is empty, taken or unknown; nothing is changed then.
template <class Layer, class T, class B>
class adapter_banks {
 public:
  using params = typename Layer::template params<T, B>;

  explicit adapter_banks(affine_params<T, B> base) : base_(std::move(base)) {}
  adapter_banks(adapter_banks&&) = default;  // entries point to memory that moves along
  adapter_banks& operator=(adapter_banks&&) = default;

  affine_params<T, B>& base() { return base_; }
  const affine_params<T, B>& base() const { return base_; }

  /// Makes an adapter as layer.init does; its parameters are named `name`.*.
  params& add(const std::string& name, const Layer& layer, generator& random) {
    if (name.empty() || find(name) != nullptr) {
      detail::throw_value("adapter_banks::add", "name", detail::concat("'", name, "'"),
                          name.empty() ? "a name" : "a name that is not taken");
    }
    auto made = std::make_unique<params>(
        layer.template init<T, B>(borrowed(), random, detail::concat(name, ".")));
    entries_.emplace_back(name, std::move(made));
    return *entries_.back().second;
  }
  /// The adapter of that name.
  params& at(const std::string& name) {
    params* const found = find(name);
    if (found == nullptr) unknown("adapter_banks::at", name);
    return *found;
  }
  const params& at(const std::string& name) const {
    const params* const found = find(name);
    if (found == nullptr) unknown("adapter_banks::at", name);
    return *found;
  }
  void remove(const std::string& name) {
    for (auto entry = entries_.begin(); entry != entries_.end(); ++entry) {
      if (entry->first != name) continue;
      entries_.erase(entry);
      return;
    }
    unknown("adapter_banks::remove", name);
  }
  /// In the order in which they were added.
  std::vector<std::string> names() const {
    std::vector<std::string> all;
    for (const auto& [name, adapter] : entries_) all.push_back(name);
    return all;
  }

 private:
  params* find(const std::string& name) const {
    for (const auto& [known, adapter] : entries_) {
      if (known == name) return adapter.get();
    }
    return nullptr;
  }
  affine_params<T, B> borrowed() {
    affine_params<T, B> b;
    b.weight = parameter<T, B>::borrow(base_.weight.name(), base_.weight.value());
    if (base_.bias.exists()) {
      b.bias = parameter<T, B>::borrow(base_.bias.name(), base_.bias.value());
    }
    return b;
  }
  [[noreturn]] void unknown(const char* function, const std::string& name) const {
    std::string known;
    for (const std::string& n : names()) known += known.empty() ? n : detail::concat(", ", n);
    detail::throw_value(function, "name", detail::concat("'", name, "'"),
                        known.empty()
                            ? std::string("the name of an adapter, of which there is none")
                            : detail::concat("one of ", known, " = adapters"));
  }

  affine_params<T, B> base_;
  std::vector<std::pair<std::string, std::unique_ptr<params>>> entries_;
};

}  // namespace talpa
