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

// Elements of one vector. 8 that are computed in float take two accesses of 16 bytes as float32 and
// one as float16 or bfloat16. Where double is computed registers are short, and 2 make one access.
template <class T>
inline constexpr int kVecSize = sizeof(T) == sizeof(float) ? 8 : 2;

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

// The part of a tensor that a chunk covers.
struct Slice {
  int64_t begin;
  int32_t size;
};

FASTREMEDY_DEVICE Slice slice_of(Chunk chunk, int64_t numel) {
  const int64_t begin = chunk.index * kChunkSize;
  return {begin, static_cast<int32_t>(numel - begin < kChunkSize ? numel - begin : kChunkSize)};
}

FASTREMEDY_DEVICE char* element_at(void* data, DType dtype, int64_t i) {
  return static_cast<char*>(data) + i * element_size(dtype);
}

// kWidth elements as memory has them; narrower elements than T fill the front. The rest is zero,
// not undefined: ptxas keeps registers that only some dtypes write alive over the whole kernel, and
// adamw_update_kernel would spill about 500 bytes.
template <class T, int kWidth>
struct Stored {
  uint32_t words[kWidth * sizeof(T) / sizeof(uint32_t)] = {};

  FASTREMEDY_DEVICE uint16_t half(int i) const {
    return static_cast<uint16_t>(words[i / 2] >> (16 * (i % 2)));
  }
  FASTREMEDY_DEVICE void set_half(int i, uint16_t bits) {
    const uint32_t kept = i % 2 ? words[i / 2] & 0xffffu : 0;
    words[i / 2] = kept | static_cast<uint32_t>(bits) << (16 * (i % 2));
  }
};

// Elements are read or written once per kernel: the streaming hint (evict first) leaves the L2
// cache to what the next kernel reads again.
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

// Elements [i, i + kWidth) from `data` on; kWidth is 1 or that of an aligned vector.
template <class T, int kWidth, Reuse kReuse = Reuse::kNever>
FASTREMEDY_DEVICE Stored<T, kWidth> load(const char* data, DType dtype, int32_t i) {
  const int size = element_size(dtype);
  const char* address = data + static_cast<int64_t>(i) * size;
  Stored<T, kWidth> stored;
  const auto set = [&](int first, auto word) { memcpy(stored.words + first, &word, sizeof(word)); };
  if constexpr (kWidth == 1) {
    if (size == 2) stored.words[0] = load_word<kReuse, uint16_t>(address);
    if (size == 4) stored.words[0] = load_word<kReuse, uint32_t>(address);
    if constexpr (sizeof(T) == 8) {
      if (size == 8) set(0, load_word<kReuse, uint2>(address));
    }
  } else {
    const int bytes = kWidth * size;
    if (bytes == 4) {
      set(0, load_word<kReuse, uint32_t>(address));
    } else if (bytes == 8) {
      set(0, load_word<kReuse, uint2>(address));
    } else {
      set(0, load_word<kReuse, uint4>(address));
      if constexpr (sizeof(stored) > kAccessBytes) {
        if (bytes > kAccessBytes) set(4, load_word<kReuse, uint4>(address + kAccessBytes));
      }
    }
  }
  return stored;
}

template <class T, int kWidth>
FASTREMEDY_DEVICE void store(char* data, DType dtype, int32_t i, const Stored<T, kWidth>& stored) {
  const int size = element_size(dtype);
  char* address = data + static_cast<int64_t>(i) * size;
  const uint32_t* words = stored.words;
  if constexpr (kWidth == 1) {
    if (size == 2) store_word(address, static_cast<uint16_t>(words[0]));
    if (size == 4) store_word(address, words[0]);
    if constexpr (sizeof(T) == 8) {
      if (size == 8) store_word(address, uint2{words[0], words[1]});
    }
  } else {
    const int bytes = kWidth * size;
    if (bytes == 4) {
      store_word(address, words[0]);
    } else if (bytes == 8) {
      store_word(address, uint2{words[0], words[1]});
    } else {
      store_word(address, uint4{words[0], words[1], words[2], words[3]});
      if constexpr (sizeof(stored) > kAccessBytes) {
        if (bytes > kAccessBytes) {
          store_word(address + kAccessBytes, uint4{words[4], words[5], words[6], words[7]});
        }
      }
    }
  }
}

// float64 is there only where T is double.
template <class T, int kWidth>
FASTREMEDY_DEVICE void unpack(const Stored<T, kWidth>& stored, DType dtype, T (&values)[kWidth]) {
  const auto each = [&](auto value_of) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) values[i] = value_of(i);
  };
  if (dtype == DType::kBFloat16) {
    each([&](int i) { return bfloat16_to_float(stored.half(i)); });
  } else if (dtype == DType::kFloat16) {
    each([&](int i) { return float16_to_float(stored.half(i)); });
  } else if (sizeof(T) == sizeof(float) || dtype == DType::kFloat32) {
    each([&](int i) { return bit_cast<float>(stored.words[i]); });
  } else if constexpr (sizeof(T) == sizeof(double)) {
    each([&](int i) {
      const uint64_t high = stored.words[2 * i + 1];
      return bit_cast<double>(high << 32 | stored.words[2 * i]);
    });
  }
}

template <class T, int kWidth>
FASTREMEDY_DEVICE Stored<T, kWidth> pack(const T (&values)[kWidth], DType dtype) {
  Stored<T, kWidth> stored;
  const auto each = [&](auto put) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) put(i);
  };
  if (dtype == DType::kBFloat16) {
    each([&](int i) { stored.set_half(i, float_to_bfloat16(static_cast<float>(values[i]))); });
  } else if (dtype == DType::kFloat16) {
    each([&](int i) { stored.set_half(i, float_to_float16(static_cast<float>(values[i]))); });
  } else if (sizeof(T) == sizeof(float) || dtype == DType::kFloat32) {
    each([&](int i) { stored.words[i] = bit_cast<uint32_t>(static_cast<float>(values[i])); });
  } else if constexpr (sizeof(T) == sizeof(double)) {
    each([&](int i) {
      const uint64_t bits = bit_cast<uint64_t>(values[i]);
      stored.words[2 * i] = static_cast<uint32_t>(bits);
      stored.words[2 * i + 1] = static_cast<uint32_t>(bits >> 32);
    });
  }
  return stored;
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
