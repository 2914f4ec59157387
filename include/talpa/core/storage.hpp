// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/backend.hpp>
#include <talpa/core/index.hpp>

#include <cstddef>
#include <new>
#include <utility>

namespace talpa::detail {

/// Raw memory of a backend. Every backend says
///
///   alignment                              of each block, in bytes
///   allocate(bytes), release(start)        bytes > 0; throws when there are none left
///   clear(start, bytes)                    zero bytes, done on return
///   write(to, to_stride, from, from_stride, row_bytes, rows)   from the host, done on return
///   read(to, to_stride, from, from_stride, row_bytes, rows)    to the host, done on return
///
/// with strides in bytes.
template <class B>
struct storage {
  static_assert(always_false<B>,
                "talpa: this backend has no memory here, include talpa/cuda/context.cuh for gpu "
                "(docs/architecture.md)");
};

/// Alignment of every block on the host: one cache line. It depends on no compiler flag, so objects
/// of translation units with different -march can share matrices.
inline constexpr std::size_t host_alignment = 64;

/// Memory of the host, as backends on the host share it.
struct host_storage {
  static constexpr std::size_t alignment = host_alignment;

  static void* allocate(std::size_t bytes) {
    return ::operator new (bytes, std::align_val_t{alignment});
  }
  static void release(void* start) { ::operator delete (start, std::align_val_t{alignment}); }
  static void clear(void* start, std::size_t bytes) { __builtin_memset(start, 0, bytes); }
  static void write(void* to, std::size_t to_stride, const void* from, std::size_t from_stride,
                    std::size_t row_bytes, index rows) {
    if (row_bytes == 0) return;
    for (index r = 0; r < rows; ++r) {
      __builtin_memcpy(
          static_cast<std::byte*>(to) + static_cast<std::size_t>(r) * to_stride,
          static_cast<const std::byte*>(from) + static_cast<std::size_t>(r) * from_stride,
          row_bytes);
    }
  }
  static void read(void* to, std::size_t to_stride, const void* from, std::size_t from_stride,
                   std::size_t row_bytes, index rows) {
    write(to, to_stride, from, from_stride, row_bytes, rows);
  }
};

template <>
struct storage<cpu> : host_storage {};

/// Bytes of a backend with one owner.
template <class B>
class block {
 public:
  block() = default;
  explicit block(std::size_t bytes)
      : data_(bytes > 0 ? storage<B>::allocate(bytes) : nullptr), size_(bytes) {}
  block(block&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}
  block& operator=(block&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }
  block(const block&) = delete;
  block& operator=(const block&) = delete;
  ~block() {
    if (data_ != nullptr) storage<B>::release(data_);
  }

  std::byte* data() { return static_cast<std::byte*>(data_); }
  const std::byte* data() const { return static_cast<const std::byte*>(data_); }
  std::size_t size() const { return size_; }

 private:
  void* data_ = nullptr;
  std::size_t size_ = 0;
};

}  // namespace talpa::detail
