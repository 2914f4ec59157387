// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/check.hpp>
#include <talpa/core/matrix.hpp>
#include <talpa/core/workspace.hpp>
#include <talpa/cuda/launch.cuh>

#include <cstddef>
#include <cstdint>
#include <cublasLt.h>
#include <cuda_runtime_api.h>
#include <memory>
#include <utility>
#include <vector>

namespace talpa {

namespace detail {

/// Throws device_error when a call of cuBLASLt failed.
inline void check_cublas(cublasStatus_t status, const char* function) {
  if (status == CUBLAS_STATUS_SUCCESS) return;
  throw device_error(
      concat("talpa::", function, ": cuBLASLt says '", cublasLtGetStatusString(status), "'"));
}

struct destroy_stream {
  void operator()(cudaStream_t stream) const { cudaStreamDestroy(stream); }
};
struct destroy_handle {
  void operator()(cublasLtHandle_t handle) const { cublasLtDestroy(handle); }
};

/// What distinguishes two products for cuBLASLt.
struct product_shape {
  int scalar_a, scalar_c;  // cudaDataType_t
  int compute;             // cublasComputeType_t
  index m, n, k, lda, ldb, ldc;
  int transpose_a, transpose_b;
  int alignment_a, alignment_b, alignment_c;  // greatest power of two up to 256, bytes
  bool adds;                                  // beta is not zero
  friend bool operator==(const product_shape&, const product_shape&) = default;
};
struct product_plan {
  product_shape shape;
  cublasLtMatmulAlgo_t algorithm;
  std::size_t workspace_bytes;
};

}  // namespace detail

/// What executes on a CUDA device: a stream, a cuBLASLt handle and memory. One context serves one
/// calling thread at a time; work is queued on its stream in the order of the calls.
///
/// The algorithm of a product is chosen once for each shape, at its first call, and kept: results
/// have the same bits on every run on the same device. After the first step of some sizes a step
/// allocates nothing and waits for nothing, so that it can be captured in a CUDA graph.
/// Throws: device_error when no device answers.
template <>
struct context<gpu> {
  /// On a stream of its own, which does not wait for the legacy stream.
  context() : context(make_stream()) { owned_.reset(stream); }
  /// On a stream of somebody else, which must outlive it.
  explicit context(cudaStream_t stream_) : stream(stream_) {
    cublasLtHandle_t made = nullptr;
    detail::check_cublas(cublasLtCreate(&made), "context");
    handle_.reset(made);
    product_workspace_ = detail::block<gpu>(product_workspace_bytes);
    arrivals_ = detail::block<gpu>(detail::arrival_counters * sizeof(std::uint32_t));
    detail::storage<gpu>::clear(arrivals_.data(), arrivals_.size());
  }

  cudaStream_t stream;
  /// Looks at values too (NaN or all -inf logits) and throws value_error: copies them to the host
  /// and waits, so it cannot be captured in a graph.
  bool checked = false;
  /// What forward saves for backward; the caller opens a scope round each step.
  workspace<gpu> memory;
  /// Temporaries of a single call, as in context<cpu>.
  workspace<gpu> scratch;

  /// Waits until everything queued so far is done. Throws device_error when some of it failed.
  void synchronise() const {
    detail::check_cuda(cudaStreamSynchronize(stream), "context::synchronise");
  }

  cublasLtHandle_t handle() const { return handle_.get(); }
  /// Memory that products may use, the same for all: they run one after the other.
  std::byte* product_workspace() { return product_workspace_.data(); }
  static constexpr std::size_t product_workspace_bytes = std::size_t{32} << 20;
  /// Counters of Block::last_of, 0 between launches, which run one after the other.
  std::uint32_t* arrivals() { return reinterpret_cast<std::uint32_t*>(arrivals_.data()); }
  /// Algorithms chosen so far.
  std::vector<detail::product_plan>& product_plans() { return plans_; }

 private:
  static cudaStream_t make_stream() {
    cudaStream_t made = nullptr;
    detail::check_cuda(cudaStreamCreateWithFlags(&made, cudaStreamNonBlocking), "context");
    return made;
  }

  std::unique_ptr<CUstream_st, detail::destroy_stream> owned_;
  std::unique_ptr<cublasLtContext, detail::destroy_handle> handle_;
  detail::block<gpu> product_workspace_;
  detail::block<gpu> arrivals_;
  std::vector<detail::product_plan> plans_;
};

namespace detail {

template <>
struct launcher<gpu> {
  template <int Threads, class Body>
  static void run(context<gpu>& ctx, index blocks, std::size_t shared_bytes, const Body& body) {
    if (shared_bytes > 48 * 1024) {
      check_cuda(
          cudaFuncSetAttribute(kernel<Threads, Body>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shared_bytes)),
          "launch");
    }
    kernel<Threads, Body>
        <<<static_cast<unsigned>(blocks), Threads, shared_bytes, ctx.stream>>>(body);
    check_cuda(cudaGetLastError(), "launch");
  }
};

}  // namespace detail

}  // namespace talpa
