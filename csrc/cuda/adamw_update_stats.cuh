// UpdateStats of every tensor: sums of a thread, of a chunk, of a tensor.
#pragma once

#include "clip_grad_norm_tensors.cuh"

namespace fastremedy::cuda {

// What each thread has seen of a chunk. In shared memory: 10 more registers in the loop over the
// elements would spill, and an access for 8 elements costs nothing next to theirs.
template <int kBlockSize>
FASTREMEDY_DEVICE auto update_sums() -> UpdateStats (&)[kBlockSize] {
  using ThreadSums = UpdateStats[kBlockSize];
  FASTREMEDY_SHARED(ThreadSums, sums);
  return sums;
}

template <int kWidth, class T>
FASTREMEDY_DEVICE void add_elements(UpdateStats& shared_sums, const T (&grads)[kWidth],
                                    const T (&before)[kWidth], const T (&after)[kWidth]) {
  UpdateStats sums = shared_sums;
#pragma unroll
  for (int k = 0; k < kWidth; ++k) add_element(sums, grads[k], before[k], after[k]);
  shared_sums = sums;
}

// The sums of all threads become the partial of the chunk, always in the same order.
template <int kBlockSize>
FASTREMEDY_DEVICE void write_partial(UpdateStats& partial) {
  const auto* const sums = reinterpret_cast<const double*>(update_sums<kBlockSize>());
  auto* const totals = reinterpret_cast<double*>(&partial);
  const int lane = threadIdx.x % kWarpSize;
  __syncthreads();
  for (int k = threadIdx.x / kWarpSize; k < kNumUpdateStats; k += kBlockSize / kWarpSize) {
    double total = 0;
#pragma unroll
    for (int t = lane; t < kBlockSize; t += kWarpSize) total += sums[t * kNumUpdateStats + k];
    total = warp_reduce(total, [](double a, double b) { return a + b; });
    if (lane == 0) totals[k] = total;
  }
  __syncthreads();  // the next chunk begins with zeros
}

// For all threads of the last block.
template <int kBlockSize>
FASTREMEDY_DEVICE void write_update_stats(const AdamWArgs& args) {
  for (int32_t t = threadIdx.x; t < args.num_tensors; t += kBlockSize) {
    const GradTensor grad = args.norm.grads[t];
    if (grad.data != nullptr && grad.numel == 0) args.update_stats[t] = {};  // it has no chunk
  }
  for_each_tensor<kBlockSize, kNumUpdateStats>(
      args.norm, reinterpret_cast<const double*>(args.update_partials), 0,
      [](double a, double b) { return a + b; },
      [&](int32_t tensor, const double (&sums)[kNumUpdateStats]) {
        if (args.norm.grads[tensor].data == nullptr) return;
        args.update_stats[tensor] = {sums[0], sums[1], sums[2], sums[3], sums[4]};
      });
}

}  // namespace fastremedy::cuda
