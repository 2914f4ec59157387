// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/error.hpp>
#include <talpa/core/storage.hpp>
#include <talpa/cuda/kernel.hpp>

#include <nv/target>

#include <cstddef>
#include <cuda_runtime_api.h>
#include <string>

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
};

template <int Threads, class Body>
__global__ void __launch_bounds__(Threads, least_blocks<Body>) kernel(const Body body) {
  device_block<Threads> block;
  body(block);
}

}  // namespace talpa::detail
