// Memory movement of the multi-tensor kernels: vectors of a chunk's elements to registers and back,
// reductions over a block, and the launch.
#pragma once

#include <type_traits>

#include "../core/multi_tensor.h"
#include "../core/types.h"
#include "launch.h"
#include "runtime.cuh"

namespace fastremedy::cuda {

inline constexpr int kWarpSize = 32;
inline constexpr unsigned kAllLanes = 0xffffffffu;
inline constexpr int kAccessBytes = 16;  // the widest access of one thread

// Elements of one vector: 8 that are computed in float, 4 in double. Two accesses of 16 bytes for
// elements as wide as T, one for elements of half that width.
template <class T>
inline constexpr int kVecSize = 2 * kAccessBytes / static_cast<int>(sizeof(T));

static_assert(kVecSize<float> == 8 && kVecSize<double> == 4);
static_assert(sizeof(uint4) == kAccessBytes && alignof(uint4) == kAccessBytes);
static_assert(kChunkSize % kVecSize<float> == 0 && kChunkSize % kVecSize<double> == 0,
              "every chunk of an aligned tensor starts aligned");

// Pointers that come out of a table in memory: tells the compiler which instructions serve them.
template <class P>
FASTREMEDY_DEVICE P* as_global(P* pointer) {
#ifndef FASTREMEDY_EMULATION
  __builtin_assume(__isGlobal(pointer));
#endif
  return pointer;
}

FASTREMEDY_DEVICE bool is_aligned(const void* data) {
  return reinterpret_cast<uintptr_t>(data) % kAccessBytes == 0;
}

// kWidth elements as memory has them; narrower elements than T fill the front.
template <class T, int kWidth>
struct Stored {
  uint32_t words[kWidth * sizeof(T) / sizeof(uint32_t)];

  FASTREMEDY_DEVICE uint16_t half(int i) const {
    return static_cast<uint16_t>(words[i / 2] >> (16 * (i % 2)));
  }
  FASTREMEDY_DEVICE void set_half(int i, uint16_t bits) {
    const uint32_t kept = i % 2 ? words[i / 2] & 0xffffu : 0;
    words[i / 2] = kept | static_cast<uint32_t>(bits) << (16 * (i % 2));
  }
};

// Elements are read or written once per kernel: the streaming hint (evict first) leaves the L2 cache
// to what the next kernel reads again.
enum class Reuse { kNever, kByNextKernel };

template <Reuse kReuse, class Word>
FASTREMEDY_DEVICE Word load_word(const char* address) {
  const auto* word = as_global(reinterpret_cast<const Word*>(address));
  return kReuse == Reuse::kNever ? __ldcs(word) : *word;
}

template <class Word>
FASTREMEDY_DEVICE void store_word(char* address, Word word) {
  __stcs(as_global(reinterpret_cast<Word*>(address)), word);
}

// Elements [i, i + kWidth) of an array; kWidth is 1 or that of an aligned vector.
template <class T, int kWidth, Reuse kReuse = Reuse::kNever>
FASTREMEDY_DEVICE Stored<T, kWidth> load(const void* data, DType dtype, int64_t i) {
  const int size = element_size(dtype);
  const char* address = static_cast<const char*>(data) + i * size;
  Stored<T, kWidth> stored;
  const auto set = [&](int first, auto word) {
    constexpr int kWords = sizeof(word) / sizeof(uint32_t);
    memcpy(stored.words + first, &word, kWords * sizeof(uint32_t));
  };
  if constexpr (kWidth == 1) {
    if (size == 2) stored.words[0] = load_word<kReuse, uint16_t>(address);
    if (size == 4) stored.words[0] = load_word<kReuse, uint32_t>(address);
    if constexpr (sizeof(T) == 8) {
      if (size == 8) set(0, load_word<kReuse, uint2>(address));
    }
  } else {
    const int bytes = kWidth * size;
    if (bytes == 8) {
      set(0, load_word<kReuse, uint2>(address));
    } else {
      set(0, load_word<kReuse, uint4>(address));
      if (bytes == 32) set(4, load_word<kReuse, uint4>(address + kAccessBytes));
    }
  }
  return stored;
}

template <class T, int kWidth>
FASTREMEDY_DEVICE void store(void* data, DType dtype, int64_t i, const Stored<T, kWidth>& stored) {
  const int size = element_size(dtype);
  char* address = static_cast<char*>(data) + i * size;
  const uint32_t* words = stored.words;
  if constexpr (kWidth == 1) {
    if (size == 2) store_word(address, static_cast<uint16_t>(words[0]));
    if (size == 4) store_word(address, words[0]);
    if constexpr (sizeof(T) == 8) {
      if (size == 8) store_word(address, uint2{words[0], words[1]});
    }
  } else {
    const int bytes = kWidth * size;
    if (bytes == 8) {
      store_word(address, uint2{words[0], words[1]});
    } else {
      store_word(address, uint4{words[0], words[1], words[2], words[3]});
      if (bytes == 32) {
        store_word(address + kAccessBytes, uint4{words[4], words[5], words[6], words[7]});
      }
    }
  }
}

template <class T, int kWidth>
FASTREMEDY_DEVICE void unpack(const Stored<T, kWidth>& stored, DType dtype, T (&values)[kWidth]) {
  const auto each = [&](auto value_of) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) values[i] = value_of(i);
  };
  switch (dtype) {
    case DType::kFloat32:
      return each([&](int i) { return bit_cast<float>(stored.words[i]); });
    case DType::kBFloat16:
      return each([&](int i) { return bfloat16_to_float(stored.half(i)); });
    case DType::kFloat16:
      return each([&](int i) { return float16_to_float(stored.half(i)); });
    case DType::kFloat64:
      if constexpr (sizeof(T) == 8) {
        each([&](int i) {
          const uint64_t high = stored.words[2 * i + 1];
          return bit_cast<double>(high << 32 | stored.words[2 * i]);
        });
      }
  }
}

template <class T, int kWidth>
FASTREMEDY_DEVICE Stored<T, kWidth> pack(const T (&values)[kWidth], DType dtype) {
  Stored<T, kWidth> stored;
  const auto each = [&](auto put) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) put(i);
  };
  switch (dtype) {
    case DType::kFloat32:
      each([&](int i) { stored.words[i] = bit_cast<uint32_t>(static_cast<float>(values[i])); });
      break;
    case DType::kBFloat16:
      each([&](int i) { stored.set_half(i, float_to_bfloat16(static_cast<float>(values[i]))); });
      break;
    case DType::kFloat16:
      each([&](int i) { stored.set_half(i, float_to_float16(static_cast<float>(values[i]))); });
      break;
    case DType::kFloat64:
      if constexpr (sizeof(T) == 8) {
        each([&](int i) {
          const uint64_t bits = bit_cast<uint64_t>(values[i]);
          stored.words[2 * i] = static_cast<uint32_t>(bits);
          stored.words[2 * i + 1] = static_cast<uint32_t>(bits >> 32);
        });
      }
  }
  return stored;
}

struct Range {
  int64_t begin;
  int64_t end;
};

FASTREMEDY_DEVICE Range range_of(Chunk chunk, int64_t numel) {
  const int64_t begin = chunk.index * kChunkSize;
  return {begin, numel - begin < kChunkSize ? numel : begin + kChunkSize};
}

// Gives each element of a range to one thread: visit(width, i) takes elements [i, i + width). Where
// vectors do not fit (the tail, misaligned tensors) neighbouring threads take neighbouring elements.
template <class T, int kUnroll, class Visit>
FASTREMEDY_DEVICE void for_each_vec(Range range, bool is_aligned, Visit visit) {
  constexpr int kWidth = kVecSize<T>;
  const int64_t num_in_vecs = is_aligned ? (range.end - range.begin) / kWidth * kWidth : 0;
  const int64_t vecs_end = range.begin + num_in_vecs;
#pragma unroll kUnroll
  for (int64_t i = range.begin + threadIdx.x * kWidth; i < vecs_end; i += blockDim.x * kWidth) {
    visit(std::integral_constant<int, kWidth>(), i);
  }
#pragma unroll kUnroll
  for (int64_t i = vecs_end + threadIdx.x; i < range.end; i += blockDim.x) {
    visit(std::integral_constant<int, 1>(), i);
  }
}

// The combination of all threads' values, in all threads; always in the same order.
template <int kBlockSize, class Combine>
FASTREMEDY_DEVICE double block_reduce(double value, double identity, Combine combine) {
  constexpr int kNumWarps = kBlockSize / kWarpSize;
  static_assert(kNumWarps <= kWarpSize, "one warp combines the results of all");
  using WarpValues = double[kNumWarps];
  FASTREMEDY_SHARED(WarpValues, warp_values);
  const auto warp_reduce = [&] {
#pragma unroll
    for (int lane_mask = kWarpSize / 2; lane_mask > 0; lane_mask /= 2) {
      value = combine(value, __shfl_xor_sync(kAllLanes, value, lane_mask));
    }
  };
  const int lane = threadIdx.x % kWarpSize;
  warp_reduce();
  if (lane == 0) warp_values[threadIdx.x / kWarpSize] = value;
  __syncthreads();
  value = lane < kNumWarps ? warp_values[lane] : identity;
  __syncthreads();  // the next reduction writes warp_values again
  warp_reduce();
  return value;
}

inline int status_of(cudaError_t error) {
  if (error != cudaSuccess) cudaGetLastError();  // reported here, not by the next launch as well
  return static_cast<int>(error);
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
