// SPDX-License-Identifier: Apache-2.0
#include "support/count_allocations.hpp"

#include <atomic>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <new>

// The replaced functions stand in a file of their own: where a compiler sees their bodies beside a
// use, it takes std::free for a mismatch of operator new. They are weak, because the static
// sanitizer runtimes of clang bring their own; then nothing is counted.

namespace talpa::support {

namespace {

std::atomic<long> count{0};

void* counted_or_null(std::size_t bytes, std::size_t alignment) noexcept {
  count.fetch_add(1);
  // aligned_alloc wants a multiple of the alignment.
  const std::size_t whole = (bytes + alignment - 1) / alignment * alignment;
  void* const memory = std::aligned_alloc(alignment, whole > 0 ? whole : alignment);
  // NaN in every floating format, so that a use of uninitialised memory shows.
  return memory == nullptr ? nullptr : std::memset(memory, 0xff, whole);
}

void* counted(std::size_t bytes, std::size_t alignment) {
  void* const memory = counted_or_null(bytes, alignment);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

}  // namespace

long allocations() { return count.load(); }

bool allocations_are_counted() {
  const long before = allocations();
  // Called as functions: a new-expression may be left out by the compiler.
  ::operator delete(::operator new(1));
  return allocations() > before;
}

}  // namespace talpa::support

[[gnu::weak]] void* operator new(std::size_t bytes) {
  return talpa::support::counted(bytes, __STDCPP_DEFAULT_NEW_ALIGNMENT__);
}
[[gnu::weak]] void* operator new[](std::size_t bytes) {
  return talpa::support::counted(bytes, __STDCPP_DEFAULT_NEW_ALIGNMENT__);
}
[[gnu::weak]] void* operator new(std::size_t bytes, std::align_val_t alignment) {
  return talpa::support::counted(bytes, static_cast<std::size_t>(alignment));
}
[[gnu::weak]] void* operator new[](std::size_t bytes, std::align_val_t alignment) {
  return talpa::support::counted(bytes, static_cast<std::size_t>(alignment));
}
// What these give comes back to the operators below as well: std::stable_sort does so.
[[gnu::weak]] void* operator new(std::size_t bytes, const std::nothrow_t&) noexcept {
  return talpa::support::counted_or_null(bytes, __STDCPP_DEFAULT_NEW_ALIGNMENT__);
}
[[gnu::weak]] void* operator new[](std::size_t bytes, const std::nothrow_t&) noexcept {
  return talpa::support::counted_or_null(bytes, __STDCPP_DEFAULT_NEW_ALIGNMENT__);
}
[[gnu::weak]] void operator delete(void* memory) noexcept { std::free(memory); }
[[gnu::weak]] void operator delete[](void* memory) noexcept { std::free(memory); }
[[gnu::weak]] void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }
[[gnu::weak]] void operator delete[](void* memory, std::size_t) noexcept { std::free(memory); }
[[gnu::weak]] void operator delete(void* memory, std::align_val_t) noexcept { std::free(memory); }
[[gnu::weak]] void operator delete[](void* memory, std::align_val_t) noexcept { std::free(memory); }
[[gnu::weak]] void operator delete(void* memory, std::size_t, std::align_val_t) noexcept {
  std::free(memory);
}
[[gnu::weak]] void operator delete[](void* memory, std::size_t, std::align_val_t) noexcept {
  std::free(memory);
}
