// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/check.hpp>
#include <talpa/core/index.hpp>
#include <talpa/core/lanes.hpp>

#include <cstdint>
#include <initializer_list>

namespace talpa {

/// Some of the first 1024 experts, as bits: a plain value that a policy can carry into a kernel.
///
/// Throws: value_error for an expert outside 0..1023.
class expert_set {
 public:
  static constexpr index capacity = 1024;

  expert_set() = default;
  expert_set(std::initializer_list<index> experts) {
    for (const index e : experts) add(e);
  }

  void add(index e) {
    check_range("expert_set", "expert", e, 0, capacity - 1, "experts that a set can hold");
    words_[e / mask_word_bits] |= 1u << (e % mask_word_bits);
  }
  TALPA_HD bool has(index e) const {
    return e >= 0 && e < capacity && ((words_[e / mask_word_bits] >> (e % mask_word_bits)) & 1u);
  }
  TALPA_HD index size() const {
    index n = 0;
    for (index e = 0; e < capacity; ++e) n += has(e) ? 1 : 0;
    return n;
  }
  TALPA_HD bool empty() const { return size() == 0; }
  /// The bits as lane groups read them, the same for every row; for at most `capacity` experts.
  TALPA_HD row_pointer<const std::uint32_t> row() const { return {words_, 0}; }

  friend bool operator==(const expert_set&, const expert_set&) = default;

 private:
  std::uint32_t words_[capacity / mask_word_bits] = {};
};

}  // namespace talpa
