// What the threads of a warp or a block find out together.
#pragma once

#include <cstdint>

#include "runtime.cuh"

namespace fastremedy::cuda {

inline constexpr int kWarpSize = 32;
inline constexpr unsigned kAllLanes = 0xffffffffu;

// The combination of the values of a warp, in all its lanes; always in the same order.
template <class Combine>
FASTREMEDY_DEVICE double warp_reduce(double value, Combine combine) {
#pragma unroll
  for (int lane_mask = kWarpSize / 2; lane_mask > 0; lane_mask /= 2) {
    value = combine(value, __shfl_xor_sync(kAllLanes, value, lane_mask));
  }
  return value;
}

// The combination of all threads' values, in all threads; always in the same order.
template <int kBlockSize, class Combine>
FASTREMEDY_DEVICE double block_reduce(double value, double identity, Combine combine) {
  constexpr int kNumWarps = kBlockSize / kWarpSize;
  static_assert(kNumWarps <= kWarpSize, "one warp combines the results of all");
  using WarpValues = double[kNumWarps];
  FASTREMEDY_SHARED(WarpValues, warp_values);
  const int lane = threadIdx.x % kWarpSize;
  value = warp_reduce(value, combine);
  if (lane == 0) warp_values[threadIdx.x / kWarpSize] = value;
  __syncthreads();
  value = lane < kNumWarps ? warp_values[lane] : identity;
  __syncthreads();  // the next reduction writes warp_values again
  return warp_reduce(value, combine);
}

// True in the last of `num_blocks` blocks to get here; it sees what the others wrote. The counter
// returns to 0.
FASTREMEDY_DEVICE bool is_last_block(uint32_t* counter, uint32_t num_blocks) {
  FASTREMEDY_SHARED(bool, is_last);
  if (threadIdx.x == 0) {
    __threadfence();
    is_last = atomicInc(counter, num_blocks - 1) == num_blocks - 1;
    __threadfence();
  }
  __syncthreads();
  return is_last;
}

}  // namespace fastremedy::cuda
