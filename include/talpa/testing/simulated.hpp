// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/backend.hpp>
#include <talpa/core/matrix.hpp>
#include <talpa/core/storage.hpp>
#include <talpa/core/workspace.hpp>
#include <talpa/cuda/kernel.hpp>

#include <barrier>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

// A device without one: kernel bodies run on the host, one thread of the host for each thread of a
// block. Slow, but what a thread of a block may do here it may do on a device, and a sanitizer for
// threads sees each missing barrier as a race. Blocks run one after the other.

namespace talpa {

/// Tag of the simulated device: memory of the host, the kernels of gpu.
struct simulated {
  struct backend_identifier {};
  static constexpr const char* name = "simulated";
};
template <>
inline constexpr bool runs_kernels<simulated> = true;

template <>
struct context<simulated> {
  bool checked = false;
  workspace<simulated> memory;
  workspace<simulated> scratch;
  void synchronise() const {}
};

namespace detail {

template <>
struct storage<simulated> : host_storage {};

/// What the threads of a simulated block share.
struct simulated_block_state {
  simulated_block_state(int threads, std::size_t shared_bytes)
      : shared(shared_bytes > 0 ? shared_bytes : 1), all(threads) {
    exchange.resize(static_cast<std::size_t>(threads));
    for (int w = 0; w < threads / 32; ++w) warps.emplace_back();
  }

  /// The barriers of a warp, one for each aligned group of 1, 2, 4, ..., 32 lanes.
  struct warp_barriers {
    std::vector<std::unique_ptr<std::barrier<>>> of_group;
    warp_barriers() {
      for (int width = 1; width <= 32; width *= 2) {
        for (int first = 0; first < 32; first += width) {
          of_group.push_back(std::make_unique<std::barrier<>>(width));
        }
      }
    }
    /// `lanes` must be such a group.
    std::barrier<>& of(std::uint32_t lanes) {
      const int width = std::popcount(lanes), first = std::countr_zero(lanes);
      int before = 0;
      for (int w = 1; w < width; w *= 2) before += 32 / w;
      return *of_group[static_cast<std::size_t>(before + first / width)];
    }
  };

  block<cpu> shared;
  std::barrier<> all;
  std::vector<std::uint64_t> exchange;  // one word a thread
  std::vector<warp_barriers> warps;     // one set a warp
};

/// The Block of cuda/kernel.hpp on the host.
template <int Threads>
class simulated_block {
 public:
  simulated_block(simulated_block_state& state, int thread, talpa::index block, talpa::index count)
      : state_(state), thread_(thread), block_(block), count_(count) {}

  static constexpr int threads() { return Threads; }
  int thread() const { return thread_; }
  talpa::index index() const { return block_; }
  talpa::index count() const { return count_; }
  void sync() const { state_.all.arrive_and_wait(); }
  template <class T>
  T* shared() const {
    return reinterpret_cast<T*>(state_.shared.data());
  }
  void sync_lanes(std::uint32_t lanes) const {
    state_.warps[static_cast<std::size_t>(thread_ / 32)].of(lanes).arrive_and_wait();
  }
  template <class T>
  T shuffle(T x, int lane, std::uint32_t lanes) const {
    static_assert(sizeof(T) <= sizeof(std::uint64_t));
    std::uint64_t word = 0;
    __builtin_memcpy(&word, &x, sizeof(T));
    own(thread_) = word;
    sync_lanes(lanes);
    const std::uint64_t other = own(thread_ / 32 * 32 + lane % 32);
    sync_lanes(lanes);
    T y;
    __builtin_memcpy(&y, &other, sizeof(T));
    return y;
  }
  template <class T>
  T shuffle_xor(T x, int distance, std::uint32_t lanes) const {
    return shuffle(x, thread_ % 32 ^ distance, lanes);
  }
  std::uint32_t ballot(bool condition, std::uint32_t lanes) const {
    own(thread_) = condition ? 1 : 0;
    sync_lanes(lanes);
    std::uint32_t bits = 0;
    for (int l = 0; l < 32; ++l) {
      if ((lanes >> l & 1u) != 0 && own(thread_ / 32 * 32 + l) != 0) bits |= 1u << l;
    }
    sync_lanes(lanes);
    return bits;
  }

 private:
  std::uint64_t& own(int thread) const { return state_.exchange[static_cast<std::size_t>(thread)]; }

  simulated_block_state& state_;
  int thread_;
  talpa::index block_, count_;
};

template <>
struct launcher<simulated> {
  /// Threads of the host for a block without barriers: enough for a sanitizer to see a race.
  static constexpr int few = 8;

  template <int Threads, class Body>
  static void run(context<simulated>&, index blocks, std::size_t shared_bytes, const Body& body) {
    simulated_block_state state(Threads, shared_bytes);
    // Threads that never wait for each other take turns on a few of the host.
    constexpr int turns = independent_threads<Body> ? Threads / few : 1;
    std::vector<std::thread> threads;
    threads.reserve(Threads / turns);
    for (int first = 0; first < Threads; first += turns) {
      threads.emplace_back([&, first] {
        for (index b = 0; b < blocks; ++b) {
          for (int t = first; t < first + turns; ++t) {
            simulated_block<Threads> block(state, t, b, blocks);
            body(block);
          }
          if constexpr (turns == 1) state.all.arrive_and_wait();
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
  }
};

}  // namespace detail

}  // namespace talpa
