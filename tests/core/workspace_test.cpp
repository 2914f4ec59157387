// SPDX-License-Identifier: Apache-2.0
#include "support/count_allocations.hpp"
#include "support/refused.hpp"

#include <talpa/core/workspace.hpp>

#include <doctest/doctest.h>

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace talpa::workspace_test {

namespace {

using arena = workspace<cpu>;

template <class T>
bool aligned(const T* pointer) {
  return reinterpret_cast<std::uintptr_t>(pointer) % detail::host_alignment == 0;
}

}  // namespace

TEST_SUITE("core/workspace") {
  TEST_CASE("what a workspace hands out is aligned and does not overlap") {
    arena w;
    const vector_view<char, cpu> a = w.take<char>(3);
    const vector_view<double, cpu> b = w.take<double>(5);
    const matrix_view<float, cpu> c = w.take<float>(2, 7);
    CHECK(a.size == 3);
    CHECK(b.size == 5);
    CHECK(c.rows == 2);
    CHECK(c.cols == 7);
    CHECK(c.stride == 7);
    CHECK(aligned(a.data));
    CHECK(aligned(b.data));
    CHECK(aligned(c.data));
    for (index i = 0; i < 3; ++i) a[i] = 'a';
    for (index i = 0; i < 5; ++i) b[i] = 2.0;
    for (index i = 0; i < 14; ++i) c.data[i] = 3.0f;
    for (index i = 0; i < 3; ++i) CHECK(a[i] == 'a');
    for (index i = 0; i < 5; ++i) CHECK(b[i] == 2.0);
    CHECK(w.used() == arena::rounded(3) + arena::rounded(40) + arena::rounded(56));
  }

  TEST_CASE("growing moves nothing that was handed out") {
    arena w;
    std::vector<vector_view<int, cpu>> taken;
    for (int i = 0; i < 40; ++i) {
      taken.push_back(w.take<int>(10000 + 1000 * i));
      taken.back()[0] = i;
      taken.back()[taken.back().size - 1] = -i;
    }
    CHECK(w.allocations() > 1);
    for (int i = 0; i < 40; ++i) {
      const vector_view<int, cpu> v = taken[static_cast<std::size_t>(i)];
      CHECK(v[0] == i);
      CHECK(v[v.size - 1] == -i);
    }
  }

  TEST_CASE("a scope hands back what was taken inside it, also across blocks") {
    arena w;
    const vector_view<int, cpu> outer = w.take<int>(4);
    outer[3] = 9;
    const std::size_t used = w.used();
    const int* first = nullptr;
    {
      const arena::scope scope(w);
      first = w.take<int>(100).data;
      w.take<char>(1 << 20);
      CHECK(w.used() > used + (1 << 20) - 1);
      {
        const arena::scope nested(w);
        w.take<char>(1 << 18);
      }
    }
    CHECK(w.used() == used);
    CHECK(outer[3] == 9);
    CHECK(w.take<int>(100).data == first);
  }

  TEST_CASE("a step that repeats the sizes of the one before allocates nothing") {
    if (!support::allocations_are_counted()) return;
    arena w;
    const auto step = [&] {
      const arena::scope scope(w);
      for (index n : {1000, 200000, 3, 70000, 50000}) w.take<double>(n);
    };
    CHECK(support::allocations_of(step) > 0);
    const index blocks = w.allocations();
    CHECK(support::allocations_of(step) == 0);
    CHECK(w.allocations() == blocks);
  }

  TEST_CASE("reserved bytes are taken without an allocation") {
    if (!support::allocations_are_counted()) return;
    arena w;
    const std::size_t bytes = 3 * arena::rounded(100000) + arena::rounded(1);
    w.reserve(bytes);
    CHECK(w.capacity() >= bytes);
    w.reserve(bytes);
    CHECK(w.allocations() == 1);
    CHECK(support::allocations_of([&] {
            for (int i = 0; i < 3; ++i) w.take<char>(100000);
            w.take<char>(1);
          }) == 0);
    CHECK(w.used() == bytes);
  }

  TEST_CASE("a reserve holds for a workspace in pieces and from any position") {
    if (!support::allocations_are_counted()) return;
    arena w;
    w.take<char>(1);  // the first, small block
    const std::size_t bytes = arena::rounded(1 << 20);
    w.reserve(bytes);
    // Larger than what is left of the first block, so a sum over blocks would promise too much.
    CHECK(support::allocations_of([&] { w.take<char>(1 << 20); }) == 0);
    w.reserve(bytes);
    CHECK(support::allocations_of([&] {
            w.take<char>(1 << 19);
            w.take<char>(1 << 19);
          }) == 0);
  }

  TEST_CASE("rounding counts whole cache lines") {
    static_assert(arena::rounded(0) == 0);
    static_assert(arena::rounded(1) == 64);
    static_assert(arena::rounded(64) == 64);
    static_assert(arena::rounded(65) == 128);
  }

  TEST_CASE("nothing can be taken from an empty workspace, and marks lead back to the start") {
    arena w;
    CHECK(w.capacity() == 0);
    CHECK(w.used() == 0);
    CHECK(w.take<float>(0).size == 0);
    const arena::mark start{};
    w.take<float>(10);
    const arena::mark later = w.position();
    w.take<float>(10);
    w.rewind(later);
    CHECK(w.used() == arena::rounded(40));
    w.rewind(start);
    CHECK(w.used() == 0);
  }

  TEST_CASE("a moved workspace keeps its memory") {
    arena w;
    const vector_view<int, cpu> v = w.take<int>(1);
    v[0] = 5;
    const arena moved = std::move(w);
    CHECK(v[0] == 5);
    CHECK(moved.used() == arena::rounded(4));
    CHECK(moved.peak() == arena::rounded(4));
    CHECK(w.used() == 0);  // NOLINT: as if new
    CHECK(aligned(w.take<int>(1).data));
    w = arena();
    CHECK(w.capacity() == 0);
  }

  TEST_CASE("the peak is what was taken at once, without what blocks leave over") {
    arena w;
    CHECK(w.peak() == 0);
    {
      const arena::scope scope(w);
      w.take<char>(65000);
      w.take<char>(1 << 20);
    }
    w.take<char>(100);
    CHECK(w.used() == arena::rounded(100));
    CHECK(w.peak() == arena::rounded(65000) + (1 << 20));
  }

  TEST_CASE("memory of the caller's is handed out up to its end, and no other") {
    alignas(64) std::byte memory[256];
    arena w(memory, sizeof memory);
    CHECK(w.capacity() == 256);
    CHECK(w.allocations() == 0);
    const auto first = w.take<char>(65);
    CHECK(static_cast<void*>(first.data) == memory);
    w.reserve(128);
    const char* const text =
        "talpa::workspace: 'bytes' is 256, expected >= 320 = 128 taken and 192 more";
    CHECK(support::refused([&] { w.reserve(192); }) == text);
    CHECK(support::refused([&] { w.take<double>(17); }) == text);
    CHECK(w.used() == 128);
    {
      const arena::scope scope(w);
      CHECK(static_cast<void*>(w.take<double>(2, 8).data) == memory + 128);
      CHECK(w.used() == 256);
      CHECK(w.take<float>(0).size == 0);
    }
    CHECK(static_cast<void*>(w.take<char>(1).data) == memory + 128);
    CHECK(w.peak() == 256);
    const arena moved = std::move(w);
    CHECK(moved.capacity() == 256);
    CHECK(moved.used() == 192);
    CHECK(w.capacity() == 0);  // NOLINT: as if new
    arena nothing(nullptr, 0);
    CHECK(support::refused([&] { nothing.take<char>(1); }) ==
          "talpa::workspace: 'bytes' is 0, expected >= 64 = 0 taken and 64 more");
  }

  TEST_CASE("memory that is not aligned, or not there, is refused") {
    alignas(64) std::byte memory[128];
    CHECK(
        support::refused([&] { arena(memory + 4, 64); }) ==
        "talpa::workspace: 'memory' is 4 bytes past a multiple of 64, expected a multiple of 64 = "
        "alignment of what lies there");
    CHECK(support::refused([] { arena(nullptr, 64); }) ==
          "talpa::workspace: 'memory' is null, expected an address of 64 bytes");
  }
}

}  // namespace talpa::workspace_test
