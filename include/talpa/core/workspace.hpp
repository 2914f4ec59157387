// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/storage.hpp>
#include <talpa/core/view.hpp>

#include <cstddef>
#include <vector>

namespace talpa {

/// Bump arena that forward and backward take their memory from: what forward saves stays in it
/// until the caller's scope ends, scratch is handed back at once. It grows by whole blocks and
/// never moves what it handed out, so a step that repeats the sizes of the one before allocates
/// nothing. Not thread-safe: one context, one arena, one caller.
template <backend B>
class workspace {
 public:
  /// A place in the arena to return to.
  struct mark {
    std::size_t block = 0;
    std::size_t offset = 0;
  };

  workspace() = default;
  workspace(workspace&&) = default;
  workspace& operator=(workspace&&) = default;

  /// Makes sure that `bytes` in all can be taken from here without a further allocation.
  void reserve(std::size_t bytes) {
    // One block with room for everything suffices: what earlier blocks take is not asked of it.
    for (std::size_t b = block_; b < blocks_.size(); ++b) {
      const std::size_t taken = b == block_ ? offset_ : 0;
      if (blocks_[b].size() - taken >= bytes) return;
    }
    blocks_.emplace_back(rounded(bytes));
  }

  /// Uninitialised storage of n elements, aligned as storage<B> says, valid until a rewind past it.
  template <class T>
  vector_view<T, B> take(index n) {
    return {static_cast<T*>(take_bytes(static_cast<std::size_t>(n) * sizeof(T))), n};
  }
  /// Uninitialised [rows, cols].
  template <class T>
  matrix_view<T, B> take(index rows, index cols) {
    return {take<T>(rows * cols).data, rows, cols};
  }

  mark position() const { return {block_, offset_}; }
  void rewind(mark to) {
    block_ = to.block;
    offset_ = to.offset;
  }

  /// Rewinds to where it was made when it goes out of scope.
  class scope {
   public:
    explicit scope(workspace& owner) : owner_(owner), start_(owner.position()) {}
    scope(const scope&) = delete;
    scope& operator=(const scope&) = delete;
    ~scope() { owner_.rewind(start_); }

   private:
    workspace& owner_;
    mark start_;
  };

  /// Bytes of all blocks together.
  std::size_t capacity() const {
    std::size_t sum = 0;
    for (const auto& block : blocks_) sum += block.size();
    return sum;
  }
  /// Bytes in front of the current position.
  std::size_t used() const {
    std::size_t sum = offset_;
    for (std::size_t b = 0; b < block_ && b < blocks_.size(); ++b) {
      sum += blocks_[b].size();
    }
    return sum;
  }
  /// Number of allocations so far: constant from the second equal step on.
  index allocations() const { return static_cast<index>(blocks_.size()); }

  static constexpr std::size_t alignment = detail::storage<B>::alignment;
  /// What `take` really consumes for a request: whole units of alignment.
  static constexpr std::size_t rounded(std::size_t bytes) {
    return (bytes + alignment - 1) / alignment * alignment;
  }

 private:
  void* take_bytes(std::size_t bytes) {
    const std::size_t needed = rounded(bytes);
    while (block_ < blocks_.size() && blocks_[block_].size() - offset_ < needed) {
      ++block_;
      offset_ = 0;
    }
    if (block_ == blocks_.size()) {
      const std::size_t minimum = std::size_t{1} << 16;
      blocks_.emplace_back(needed > minimum ? needed : minimum);
      offset_ = 0;
    }
    std::byte* const start = blocks_[block_].data() + offset_;
    offset_ += needed;
    return start;
  }

  std::vector<detail::block<B>> blocks_;
  std::size_t block_ = 0;
  std::size_t offset_ = 0;
};

}  // namespace talpa
