// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/backend.hpp>
#include <talpa/core/config.hpp>
#include <talpa/core/index.hpp>

#include <bit>
#include <cstddef>
#include <cstdint>

// How kernels are written. A kernel body is a trivially copyable struct with
//
//   template <class Block> TALPA_HD void operator()(Block& block) const;
//
// which every thread of every block runs. It is the same source for nvcc, which makes a kernel of
// it, and for a C++ compiler, which runs each thread of a block as a thread of the host
// (testing/simulated.hpp), where a missing barrier is a data race that a sanitizer sees. A Block
// offers
//
//   Block::threads()             threads of a block, a constant, a multiple of 32
//   block.thread()               this one, 0 .. threads() - 1
//   block.index(), block.count() this block among those of the launch
//   block.sync()                 barrier of the block
//   block.template shared<T>()   start of the shared memory that the launch asked for
//   block.ballot(c, lanes)       of the lanes of this warp: bit l is the condition of lane l
//   block.shuffle(x, l, lanes)   x of lane l of this warp
//   block.shuffle_xor(x, d, lanes)   x of the lane whose number differs by the bits d
//   block.sync_lanes(lanes)      barrier of these lanes, also for what they wrote to memory
//   block.copy_async(to, from)   16 bytes into shared memory, both aligned to 16. Nobody may look
//                                before the wait
//   block.commit_copies()        the copies of this thread so far, since the last call, are a group
//   block.template wait_copies<Left>()   all but the last Left groups of this thread have arrived
//   block.template load_fragments<Transposed>(to, line)   four blocks of 8 x 8 numbers of 16 bits
//                                from shared memory by the lanes of a warp: lane l names line l % 8
//                                of block l / 8, 8 numbers aligned to 16 bytes. Word i of a lane is
//                                numbers 2 (l % 4) and the next of line l / 4 of block i; if
//                                Transposed, number l / 4 of lines 2 (l % 4) and the next
//   block.template multiply_add<S>(sums, a, b)   sums += a b by the warp on tensor cores: 16 M rows
//                                and 8 N columns, 16 terms of type S. Fragments have four words of
//                                two terms each, 2 (l % 4) and the next. a[M]: row l / 4, row l / 4
//                                + 8, then the same rows with terms 8 further on. b[N / 2]: column
//                                l / 4 with these terms, with terms 8 further on, then column l / 4
//                                + 8 likewise. sums[m][n] of a lane: row l / 4 of 16, columns
//                                2 (l % 4) and the next of 8; then row l / 4 + 8
//   block.last_of(n, arrivals)   barrier of the block; whether it is the last of n blocks to come
//                                here, which sees what the others wrote before they did
//
// What needs the lanes of a whole warp (load_fragments, multiply_add) is a collective of all 32.
// `lanes` are bits: each of these lanes makes the same call, together. No collective stands under a
// condition on which they may disagree. `arrivals` counts the n blocks in memory of the device: 0
// before the first comes, 0 again when the last has. ctx.arrivals() of a context<B> has
// arrival_counters of them, for the launch that runs.

namespace talpa {

/// Whether the ops of a backend are kernel bodies: launcher<B> runs them.
template <class B>
inline constexpr bool runs_kernels = false;
template <>
inline constexpr bool runs_kernels<gpu> = true;

template <class B>
concept kernel_backend = backend<B> && runs_kernels<B>;

namespace detail {

/// Position of the lowest bit that is set, 32 for none. std::countr_zero is host code for nvcc.
TALPA_HD constexpr int lowest_bit(std::uint32_t bits) {
  return std::popcount((bits & (0u - bits)) - 1u);
}

/// Whether the threads of a body make no collective call, `static constexpr bool independent =
/// true`.
template <class Body>
inline constexpr bool independent_threads = requires {
  requires Body::independent;
};

/// Blocks of a body that shall fit on a multiprocessor at a time, `static constexpr int
/// least_blocks`; 1 where it says nothing. Its threads share the registers out among them.
template <class Body>
inline constexpr int least_blocks = 1;
template <class Body>
requires requires { Body::least_blocks; }
inline constexpr int least_blocks<Body> = Body::least_blocks;

/// Counters of Block::last_of in a context.
inline constexpr int arrival_counters = 65;

/// Runs a body: `template <int Threads, class Body> static void run(context<B>&, index blocks,
/// std::size_t shared_bytes, const Body&)`.
template <class B>
struct launcher {
  static_assert(always_false<B>,
                "talpa: kernels cannot be launched on this backend here, include "
                "talpa/cuda/context.cuh for gpu (docs/architecture.md)");
};

/// Runs `blocks` blocks of Threads threads with as many bytes of shared memory each.
template <int Threads, kernel_backend B, class Body>
void launch(context<B>& ctx, index blocks, std::size_t shared_bytes, const Body& body) {
  static_assert(Threads > 0 && Threads % 32 == 0 && Threads <= 1024,
                "talpa: a block has whole warps, 32 at most");
  if (blocks > 0) launcher<B>::template run<Threads>(ctx, blocks, shared_bytes, body);
}

}  // namespace detail

}  // namespace talpa
