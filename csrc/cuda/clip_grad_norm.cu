// Norm of all gradients, and clipping of those that need it.
#include "clip_grad_norm.cuh"

namespace fastremedy::cuda {
namespace {

struct NothingMore {
  FASTREMEDY_DEVICE void operator()(const ClipResult&) const {}
};

template <class T>
FASTREMEDY_DEVICE void scale_chunk(const GradTensor& grad, Slice slice, double grad_factor) {
  const T factor = static_cast<T>(grad_factor);
  char* const data = element_at(grad.data, grad.dtype, slice.begin);
  for_each_vec<T, 1>(
      slice.size, is_aligned(data),
      [&](auto width, int32_t i) { return load<T, decltype(width)::value>(data, grad.dtype, i); },
      [&](auto width, int32_t i, const auto& stored) {
        constexpr int kWidth = decltype(width)::value;
        T values[kWidth];
        unpack(stored, grad.dtype, values);
#pragma unroll
        for (int k = 0; k < kWidth; ++k) values[k] *= factor;
        store(data, grad.dtype, i, pack(values, grad.dtype));
      });
}

__global__ void __launch_bounds__(kNormBlockSize) scale_grads_kernel(GradNormArgs args) {
  const ClipResult result = *args.result;
  if (!result.is_clipped) return;
  // Backwards: what the norm read last is still in L2.
  for (int32_t c = args.num_chunks - 1 - blockIdx.x; c >= 0; c -= gridDim.x) {
    const Chunk chunk = args.chunks[c];
    const GradTensor grad = args.grads[chunk.tensor];
    if (grad.data == nullptr) continue;
    const Slice slice = slice_of(chunk, grad.numel);
    if (grad.dtype == DType::kFloat64) {
      scale_chunk<double>(grad, slice, result.grad_factor);
    } else {
      scale_chunk<float>(grad, slice, result.grad_factor);
    }
  }
}

}  // namespace

int launch_grad_norm(const GradNormArgs& args, void* stream) {
  return launch_norm(args, NothingMore(), stream);
}

int launch_scale_grads(const GradNormArgs& args, void* stream) {
  return launch_over_chunks<kNormBlockSize>(scale_grads_kernel, args.num_chunks, stream, args);
}

}  // namespace fastremedy::cuda
