// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/backend.hpp>
#include <talpa/core/matrix.hpp>
#include <talpa/core/storage.hpp>
#include <talpa/core/workspace.hpp>
#include <talpa/cuda/kernel.hpp>

#include <atomic>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

// A device without one: kernel bodies run on the host, one thread of the host for each thread of a
// block. Slow, but what a thread of a block may do here it may do on a device, and a sanitizer for
// threads sees each missing barrier as a race. Blocks run one after the other, launches too.

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
  std::uint32_t* arrivals() { return arrivals_; }

 private:
  std::uint32_t arrivals_[detail::arrival_counters] = {};
};

namespace detail {

template <>
struct storage<simulated> : host_storage {};

/// As std::barrier, whose tree of counters pays where each thread has a core to itself. Here
/// hundreds share a few.
class simulated_barrier {
 public:
  /// Before any thread arrives.
  void expect(int threads) {
    threads_ = threads;
    missing_.store(threads, std::memory_order_relaxed);
  }
  void arrive_and_wait() {
    const int round = round_.load(std::memory_order_relaxed);
    if (missing_.fetch_sub(1, std::memory_order_acq_rel) == 1) {
      missing_.store(threads_, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      round_.notify_all();
    } else {
      round_.wait(round, std::memory_order_acquire);
    }
  }

 private:
  int threads_ = 0;
  std::atomic<int> missing_{0}, round_{0};
};

/// Threads of the host that live as long as the program: to start them is most of a launch.
class simulated_threads {
 public:
  explicit simulated_threads(int count) : count_(count) {
    threads_.reserve(static_cast<std::size_t>(count));
    for (int t = 0; t < count; ++t) threads_.emplace_back([this, t] { serve(t); });
  }
  simulated_threads(const simulated_threads&) = delete;
  simulated_threads& operator=(const simulated_threads&) = delete;
  ~simulated_threads() {
    call_ = nullptr;
    begin();
    for (std::thread& thread : threads_) thread.join();
  }

  /// f(0), ..., f(count - 1), each on its thread, all at the same time.
  template <class F>
  void run(const F& f) {
    const std::lock_guard<std::mutex> one_launch(busy_);
    job_ = &f;
    call_ = [](const void* job, int t) { (*static_cast<const F*>(job))(t); };
    running_.store(count_, std::memory_order_relaxed);
    begin();
    for (int n = count_; n != 0; n = running_.load(std::memory_order_acquire)) {
      running_.wait(n, std::memory_order_acquire);
    }
  }

 private:
  void begin() {
    launches_.fetch_add(1, std::memory_order_release);
    launches_.notify_all();
  }
  void serve(int t) {
    for (int seen = 0;; ++seen) {
      launches_.wait(seen, std::memory_order_acquire);
      if (call_ == nullptr) return;
      call_(job_, t);
      if (running_.fetch_sub(1, std::memory_order_acq_rel) == 1) running_.notify_one();
    }
  }

  int count_;
  std::mutex busy_;
  const void* job_ = nullptr;
  void (*call_)(const void*, int) = nullptr;
  std::atomic<int> launches_{0}, running_{0};
  std::vector<std::thread> threads_;
};

/// One set of threads for each size.
template <int Count>
simulated_threads& simulated_threads_of() {
  static simulated_threads threads(Count);
  return threads;
}

/// What the threads of a simulated block share.
struct simulated_block_state {
  simulated_block_state(int threads, std::size_t shared_bytes)
      : shared(shared_bytes > 0 ? shared_bytes : 1),
        warps(new warp[static_cast<std::size_t>(threads / 32)]) {
    all.expect(threads);
  }

  /// The lanes of a warp meet in aligned groups of W = 1, 2, 4, ..., 32.
  struct warp {
    static constexpr int widths = 6;
    simulated_barrier barriers[63];
    /// Words that lanes show to their group, by the logarithm of W. They take two in turn: a lane
    /// writes to one again when all of the group have met behind the other, and read the first.
    std::uint64_t words[widths][2][32];
    std::uint8_t turn[widths][32] = {};

    warp() {
      simulated_barrier* next = barriers;
      for (int width = 1; width <= 32; width *= 2) {
        for (int first = 0; first < 32; first += width) (next++)->expect(width);
      }
    }
    /// `lanes` must be such a group.
    void meet(std::uint32_t lanes) {
      const int width = std::popcount(lanes), first = std::countr_zero(lanes);
      int before = 0;
      for (int w = 1; w < width; w *= 2) before += 32 / w;
      barriers[before + first / width].arrive_and_wait();
    }
    /// The words of the group, where each lane has put its own.
    const std::uint64_t* show(int lane, std::uint64_t word, std::uint32_t lanes) {
      const int w = std::countr_zero(static_cast<unsigned>(std::popcount(lanes)));
      std::uint64_t* const shown = words[w][turn[w][lane]];
      turn[w][lane] ^= 1;
      shown[lane] = word;
      meet(lanes);
      return shown;
    }
  };

  block<cpu> shared;
  simulated_barrier all;
  std::unique_ptr<warp[]> warps;
  bool last = false;  // what thread 0 tells the others
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
  void sync_lanes(std::uint32_t lanes) const { own_warp().meet(lanes); }
  template <class T>
  T shuffle(T x, int lane, std::uint32_t lanes) const {
    static_assert(sizeof(T) <= sizeof(std::uint64_t));
    std::uint64_t word = 0;
    __builtin_memcpy(&word, &x, sizeof(T));
    const std::uint64_t* const words = own_warp().show(thread_ % 32, word, lanes);
    T y;
    __builtin_memcpy(&y, words + lane % 32, sizeof(T));
    return y;
  }
  template <class T>
  T shuffle_xor(T x, int distance, std::uint32_t lanes) const {
    return shuffle(x, thread_ % 32 ^ distance, lanes);
  }
  std::uint32_t ballot(bool condition, std::uint32_t lanes) const {
    const std::uint64_t* const words = own_warp().show(thread_ % 32, condition ? 1 : 0, lanes);
    std::uint32_t bits = 0;
    for (int l = 0; l < 32; ++l) {
      if ((lanes >> l & 1u) != 0 && words[l] != 0) bits |= 1u << l;
    }
    return bits;
  }
  bool last_of(std::uint32_t blocks, std::uint32_t* arrivals) const {
    sync();
    if (thread_ == 0) {
      state_.last = ++*arrivals == blocks;
      if (state_.last) *arrivals = 0;
    }
    sync();
    return state_.last;
  }

  /// Nothing arrives before the wait.
  void copy_async(void* to, const void* from) const { copies_.push_back({to, from, groups_}); }
  void commit_copies() const { ++groups_; }
  template <int Left>
  void wait_copies() const {
    std::size_t done = 0;
    for (; done < copies_.size() && copies_[done].group < groups_ - Left; ++done) {
      std::memcpy(copies_[done].to, copies_[done].from, 16);
    }
    copies_.erase(copies_.begin(), copies_.begin() + static_cast<std::ptrdiff_t>(done));
  }
  template <bool Transposed>
  void load_fragments(std::uint32_t (&to)[4], const void* line) const {
    const std::uint64_t* const lines =
        own_warp().show(thread_ % 32, reinterpret_cast<std::uintptr_t>(line), whole_warp);
    const int g = thread_ % 32 / 4, t = thread_ % 4;
    for (int i = 0; i < 4; ++i) {
      std::uint16_t pair[2];
      for (int j = 0; j < 2; ++j) {
        const int row = Transposed ? 2 * t + j : g, column = Transposed ? g : 2 * t + j;
        pair[j] = reinterpret_cast<const std::uint16_t*>(lines[8 * i + row])[column];
      }
      std::memcpy(&to[i], pair, sizeof(pair));
    }
  }
  template <class S, int M, int N>
  void multiply_add(float (&sums)[M][N][4], const std::uint32_t (&a)[M][4],
                    const std::uint32_t (&b)[N / 2][4]) const {
    struct fragments {
      const std::uint32_t (*a)[4];
      const std::uint32_t (*b)[4];
    };
    const fragments mine{a, b};
    const std::uint64_t* const lanes =
        own_warp().show(thread_ % 32, reinterpret_cast<std::uintptr_t>(&mine), whole_warp);
    const auto of = [&](int lane) { return *reinterpret_cast<const fragments*>(lanes[lane]); };
    const int g = thread_ % 32 / 4, t = thread_ % 4;
    // Number k % 2 of word `word` of a fragment.
    const auto number = [](const std::uint32_t(&x)[4], int word, int k) {
      const auto half = static_cast<std::uint16_t>(x[word] >> (k % 2 * 16));
      return static_cast<float>(__builtin_bit_cast(S, half));
    };
    for (int m = 0; m < M; ++m) {
      for (int n = 0; n < N; ++n) {
        for (int i = 0; i < 4; ++i) {
          for (int k = 0; k < 16; ++k) {
            const int owner = k % 8 / 2;
            sums[m][n][i] += number(of(g * 4 + owner).a[m], i / 2 + k / 8 * 2, k) *
                             number(of((2 * t + i % 2) * 4 + owner).b[n / 2], n % 2 * 2 + k / 8, k);
          }
        }
      }
    }
    sync_lanes(whole_warp);  // the fragments of others are read
  }

 private:
  static constexpr std::uint32_t whole_warp = 0xffffffffu;
  struct copy {
    void* to;
    const void* from;
    int group;
  };

  simulated_block_state::warp& own_warp() const {
    return state_.warps[static_cast<std::size_t>(thread_ / 32)];
  }

  simulated_block_state& state_;
  int thread_;
  talpa::index block_, count_;
  mutable std::vector<copy> copies_;
  mutable int groups_ = 0;
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
    simulated_threads_of<Threads / turns>().run([&](int thread) {
      const int first = thread * turns;
      for (index b = 0; b < blocks; ++b) {
        for (int t = first; t < first + turns; ++t) {
          simulated_block<Threads> block(state, t, b, blocks);
          body(block);
        }
        if constexpr (turns == 1) state.all.arrive_and_wait();
      }
    });
  }
};

}  // namespace detail

}  // namespace talpa
