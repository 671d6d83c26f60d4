// Backward: the sums of every channel's gradients, then the gradients of the elements.
#pragma once

#include "batch_norm_relu_channels.cuh"
#include "batch_norm_relu_sums.cuh"

namespace fastremedy::cuda {

// What the gradient of a lane depends on, as memory has it. kNeedsZ: the activation's slope comes
// from z; otherwise from a mask, or it is 1.
template <class Lane, bool kNeedsZ>
struct LoadedGrad {
  Stored<typename Lane::T, Lane::kWidth> grad_output, input, residual;
  uint32_t mask = 0;
};

template <class Lane, bool kNeedsZ, Reuse kReuse>
FASTREMEDY_DEVICE LoadedGrad<Lane, kNeedsZ> load_grad(const BatchNormBackwardArgs& args,
                                                      bool uses_input, const Place& p) {
  LoadedGrad<Lane, kNeedsZ> loaded;
  loaded.grad_output = load_lane<Lane, kReuse>(args.grad_output, args.shape, p);
  if (kNeedsZ || uses_input) loaded.input = load_lane<Lane, kReuse>(args.input, args.shape, p);
  if constexpr (kNeedsZ) {
    if (args.residual) loaded.residual = load_lane<Lane, kReuse>(args.residual, args.shape, p);
  } else {
    if (args.mask) loaded.mask = load_mask<Lane>(args.mask, args.shape, p);
  }
  return loaded;
}

// g of every element; x is the input.
template <class Lane, bool kNeedsZ, int kLaneChannels>
FASTREMEDY_DEVICE void find_grad(const BatchNormBackwardArgs& args,
                                 const LoadedGrad<Lane, kNeedsZ>& loaded,
                                 const Normalizer<typename Lane::T> (&n)[kLaneChannels],
                                 const typename Lane::T (&x)[Lane::kWidth],
                                 typename Lane::T (&g)[Lane::kWidth]) {
  using T = typename Lane::T;
  constexpr int kWidth = Lane::kWidth;
  const DType dtype = Lane::dtype(args.shape);
  const T threshold = zero_threshold<T>(dtype);
  const T negative_slope = static_cast<T>(args.negative_slope);
  unpack(loaded.grad_output, dtype, g);
  T z[kWidth];
  if constexpr (kNeedsZ) {
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      const Normalizer<T>& of = n[kLaneChannels == 1 ? 0 : k];
      z[k] = normalize(x[k], of.mean, of.scale, of.shift);
    }
    if (args.residual) {
      T residual[kWidth];
      unpack(loaded.residual, dtype, residual);
#pragma unroll
      for (int k = 0; k < kWidth; ++k) z[k] += residual[k];
    }
  } else {
#pragma unroll
    for (int k = 0; k < kWidth; ++k) z[k] = loaded.mask >> k & 1 ? T(1) : T(-1);
  }
  with_activation<kNeedsZ>(args.activation, [&](auto activation) {
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      g[k] = activation_grad<decltype(activation)::value>(z[k], g[k], threshold, negative_slope);
    }
  });
}

// The sums over all ranks if they were exchanged, else those of this call: sum(g), centered
// sum(g * x).
FASTREMEDY_DEVICE double* total_sums(const BatchNormBackwardArgs& args,
                                     const BatchNormScratch& scratch) {
  return args.phase == BatchNormPhase::kBoth ? static_cast<double*>(scratch.partials) : args.sums;
}

template <class T, int kMaxChannels>
struct ReduceChannels {
  Normalizer<T> normalizers[kMaxChannels];
};

template <class Lane, bool kChannelsLast, bool kNeedsZ>
__global__ void __launch_bounds__(kNormalizeBlockSize, kNormalizeBlocks)
    reduce_grad_kernel(const __grid_constant__ BatchNormBackwardArgs args,
                       const __grid_constant__ Tiling tiling, BatchNormScratch scratch) {
  using T = typename Lane::T;
  constexpr int kWidth = Lane::kWidth;
  using Tiles = Tile<Lane, kChannelsLast>;
  const BatchNormShape& shape = args.shape;
  const int64_t channels = shape.channels;
  const Tiles tile(shape, tiling);
  auto& normalizers = block_variable<ReduceChannels<T, Tiles::kMaxChannels>>().normalizers;
  for (int c = threadIdx.x; c < tile.num_channels(); c += kNormalizeBlockSize) {
    const int64_t channel = tile.first_channel() + c;
    normalizers[c] = load_normalizer(load_statistics<T>(args.saved, channels, channel), args.weight,
                                     args.bias, channel);
  }
  __syncthreads();
  Normalizer<T> n[Tiles::kLaneChannels];
#pragma unroll
  for (int k = 0; k < Tiles::kLaneChannels; ++k) n[k] = normalizers[tile.lane_channel() + k];

  const bool uses_input = args.training || args.grad_weight.data;
  ChannelSums<Lane, kChannelsLast> sums(tile);
  tile.template for_each<Lane::kBackwardBatch, false>(
      [&](const Place& p) {
        return load_grad<Lane, kNeedsZ, Reuse::kByNextKernel>(args, uses_input, p);
      },
      [&](const Place& p, const LoadedGrad<Lane, kNeedsZ>& loaded) {
        T x[kWidth], g[kWidth];
        unpack(loaded.input, Lane::dtype(shape), x);
        find_grad(args, loaded, n, x, g);
#pragma unroll
        for (int k = 0; k < kWidth; ++k) {
          g[k] = p.is_inside ? g[k] : T(0);
          x[k] = p.is_inside ? g[k] * (x[k] - n[kChannelsLast ? k : 0].mean) : T(0);
        }
        sums.add(g, x);
      });
  double* const totals = total_sums(args, scratch);
  double* const partials = static_cast<double*>(scratch.partials) + 2 * channels;
  sums.finish(scratch.counters, partials, [&](int c, double sum_g, double sum_gx) {
    const int64_t channel = tile.first_channel() + c;
    const auto statistics = load_statistics<T>(args.saved, channels, channel);
    const double centered = centered_sum(statistics, sum_g, sum_gx);
    totals[channel] = sum_g;
    totals[channels + channel] = centered;
    if (args.phase == BatchNormPhase::kReduce && channel == 0) {
      totals[2 * channels] = static_cast<double>(shape.count());
    }
    if (args.grad_bias.data) set(args.grad_bias, channel, sum_g);
    if (args.grad_weight.data) {
      set(args.grad_weight, channel, centered * static_cast<double>(statistics.invstd));
    }
  });
}

template <class T, int kMaxChannels>
struct BackwardChannels {
  Normalizer<T> normalizers[kMaxChannels];
  InputGrad<T> input_grads[kMaxChannels];
};

template <class Lane, bool kChannelsLast, bool kNeedsZ>
__global__ void __launch_bounds__(kNormalizeBlockSize, kNormalizeBlocks)
    backward_kernel(const __grid_constant__ BatchNormBackwardArgs args,
                    const __grid_constant__ Tiling tiling, BatchNormScratch scratch) {
  using T = typename Lane::T;
  constexpr int kWidth = Lane::kWidth;
  using Tiles = Tile<Lane, kChannelsLast>;
  const BatchNormShape& shape = args.shape;
  const int64_t channels = shape.channels;
  const Tiles tile(shape, tiling);
  auto& [normalizers, input_grads] = block_variable<BackwardChannels<T, Tiles::kMaxChannels>>();
  const double* const totals = total_sums(args, scratch);
  const bool is_finish = args.phase == BatchNormPhase::kFinish;
  for (int c = threadIdx.x; c < tile.num_channels(); c += kNormalizeBlockSize) {
    const int64_t channel = tile.first_channel() + c;
    const auto statistics = load_statistics<T>(args.saved, channels, channel);
    const T weight = get<T>(args.weight, channel, 1);
    normalizers[c] = load_normalizer(statistics, args.weight, args.bias, channel);
    if (args.training && args.grad_input) {
      const double count = is_finish ? totals[2 * channels] : static_cast<double>(shape.count());
      input_grads[c] =
          input_grad(statistics, weight, count, totals[channel], totals[channels + channel]);
    } else {
      input_grads[c] = input_grad(statistics, weight, 1, 0, 0);
    }
  }
  __syncthreads();
  Normalizer<T> n[Tiles::kLaneChannels];
  InputGrad<T> to_input[Tiles::kLaneChannels];
#pragma unroll
  for (int k = 0; k < Tiles::kLaneChannels; ++k) {
    n[k] = normalizers[tile.lane_channel() + k];
    to_input[k] = input_grads[tile.lane_channel() + k];
  }

  const bool uses_input = args.training && args.grad_input;
  tile.template for_each<Lane::kBackwardBatch, true>(
      [&](const Place& p) { return load_grad<Lane, kNeedsZ, Reuse::kNever>(args, uses_input, p); },
      [&](const Place& p, const LoadedGrad<Lane, kNeedsZ>& loaded) {
        T x[kWidth], g[kWidth];
        unpack(loaded.input, Lane::dtype(shape), x);
        find_grad(args, loaded, n, x, g);
        if (args.grad_residual) store_lane<Lane>(args.grad_residual, shape, p, g);
        if (args.grad_input == nullptr) return;
#pragma unroll
        for (int k = 0; k < kWidth; ++k) {
          const int of = kChannelsLast ? k : 0;
          const InputGrad<T>& d = to_input[of];
          g[k] = input_grad_of(uses_input, g[k], x[k] - n[of].mean, d.g_scale, d.x_scale, d.shift);
        }
        store_lane<Lane>(args.grad_input, shape, p, g);
      });
}

}  // namespace fastremedy::cuda
