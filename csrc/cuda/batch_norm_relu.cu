// Batch normalisation with an activation: the launches.
#include "batch_norm_relu_backward.cuh"
#include "batch_norm_relu_forward.cuh"

namespace fastremedy::cuda {
namespace {

// use(lane, is channels last) with the types that fit the call.
template <class Use>
int with_lanes(const BatchNormShape& shape, bool has_vectors, Use use) {
  const auto with_layout = [&](auto lane) {
    return shape.channels_last ? use(lane, std::true_type()) : use(lane, std::false_type());
  };
  switch (shape.dtype) {
    case DType::kFloat64:
      return with_layout(LaneType<double, DType::kFloat64, false>());
    case DType::kFloat32:
      if (has_vectors) return with_layout(LaneType<float, DType::kFloat32, true>());
      break;
    case DType::kFloat16:
      if (has_vectors) return with_layout(LaneType<float, DType::kFloat16, true>());
      break;
    case DType::kBFloat16:
      if (has_vectors) return with_layout(LaneType<float, DType::kBFloat16, true>());
      break;
  }
  return with_layout(LaneType<float, DType::kFloat32, false>());
}

template <class Lane>
Tiling tiling_of(const BatchNormShape& shape, Lane) {
  return make_tiling(shape, Lane::kWidth, Lane::kMaxColumns);
}

template <class... Args>
int launch(void (*kernel)(Args...), int64_t num_blocks, void* stream, const Args&... args) {
  FASTREMEDY_LAUNCH(kernel, static_cast<unsigned>(num_blocks), kNormalizeBlockSize,
                    static_cast<cudaStream_t>(stream), args...);
  return status_of(cudaGetLastError());
}

// Every row of every operand starts aligned.
template <class... Pointers>
bool vectors_fit(const BatchNormShape& shape, Pointers... pointers) {
  return shape.row_size() % kVecSize<float> == 0 &&
         (... && (reinterpret_cast<uintptr_t>(pointers) % kAccessBytes == 0));
}

}  // namespace

BatchNormScratchSize batch_norm_scratch_size(const BatchNormShape& shape) {
  BatchNormScratchSize size{0, 0};
  for (const bool has_vectors : {false, true}) {
    with_lanes(shape, has_vectors, [&](auto lane, auto) {
      const Tiling tiling = tiling_of(shape, lane);
      const size_t counters = tiling.num_tiles;
      const size_t bytes = 2 * shape.channels * (tiling.num_splits + 1) * sizeof(double);
      size.num_counters = counters > size.num_counters ? counters : size.num_counters;
      size.partial_bytes = bytes > size.partial_bytes ? bytes : size.partial_bytes;
      return 0;
    });
  }
  return size;
}

int launch_batch_norm_relu_forward(const BatchNormForwardArgs& args,
                                   const BatchNormScratch& scratch, void* stream) {
  const bool has_vectors = vectors_fit(args.shape, args.input, args.residual, args.output);
  return with_lanes(args.shape, has_vectors, [&](auto lane, auto channels_last) {
    using Lane = decltype(lane);
    constexpr bool kChannelsLast = decltype(channels_last)::value;
    const Tiling tiling = tiling_of(args.shape, lane);
    const int64_t num_blocks = tiling.num_tiles * tiling.num_splits;
    int code = 0;
    if (args.training && args.phase == BatchNormPhase::kFinish) {
      const int64_t finishing = ceil_div(args.shape.channels, kNormalizeBlockSize);
      code = launch(finish_statistics_kernel<typename Lane::T>, finishing, stream, args);
    } else if (args.training) {
      code =
          launch(statistics_kernel<Lane, kChannelsLast>, num_blocks, stream, args, tiling, scratch);
    }
    if (code != 0 || args.phase == BatchNormPhase::kReduce) return code;
    return launch(forward_kernel<Lane, kChannelsLast>, num_blocks, stream, args, tiling);
  });
}

int launch_batch_norm_relu_backward(const BatchNormBackwardArgs& args,
                                    const BatchNormScratch& scratch, void* stream) {
  const bool has_vectors = vectors_fit(args.shape, args.grad_output, args.input, args.residual,
                                       args.grad_input, args.grad_residual);
  const bool needs_sums =
      args.phase == BatchNormPhase::kReduce ||
      (args.phase == BatchNormPhase::kBoth &&
       ((args.training && args.grad_input) || args.grad_weight.data || args.grad_bias.data));
  return with_lanes(args.shape, has_vectors, [&](auto lane, auto channels_last) {
    using Lane = decltype(lane);
    constexpr bool kChannelsLast = decltype(channels_last)::value;
    const Tiling tiling = tiling_of(args.shape, lane);
    const int64_t num_blocks = tiling.num_tiles * tiling.num_splits;
    const auto launch_all = [&](auto reduce, auto backward) {
      int code = 0;
      if (needs_sums) code = launch(reduce, num_blocks, stream, args, tiling, scratch);
      const bool is_done = args.phase == BatchNormPhase::kReduce ||
                           (args.grad_input == nullptr && args.grad_residual == nullptr);
      if (code != 0 || is_done) return code;
      return launch(backward, num_blocks, stream, args, tiling, scratch);
    };
    const bool needs_z = args.mask == nullptr && args.activation != Activation::kIdentity;
    return needs_z ? launch_all(reduce_grad_kernel<Lane, kChannelsLast, true>,
                                backward_kernel<Lane, kChannelsLast, true>)
                   : launch_all(reduce_grad_kernel<Lane, kChannelsLast, false>,
                                backward_kernel<Lane, kChannelsLast, false>);
  });
}

}  // namespace fastremedy::cuda
