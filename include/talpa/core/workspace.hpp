// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/check.hpp>
#include <talpa/core/storage.hpp>
#include <talpa/core/view.hpp>

#include <algorithm>
#include <cstddef>
#include <string>
#include <utility>
#include <vector>

namespace talpa {

/// Bump arena that forward and backward take their memory from: what forward saves stays in it
/// until the caller's scope ends, scratch is handed back at once. It grows by whole blocks and
/// never moves what it handed out, so a step that repeats the sizes of the one before allocates
/// nothing. Over memory of the caller's it never grows. Not thread-safe: one context, one arena,
/// one caller.
template <backend B>
class workspace {
 public:
  /// A place in the arena to return to.
  struct mark {
    std::size_t block = 0;
    std::size_t offset = 0;
    std::size_t used = 0;
  };

  /// Grows by memory of its own.
  workspace() = default;
  /// Over `bytes` of memory of B that the caller owns, which must outlive it: the same steps need
  /// peak() of them.
  ///
  /// What does not fit is refused where it is taken, with value_error: what was handed out stays,
  /// but a result that was being computed is not complete, and gradients may hold a part of it.
  /// Throws: value_error for memory that is null, or not aligned as `alignment` says.
  workspace(void* memory, std::size_t bytes)
      : lent_(static_cast<std::byte*>(memory)), lent_bytes_(bytes), grows_(false) {
    check_memory("workspace", "memory", memory, bytes, alignment);
  }
  workspace(workspace&& other) noexcept { swap(other); }
  workspace& operator=(workspace&& other) noexcept {
    workspace moved(std::move(other));
    swap(moved);
    return *this;
  }

  /// Makes sure that `bytes` in all can be taken from here without a further allocation.
  /// Throws: value_error when memory of the caller's has fewer left.
  void reserve(std::size_t bytes) {
    if (!grows_) return check_room(bytes);
    // One block with room for everything suffices: what earlier blocks take is not asked of it.
    for (std::size_t b = at_.block; b < blocks_.size(); ++b) {
      const std::size_t taken = b == at_.block ? at_.offset : 0;
      if (blocks_[b].size() - taken >= bytes) return;
    }
    blocks_.emplace_back(rounded(bytes));
  }

  /// Uninitialised storage of n elements, aligned as storage<B> says, valid until a rewind past it.
  /// Throws: value_error when memory of the caller's has no room for it.
  template <class T>
  vector_view<T, B> take(index n) {
    return {static_cast<T*>(take_bytes(static_cast<std::size_t>(n) * sizeof(T))), n};
  }
  /// Uninitialised [rows, cols].
  template <class T>
  matrix_view<T, B> take(index rows, index cols) {
    return {take<T>(rows * cols).data, rows, cols};
  }

  mark position() const { return at_; }
  void rewind(mark to) { at_ = to; }

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

  /// Bytes of all blocks together, or of the caller's memory.
  std::size_t capacity() const {
    std::size_t sum = lent_bytes_;
    for (const auto& block : blocks_) sum += block.size();
    return sum;
  }
  /// Bytes that are taken at this position.
  std::size_t used() const { return at_.used; }
  /// The most bytes that were taken at once so far.
  std::size_t peak() const { return peak_; }
  /// Number of allocations so far: constant from the second equal step on.
  index allocations() const { return static_cast<index>(blocks_.size()); }

  static constexpr std::size_t alignment = detail::storage<B>::alignment;
  /// What `take` really consumes for a request: whole units of alignment.
  static constexpr std::size_t rounded(std::size_t bytes) {
    return (bytes + alignment - 1) / alignment * alignment;
  }

 private:
  // Not inlined: ops take memory in many places, and seldom.
  [[gnu::noinline]] void* take_bytes(std::size_t bytes) {
    const std::size_t needed = rounded(bytes);
    std::byte* start = lent_;
    if (grows_) {
      while (at_.block < blocks_.size() && blocks_[at_.block].size() - at_.offset < needed) {
        ++at_.block;
        at_.offset = 0;
      }
      if (at_.block == blocks_.size()) {
        const std::size_t minimum = std::size_t{1} << 16;
        blocks_.emplace_back(needed > minimum ? needed : minimum);
        at_.offset = 0;
      }
      start = blocks_[at_.block].data();
    } else {
      check_room(needed);
    }
    start += at_.offset;
    at_.offset += needed;
    at_.used += needed;
    peak_ = std::max(peak_, at_.used);
    return start;
  }

  [[gnu::noinline]] void check_room(std::size_t needed) const {
    if (lent_bytes_ - at_.used >= needed) return;
    detail::throw_value(
        "workspace", "bytes", std::to_string(lent_bytes_),
        detail::concat(">= ", std::to_string(at_.used + needed), " = ", std::to_string(at_.used),
                       " taken and ", std::to_string(needed), " more"));
  }

  void swap(workspace& other) noexcept {
    std::swap(blocks_, other.blocks_);
    std::swap(lent_, other.lent_);
    std::swap(lent_bytes_, other.lent_bytes_);
    std::swap(grows_, other.grows_);
    std::swap(at_, other.at_);
    std::swap(peak_, other.peak_);
  }

  std::vector<detail::block<B>> blocks_;
  std::byte* lent_ = nullptr;
  std::size_t lent_bytes_ = 0;
  bool grows_ = true;
  mark at_;
  std::size_t peak_ = 0;
};

}  // namespace talpa
