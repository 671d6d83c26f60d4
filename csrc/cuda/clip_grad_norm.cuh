// The kernel of the norm. Its last block finishes the result; for AdamW it does more.
//
// Each chunk gives one partial at a fixed place, and the last block adds the partials in a fixed
// order: the result is bitwise the same for any number of blocks.
#pragma once

#include <cmath>

#include "../core/arguments.h"
#include "clip_grad_norm_tensors.cuh"
#include "multi_tensor.cuh"

namespace fastremedy::cuda {

// Two blocks may take 64 registers a thread. That is room for 4 vectors of float32 on their way to
// every thread, 128 KiB for a multiprocessor, with nothing spilled on sm_75 to sm_120.
#ifdef FASTREMEDY_EMULATION
inline constexpr int kNormBlockSize = 64;
#else
inline constexpr int kNormBlockSize = 512;
#endif
inline constexpr int kNormBlocks = 2;

// What one thread has seen of a chunk. For L1 and L2 that is the sum of |x| or of x * x.
template <NormKind kKind, class Sum>
struct Accumulator {
  explicit FASTREMEDY_DEVICE Accumulator(double /*norm_type*/) {}

  template <class T>
  FASTREMEDY_DEVICE void add(int lane, T value) {
    const Sum x = value;
    sums[lane] += kKind == NormKind::kL2 ? x * x : std::fabs(x);
  }
  FASTREMEDY_DEVICE double total() const {
    const Sum left = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    const Sum right = (sums[4] + sums[5]) + (sums[6] + sums[7]);
    return left + right;
  }

  Sum sums[8] = {};  // separate lanes hide the latency of the addition
};

// The largest |x|. As integers, the bits of magnitudes are in the order of their values, with NaN
// on top.
template <class Sum>
struct Accumulator<NormKind::kMax, Sum> {
  using Bits = std::conditional_t<sizeof(Sum) == 8, uint64_t, uint32_t>;

  explicit FASTREMEDY_DEVICE Accumulator(double /*norm_type*/) {}

  FASTREMEDY_DEVICE void add(int /*lane*/, Sum value) {
    const Bits bits = bit_cast<Bits>(value) & static_cast<Bits>(-1) >> 1;
    max_bits = bits > max_bits ? bits : max_bits;
  }
  FASTREMEDY_DEVICE double total() const { return bit_cast<Sum>(max_bits); }

  Bits max_bits = 0;
};

// The sum of |x|^p, or the smallest |x|.
template <class Sum>
struct Accumulator<NormKind::kGeneral, Sum> {
  explicit FASTREMEDY_DEVICE Accumulator(double norm_type)
      : norm_type(norm_type), combined(norm_identity(NormKind::kGeneral, norm_type)) {}

  FASTREMEDY_DEVICE void add(int /*lane*/, double value) {
    const double term = norm_term(std::fabs(value), norm_type);
    combined = norm_combine(NormKind::kGeneral, norm_type, combined, term);
  }
  FASTREMEDY_DEVICE double total() const { return combined; }

  const double norm_type;
  double combined;
};

// Adds a slice to what the thread has seen; false if all bits of its elements are 0. T is what
// elements are converted to.
template <class T, int kBatch, class Seen>
FASTREMEDY_DEVICE bool accumulate(const GradTensor& grad, Slice slice, Seen& seen) {
  uint32_t any_bits = 0;
  const auto accumulate_as = [&](auto constant) {
    constexpr DType kDType = decltype(constant)::value;
    const char* data = element_at(grad.data, kDType, slice.begin);
    for_each_vec<T, kBatch>(
        slice.size, is_aligned(data),
        [&](auto width, int32_t i) {
          return load<T, decltype(width)::value, Reuse::kByNextKernel>(data, kDType, i);
        },
        [&](auto width, int32_t /*i*/, const auto& stored) {
          constexpr int kWidth = decltype(width)::value;
          T values[kWidth];
          unpack(stored, kDType, values);
#pragma unroll
          for (int k = 0; k < kWidth; ++k) seen.add(k, values[k]);
          for (const uint32_t word : stored.words) any_bits |= word;
        });
  };
  if constexpr (sizeof(T) == sizeof(double)) {
    accumulate_as(std::integral_constant<DType, DType::kFloat64>());
  } else if (grad.dtype == DType::kFloat32) {
    accumulate_as(std::integral_constant<DType, DType::kFloat32>());
  } else if (grad.dtype == DType::kBFloat16) {
    accumulate_as(std::integral_constant<DType, DType::kBFloat16>());
  } else {
    accumulate_as(std::integral_constant<DType, DType::kFloat16>());
  }
  return any_bits != 0;
}

// The partial of a chunk, in all threads of the block.
template <NormKind kKind>
FASTREMEDY_DEVICE double chunk_partial(const GradTensor& grad, Slice slice, double norm_type) {
  const auto reduce = [&](double value) {
    return block_reduce<kNormBlockSize>(
        value, norm_identity(kKind, norm_type),
        [&](double a, double b) { return norm_combine(kKind, norm_type, a, b); });
  };
  if (grad.dtype == DType::kFloat64) {
    Accumulator<kKind, double> seen(norm_type);
    accumulate<double, 2>(grad, slice, seen);
    return reduce(seen.total());
  }
  if constexpr (kKind == NormKind::kMax) {
    Accumulator<kKind, float> seen(norm_type);
    accumulate<float, 4>(grad, slice, seen);
    return reduce(seen.total());
  }
  if constexpr (kKind != NormKind::kGeneral) {
    // Squares of floats above 1e19 overflow and those below 1e-19 lose digits. A sum of 65536 that
    // reaches 1e-30 has lost at most 65536 * 2^-150, which is 5e-11 of it.
    constexpr double kSmallestExactSum = 1e-30;
    Accumulator<kKind, float> seen(norm_type);
    const bool is_nonzero = accumulate<float, 4>(grad, slice, seen);
    const double total = reduce(seen.total());
    if (is_finite(total) && total >= kSmallestExactSum) return total;
    if (!__syncthreads_or(is_nonzero)) return 0;
  }
  // No float overflows or underflows here: squares range from 2^-298 to 2^256.
  Accumulator<kKind, double> seen(norm_type);
  accumulate<float, 1>(grad, slice, seen);
  return reduce(seen.total());
}

template <NormKind kKind>
FASTREMEDY_DEVICE double norm_of_partials(const GradNormArgs& args) {
  const double norm_type = args.options.norm_type;
  const double identity = norm_identity(kKind, norm_type);
  const auto combine = [&](double a, double b) { return norm_combine(kKind, norm_type, a, b); };
  double total = identity;
  for (int32_t c = threadIdx.x; c < args.num_chunks; c += kNormBlockSize) {
    total = combine(total, args.partials[c]);
  }
  total = block_reduce<kNormBlockSize>(total, identity, combine);
  if (kKind == NormKind::kGeneral && total == identity) {
    // The norm of nothing is 0, also where that of zeros or infinities is not.
    bool has_elements = false;
    for (int32_t c = threadIdx.x; c < args.num_chunks; c += kNormBlockSize) {
      has_elements |= args.grads[args.chunks[c].tensor].data != nullptr;
    }
    if (!__syncthreads_or(has_elements)) return 0;
  }
  return norm_finish(kKind, norm_type, total);
}

template <NormKind kKind>
FASTREMEDY_DEVICE void write_tensor_norms(const GradNormArgs& args) {
  const double norm_type = args.options.norm_type;
  for_each_tensor<kNormBlockSize, 1>(
      args, args.partials, norm_identity(kKind, norm_type),
      [&](double a, double b) { return norm_combine(kKind, norm_type, a, b); },
      [&](int32_t tensor, const double (&total)[1]) {
        const bool has_grad = args.grads[tensor].data != nullptr;
        args.tensor_norms[tensor] = has_grad ? norm_finish(kKind, norm_type, total[0]) : 0;
      });
}

FASTREMEDY_DEVICE void write_result(const GradNormArgs& args, const ClipResult& result) {
  *args.result = result;
  if (args.kind == NormKind::kNone || args.total_norm == nullptr) return;
  if (args.total_norm_dtype == DType::kFloat64) {
    *static_cast<double*>(args.total_norm) = result.total_norm;
  } else {
    *static_cast<float*>(args.total_norm) = static_cast<float>(result.total_norm);
  }
}

// finish(result) runs in all threads of the last block.
template <NormKind kKind, class Finish>
__global__ void __launch_bounds__(kNormBlockSize, kNormBlocks)
    norm_kernel(GradNormArgs args, Finish finish) {
  double norm = 0;
  if constexpr (kKind != NormKind::kNone) {
    const double norm_type = args.options.norm_type;
    for (int32_t c = blockIdx.x; c < args.num_chunks; c += gridDim.x) {
      const Chunk chunk = args.chunks[c];
      const GradTensor grad = args.grads[chunk.tensor];
      const double partial =
          grad.data != nullptr ? chunk_partial<kKind>(grad, slice_of(chunk, grad.numel), norm_type)
                               : norm_identity(kKind, norm_type);
      if (threadIdx.x == 0) args.partials[c] = partial;
    }
    if (!is_last_block(args.counter, gridDim.x)) return;
    norm = norm_of_partials<kKind>(args);
    if (args.tensor_norms != nullptr) write_tensor_norms<kKind>(args);
  }
  FASTREMEDY_SHARED(ClipResult, result);
  if (threadIdx.x == 0) {
    result = clip_result(args.options, norm);
    write_result(args, result);
  }
  __syncthreads();
  finish(result);
}

template <class Finish>
int launch_norm(const GradNormArgs& args, const Finish& finish, void* stream) {
  const auto launch = [&](auto kernel, int32_t num_chunks) {
    return launch_over_chunks<kNormBlockSize>(kernel, num_chunks, stream, args, finish);
  };
  switch (args.kind) {
    case NormKind::kNone:
      return launch(norm_kernel<NormKind::kNone, Finish>, 1);
    case NormKind::kL1:
      return launch(norm_kernel<NormKind::kL1, Finish>, args.num_chunks);
    case NormKind::kL2:
      return launch(norm_kernel<NormKind::kL2, Finish>, args.num_chunks);
    case NormKind::kMax:
      return launch(norm_kernel<NormKind::kMax, Finish>, args.num_chunks);
    case NormKind::kGeneral:
      return launch(norm_kernel<NormKind::kGeneral, Finish>, args.num_chunks);
  }
  return static_cast<int>(cudaErrorInvalidValue);
}

}  // namespace fastremedy::cuda
