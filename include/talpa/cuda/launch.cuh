// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/error.hpp>
#include <talpa/core/half.hpp>
#include <talpa/core/storage.hpp>
#include <talpa/cuda/kernel.hpp>

#include <nv/target>

#include <cstddef>
#include <cuda_runtime_api.h>
#include <type_traits>

namespace talpa::detail {

/// Throws device_error when a call of the CUDA runtime failed.
inline void check_cuda(cudaError_t status, const char* function) {
  if (status == cudaSuccess) return;
  throw device_error(concat("talpa::", function, ": the CUDA runtime says '",
                            cudaGetErrorString(status), "' (", cudaGetErrorName(status), ")"));
}

/// Memory of the current device. The legacy stream, on which clearing and copies run, orders them
/// against blocking streams only, hence the waits.
template <>
struct storage<gpu> {
  static constexpr std::size_t alignment = 256;

  static void* allocate(std::size_t bytes) {
    void* start = nullptr;
    check_cuda(cudaMalloc(&start, bytes), "matrix");
    return start;
  }
  /// Waits until no kernel uses it, as cudaFree does.
  static void release(void* start) { cudaFree(start); }
  static void clear(void* start, std::size_t bytes) {
    check_cuda(cudaMemset(start, 0, bytes), "matrix");
    check_cuda(cudaDeviceSynchronize(), "matrix");
  }
  static void write(void* to, std::size_t to_stride, const void* from, std::size_t from_stride,
                    std::size_t row_bytes, index rows) {
    check_cuda(cudaDeviceSynchronize(), "to_device");
    check_cuda(cudaMemcpy2D(to, to_stride, from, from_stride, row_bytes,
                            static_cast<std::size_t>(rows), cudaMemcpyHostToDevice),
               "to_device");
    check_cuda(cudaDeviceSynchronize(), "to_device");
  }
  static void read(void* to, std::size_t to_stride, const void* from, std::size_t from_stride,
                   std::size_t row_bytes, index rows) {
    check_cuda(cudaDeviceSynchronize(), "to_host");
    check_cuda(cudaMemcpy2D(to, to_stride, from, from_stride, row_bytes,
                            static_cast<std::size_t>(rows), cudaMemcpyDeviceToHost),
               "to_host");
  }
};

/// The Block of kernel.hpp on a device. What nvcc compiles for the host is never called.
template <int Threads>
struct device_block {
  static constexpr int threads() { return Threads; }

  TALPA_HD int thread() const {
    NV_IF_ELSE_TARGET(NV_IS_DEVICE, (return static_cast<int>(threadIdx.x);), (return 0;))
  }
  TALPA_HD talpa::index index() const {
    NV_IF_ELSE_TARGET(NV_IS_DEVICE, (return static_cast<talpa::index>(blockIdx.x);), (return 0;))
  }
  TALPA_HD talpa::index count() const {
    NV_IF_ELSE_TARGET(NV_IS_DEVICE, (return static_cast<talpa::index>(gridDim.x);), (return 1;))
  }
  TALPA_HD void sync() const { NV_IF_TARGET(NV_IS_DEVICE, (__syncthreads();)) }
  template <class T>
  TALPA_HD T* shared() const {
    NV_IF_ELSE_TARGET(NV_IS_DEVICE,
                      (extern __shared__ __align__(128) unsigned char talpa_shared_memory[];
                       return reinterpret_cast<T*>(talpa_shared_memory);),
                      (return nullptr;))
  }
  TALPA_HD std::uint32_t ballot(bool condition, std::uint32_t lanes) const {
    NV_IF_ELSE_TARGET(NV_IS_DEVICE, (return __ballot_sync(lanes, condition);),
                      (return (condition ? lanes : 0u);))
  }
  template <class T>
  TALPA_HD T shuffle(T x, int lane, std::uint32_t lanes) const {
    NV_IF_ELSE_TARGET(NV_IS_DEVICE, (return __shfl_sync(lanes, x, lane);),
                      (return (static_cast<void>(lane), static_cast<void>(lanes), x);))
  }
  template <class T>
  TALPA_HD T shuffle_xor(T x, int distance, std::uint32_t lanes) const {
    NV_IF_ELSE_TARGET(NV_IS_DEVICE, (return __shfl_xor_sync(lanes, x, distance);),
                      (return (static_cast<void>(distance), static_cast<void>(lanes), x);))
  }
  TALPA_HD void sync_lanes(std::uint32_t lanes) const {
    NV_IF_ELSE_TARGET(NV_IS_DEVICE, (__syncwarp(lanes);), (static_cast<void>(lanes);))
  }
  TALPA_HD bool last_of(std::uint32_t blocks, std::uint32_t* arrivals) const {
    sync();
    const bool last = thread() == 0 && arrives_last(blocks, arrivals);
    NV_IF_ELSE_TARGET(NV_IS_DEVICE, (return __syncthreads_or(last ? 1 : 0) != 0;), (return last;))
  }

  // What follows needs compute capability 8.0.
  TALPA_HD void copy_async(void* to, const void* from) const {
    NV_DISPATCH_TARGET(NV_PROVIDES_SM_80,
                       (asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(
                                         static_cast<unsigned>(__cvta_generic_to_shared(to))),
                                     "l"(from)
                                     : "memory");),
                       NV_IS_DEVICE, (__trap();))
  }
  TALPA_HD void commit_copies() const {
    NV_IF_TARGET(NV_PROVIDES_SM_80, (asm volatile("cp.async.commit_group;" ::: "memory");))
  }
  template <int Left>
  TALPA_HD void wait_copies() const {
    NV_IF_TARGET(NV_PROVIDES_SM_80, (asm volatile("cp.async.wait_group %0;" ::"n"(Left)
                                                  : "memory");))
  }
  template <bool Transposed>
  TALPA_HD void load_fragments(std::uint32_t (&to)[4], const void* line) const {
    if constexpr (Transposed) {
      NV_DISPATCH_TARGET(
          NV_PROVIDES_SM_80,
          (asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                        : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                        : "r"(static_cast<unsigned>(__cvta_generic_to_shared(line)))
                        : "memory");),
          NV_IS_DEVICE, (__trap();))
    } else {
      NV_DISPATCH_TARGET(
          NV_PROVIDES_SM_80,
          (asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                        : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                        : "r"(static_cast<unsigned>(__cvta_generic_to_shared(line)))
                        : "memory");),
          NV_IS_DEVICE, (__trap();))
    }
  }
  template <class S, int M, int N>
  TALPA_HD void multiply_add(float (&sums)[M][N][4], const std::uint32_t (&a)[M][4],
                             const std::uint32_t (&b)[N / 2][4]) const {
    TALPA_UNROLL
    for (int m = 0; m < M; ++m) {
      TALPA_UNROLL
      for (int n = 0; n < N; ++n) {
        float(&d)[4] = sums[m][n];
        const std::uint32_t(&x)[4] = a[m];
        const std::uint32_t y0 = b[n / 2][n % 2 * 2], y1 = b[n / 2][n % 2 * 2 + 1];
        if constexpr (std::is_same_v<S, bfloat16>) {
          NV_DISPATCH_TARGET(
              NV_PROVIDES_SM_80,
              (asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
                   "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                   : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                   : "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "r"(y0), "r"(y1));),
              NV_IS_DEVICE, (__trap();))
        } else {
          NV_DISPATCH_TARGET(
              NV_PROVIDES_SM_80,
              (asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, "
                   "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                   : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                   : "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "r"(y0), "r"(y1));),
              NV_IS_DEVICE, (__trap();))
        }
      }
    }
  }

 private:
  /// Fences are cumulative: with a barrier on either side they hold for the whole block.
  TALPA_HD static bool arrives_last(std::uint32_t blocks, std::uint32_t* arrivals) {
    NV_IF_ELSE_TARGET(
        NV_IS_DEVICE,
        (__threadfence(); const bool last = atomicInc(arrivals, blocks - 1) == blocks - 1;
         __threadfence(); return last;),
        (return (static_cast<void>(blocks), static_cast<void>(arrivals), true);))
  }
};

template <int Threads, class Body>
__global__ void __launch_bounds__(Threads, least_blocks<Body>) kernel(const Body body) {
  device_block<Threads> block;
  body(block);
}

}  // namespace talpa::detail
