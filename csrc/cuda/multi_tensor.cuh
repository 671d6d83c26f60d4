// Memory movement of the multi-tensor kernels: the elements of a chunk over the threads of a block,
// and the launch.
#pragma once

#include <type_traits>

#include "../core/multi_tensor.h"
#include "block.cuh"
#include "launch.h"
#include "vectors.cuh"

namespace fastremedy::cuda {

static_assert(kChunkSize % kVecSize<float> == 0 && kChunkSize % kVecSize<double> == 0,
              "every chunk of an aligned tensor starts aligned");

// The part of a tensor that a chunk covers.
struct Slice {
  int64_t begin;
  int32_t size;
};

FASTREMEDY_DEVICE Slice slice_of(Chunk chunk, int64_t numel) {
  const int64_t begin = chunk.index * kChunkSize;
  return {begin, static_cast<int32_t>(numel - begin < kChunkSize ? numel - begin : kChunkSize)};
}

// Gives each of `size` elements to one thread: use(width, i, load(width, i)) for [i, i + width),
// with kBatch loads under way at once. Where vectors do not fit (the tail, misaligned tensors)
// neighbouring threads take neighbouring elements.
template <class T, int kBatch, class Load, class Use>
FASTREMEDY_DEVICE void for_each_vec(int32_t size, bool all_aligned, Load load, Use use) {
  const auto visit = [&](auto width, int32_t begin, int32_t end) {
    const int32_t step = static_cast<int32_t>(blockDim.x) * width.value;
    int32_t i = begin + static_cast<int32_t>(threadIdx.x) * width.value;
    if constexpr (kBatch > 1) {
      for (; i + (kBatch - 1) * step < end; i += kBatch * step) {
        decltype(load(width, i)) batch[kBatch];
#pragma unroll
        for (int b = 0; b < kBatch; ++b) batch[b] = load(width, i + b * step);
#pragma unroll
        for (int b = 0; b < kBatch; ++b) use(width, i + b * step, batch[b]);
      }
    }
#pragma unroll 1
    for (; i < end; i += step) use(width, i, load(width, i));
  };
  constexpr int kWidth = kVecSize<T>;
  const int32_t vecs_end = all_aligned ? size / kWidth * kWidth : 0;
  visit(std::integral_constant<int, kWidth>(), 0, vecs_end);
  visit(std::integral_constant<int, 1>(), vecs_end, size);
}

// Launches as many blocks as the device holds at once, at most one for each chunk.
template <int kBlockSize, class... Args>
int launch_over_chunks(void (*kernel)(Args...), int32_t num_chunks, void* stream,
                       const Args&... args) {
  int device = 0, num_multiprocessors = 0, blocks_each = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return status_of(error);
  error = cudaDeviceGetAttribute(&num_multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return status_of(error);
  error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks_each, kernel, kBlockSize, 0);
  if (error != cudaSuccess) return status_of(error);
  const int32_t capacity = num_multiprocessors * blocks_each;
  const int32_t num_blocks = num_chunks < capacity ? num_chunks : capacity;
  FASTREMEDY_LAUNCH(kernel, num_blocks > 0 ? num_blocks : 1, kBlockSize,
                    static_cast<cudaStream_t>(stream), args...);
  return status_of(cudaGetLastError());
}

}  // namespace fastremedy::cuda
