// What the partials of the chunks give for each tensor.
#pragma once

#include "../core/arguments.h"
#include "multi_tensor.cuh"

namespace fastremedy::cuda {

// All threads of one block: write(tensor, values) for every tensor that has chunks, by one thread.
// A partial is kSize doubles; those of a tensor are combined in an order that is always the same.
template <int kBlockSize, int kSize, class Combine, class Write>
FASTREMEDY_DEVICE void for_each_tensor(const GradNormArgs& args, const double* partials,
                                       double identity, Combine combine, Write write) {
  const int lane = threadIdx.x % kWarpSize;
  const auto add_partial = [&](double (&values)[kSize], int64_t chunk) {
#pragma unroll
    for (int k = 0; k < kSize; ++k) {
      values[k] = combine(values[k], partials[chunk * kSize + k]);
    }
  };
  // A warp looks at 32 chunks at a time and takes the tensors that begin there.
  for (int32_t begin = threadIdx.x - lane; begin < args.num_chunks; begin += kBlockSize) {
    int64_t num_partials = 0;
    if (begin + lane < args.num_chunks) {
      const Chunk chunk = args.chunks[begin + lane];
      if (chunk.index == 0) num_partials = num_chunks(args.grads[chunk.tensor].numel, kChunkSize);
      if (num_partials == 1) {  // as most tensors of most networks: all of them at once
        double values[kSize];
#pragma unroll
        for (double& value : values) value = identity;
        add_partial(values, begin + lane);
        write(chunk.tensor, values);
      }
    }
    unsigned longer = __ballot_sync(kAllLanes, num_partials > 1);
#pragma unroll 1
    for (int32_t first = begin; longer != 0; longer >>= 1, ++first) {
      if (longer % 2 == 0) continue;
      const int32_t tensor = args.chunks[first].tensor;
      const int64_t end = first + num_chunks(args.grads[tensor].numel, kChunkSize);
      double values[kSize];
#pragma unroll
      for (double& value : values) value = identity;
      for (int64_t c = first + lane; c < end; c += kWarpSize) add_partial(values, c);
#pragma unroll
      for (double& value : values) value = warp_reduce(value, combine);
      if (lane == 0) write(tensor, values);
    }
  }
}

}  // namespace fastremedy::cuda
