// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "timing.cuh"

#include <talpa/core/matrix.hpp>
#include <talpa/core/random.hpp>
#include <talpa/cuda/context.cuh>
#include <talpa/cuda/loops.hpp>
#include <talpa/cuda/quad.hpp>

#include <cstdint>
#include <cstdio>

// What the programs of this folder work on, and the rate that they compare with.

namespace talpa::bench {

/// Normal numbers, which keep the multipliers of a product as busy as real ones.
template <class S>
matrix<S, gpu> normal_matrix(context<gpu>& ctx, index rows, index cols, float deviation,
                             std::uint64_t seed) {
  matrix<S, gpu> m(rows, cols);
  const matrix_view<S, gpu> view = m.view();
  const random_stream stream = generator(seed).next();
  kernels::for_each_element(ctx, rows, cols, [=] TALPA_DEVICE(index r, index c) {
    const auto i = static_cast<std::uint64_t>(r * cols + c);
    view(r, c) = static_cast<S>(deviation * normal<float>(stream, i));
  });
  ctx.synchronise();
  return m;
}

/// Four accesses of 16 bytes in flight for each thread.
struct copy_quads {
  const kernels::quad<float>* from;
  kernels::quad<float>* to;
  template <class Block>
  TALPA_HD void operator()(Block& block) const {
    const index first = block.index() * 4 * Block::threads() + block.thread();
    kernels::quad<float> x[4];
    TALPA_UNROLL
    for (int i = 0; i < 4; ++i) x[i] = from[first + i * Block::threads()];
    TALPA_UNROLL
    for (int i = 0; i < 4; ++i) to[first + i * Block::threads()] = x[i];
  }
};

/// Microseconds that a copy of 1 GiB takes: 2 GiB are read and written.
inline double copy_microseconds(context<gpu>& ctx) {
  const index n = index{1} << 28;  // floats
  matrix<float, gpu> a(1, n), b(1, n);
  const auto* const from = reinterpret_cast<const kernels::quad<float>*>(a.data());
  auto* const to = reinterpret_cast<kernels::quad<float>*>(b.data());
  return microseconds(ctx, [&] {
    detail::launch<256>(ctx, n / (4 * 256 * 4), 0, copy_quads{from, to});
  });
}
inline constexpr double copied_bytes = 0x1p31;

/// Prints which device answers, or, where none does, that there is none.
inline bool device_answers(const char* program) {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::printf("no CUDA device answers: nothing is measured\n");
    return false;
  }
  cudaDeviceProp properties;
  detail::check_cuda(cudaGetDeviceProperties(&properties, 0), program);
  std::printf("device: %s, %d multiprocessors, L2 %d MiB\n\n", properties.name,
              properties.multiProcessorCount, properties.l2CacheSize >> 20);
  return true;
}

}  // namespace talpa::bench
