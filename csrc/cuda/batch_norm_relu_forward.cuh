// Forward: the statistics of every channel, then the output.
#pragma once

#include "batch_norm_relu_channels.cuh"
#include "batch_norm_relu_sums.cuh"

namespace fastremedy::cuda {

template <class T, int kMaxChannels>
struct Pilots {
  T first[kPilotElements * kMaxChannels];
  T pilots[kMaxChannels];
};

// The pilots of the tile's channels, the same in all blocks.
template <class Lane, bool kChannelsLast>
FASTREMEDY_DEVICE const typename Lane::T* find_pilots(const Tile<Lane, kChannelsLast>& tile,
                                                      const void* input) {
  using T = typename Lane::T;
  constexpr int kMaxChannels = Tile<Lane, kChannelsLast>::kMaxChannels;
  auto& memory = block_variable<Pilots<T, kMaxChannels>>();
  T* const first = memory.first;
  T* const pilots = memory.pilots;
  const DType dtype = Lane::dtype(tile.shape());
  const int64_t count = tile.shape().count();
  const int num_channels = tile.num_channels();
  const int num_elements = count < kPilotElements ? static_cast<int>(count) : kPilotElements;
  for (int i = threadIdx.x; i < num_elements * num_channels; i += kNormalizeBlockSize) {
    const int64_t element =
        tile.element_of(tile.first_channel() + i % num_channels, i / num_channels);
    T value[1];
    unpack(load<T, 1, Reuse::kByNextKernel>(element_at(input, dtype, element), dtype, 0), dtype,
           value);
    first[i] = value[0];
  }
  __syncthreads();
  for (int c = threadIdx.x; c < num_channels; c += kNormalizeBlockSize) {
    double sum = 0;
    for (int p = 0; p < num_elements; ++p) sum += static_cast<double>(first[p * num_channels + c]);
    const T mean = static_cast<T>(sum / num_elements);
    pilots[c] = usable_pilot(mean);
  }
  __syncthreads();
  return pilots;
}

// Saves the statistics of a channel, whose sums are about the pilot, and updates the running ones.
template <class T>
FASTREMEDY_DEVICE void finish_statistics(const BatchNormForwardArgs& args, int64_t channel,
                                         double count, double pilot, double sum,
                                         double sum_of_squares) {
  const auto s = channel_statistics<T>(count, pilot, sum, sum_of_squares, args.eps);
  store_statistics(args.saved, args.shape.channels, channel, s);
  if (args.running_mean.data == nullptr && args.running_var.data == nullptr) return;
  if (count == 0) return;
  const double momentum =
      args.cumulative ? 1 / (static_cast<double>(*args.num_batches_tracked) + 1) : args.momentum;
  const auto update = [&](const ChannelValues& running, double value) {
    if (running.data == nullptr) return;
    set(running, channel, moving_average(get<double>(running, channel, 0), value, momentum));
  };
  update(args.running_mean, pilot + sum / count);
  update(args.running_var, unbiased(static_cast<double>(s.variance), count));
}

template <class Lane, bool kChannelsLast>
__global__ void __launch_bounds__(kNormalizeBlockSize, kNormalizeBlocks)
    statistics_kernel(const __grid_constant__ BatchNormForwardArgs args,
                      const __grid_constant__ Tiling tiling, BatchNormScratch scratch) {
  using T = typename Lane::T;
  constexpr int kWidth = Lane::kWidth;
  const Tile<Lane, kChannelsLast> tile(args.shape, tiling);
  const T* const pilots = find_pilots(tile, args.input);
  T pilot[tile.kLaneChannels];
#pragma unroll
  for (int k = 0; k < tile.kLaneChannels; ++k) pilot[k] = pilots[tile.lane_channel() + k];

  ChannelSums<Lane, kChannelsLast> sums(tile);
  tile.template for_each<Lane::kForwardBatch, false>(
      [&](const Place& p) {
        return load_lane<Lane, Reuse::kByNextKernel>(args.input, args.shape, p);
      },
      [&](const Place& p, const auto& stored) {
        T values[kWidth], squares[kWidth];
        unpack(stored, Lane::dtype(args.shape), values);
#pragma unroll
        for (int k = 0; k < kWidth; ++k) {
          values[k] = p.is_inside ? values[k] - pilot[kChannelsLast ? k : 0] : T(0);
          squares[k] = values[k] * values[k];
        }
        sums.add(values, squares);
      });
  const auto count = static_cast<double>(args.shape.count());
  sums.finish(scratch.counters, static_cast<double*>(scratch.partials),
              [&](int c, double sum, double sum_of_squares) {
                const int64_t channel = tile.first_channel() + c;
                const double pilot = pilots[c];
                if (args.phase == BatchNormPhase::kBoth) {
                  return finish_statistics<T>(args, channel, count, pilot, sum, sum_of_squares);
                }
                args.sums[channel] = sum + count * pilot;
                args.sums[args.shape.channels + channel] =
                    sum_of_squares + pilot * (2 * sum + count * pilot);
                if (channel == 0) args.sums[2 * args.shape.channels] = count;
              });
}

// The sums come from all ranks.
template <class T>
__global__ void __launch_bounds__(kNormalizeBlockSize, kNormalizeBlocks)
    finish_statistics_kernel(const __grid_constant__ BatchNormForwardArgs args) {
  const int64_t channels = args.shape.channels;
  const int64_t channel = int64_t{blockIdx.x} * kNormalizeBlockSize + threadIdx.x;
  if (channel >= channels) return;
  finish_statistics<T>(args, channel, args.sums[2 * channels], 0, args.sums[channel],
                       args.sums[channels + channel]);
}

template <class T, int kMaxChannels>
struct ForwardChannels {
  Normalizer<T> normalizers[kMaxChannels];
  unsigned dead[kMaxChannels];
};

template <class Lane, bool kChannelsLast>
__global__ void __launch_bounds__(kNormalizeBlockSize, kNormalizeBlocks)
    forward_kernel(const __grid_constant__ BatchNormForwardArgs args,
                   const __grid_constant__ Tiling tiling) {
  using T = typename Lane::T;
  constexpr int kWidth = Lane::kWidth;
  const BatchNormShape& shape = args.shape;
  const Tile<Lane, kChannelsLast> tile(shape, tiling);
  using Tiles = Tile<Lane, kChannelsLast>;
  auto& [normalizers, dead_counts] = block_variable<ForwardChannels<T, Tiles::kMaxChannels>>();
  for (int c = threadIdx.x; c < tile.num_channels(); c += kNormalizeBlockSize) {
    const int64_t channel = tile.first_channel() + c;
    ChannelStatistics<T> statistics;
    if (args.training) {
      statistics = load_statistics<T>(args.saved, shape.channels, channel);
    } else {
      statistics = channel_statistics<T>(1, get<double>(args.running_mean, channel, 0), 0,
                                         get<double>(args.running_var, channel, 1), args.eps);
      if (tile.split() == 0) store_statistics(args.saved, shape.channels, channel, statistics);
    }
    normalizers[c] = load_normalizer(statistics, args.weight, args.bias, channel);
    dead_counts[c] = 0;
  }
  if (blockIdx.x == 0 && threadIdx.x == 0 && args.training && args.num_batches_tracked) {
    ++*args.num_batches_tracked;  // the statistics, one launch earlier, have read it
  }
  __syncthreads();
  Normalizer<T> n[tile.kLaneChannels];
#pragma unroll
  for (int k = 0; k < tile.kLaneChannels; ++k) n[k] = normalizers[tile.lane_channel() + k];

  const DType dtype = Lane::dtype(shape);
  const T threshold = zero_threshold<T>(dtype);
  const T negative_slope = static_cast<T>(args.negative_slope);
  unsigned num_dead[tile.kLaneChannels] = {};
  struct Loaded {
    Stored<T, kWidth> input, residual;
  };
  tile.template for_each<Lane::kForwardBatch, true>(
      [&](const Place& p) {
        Loaded loaded;
        loaded.input = load_lane<Lane, Reuse::kNever>(args.input, shape, p);
        if (args.residual) {
          loaded.residual = load_lane<Lane, Reuse::kNever>(args.residual, shape, p);
        }
        return loaded;
      },
      [&](const Place& p, const Loaded& loaded) {
        T z[kWidth];
        unpack(loaded.input, dtype, z);
#pragma unroll
        for (int k = 0; k < kWidth; ++k) {
          const Normalizer<T>& of = n[kChannelsLast ? k : 0];
          z[k] = normalize(z[k], of.mean, of.scale, of.shift);
        }
        if (args.residual) {
          T residual[kWidth];
          unpack(loaded.residual, dtype, residual);
#pragma unroll
          for (int k = 0; k < kWidth; ++k) z[k] += residual[k];
        }
        if (args.dead && p.is_inside) {
#pragma unroll
          for (int k = 0; k < kWidth; ++k) {
            num_dead[kChannelsLast ? k : 0] += !is_positive(z[k], threshold);
          }
        }
        with_activation<true>(args.activation, [&](auto activation) {
          if (args.mask) {
            uint32_t kept = 0;
#pragma unroll
            for (int k = 0; k < kWidth; ++k) {
              const bool keeps = keeps_grad<decltype(activation)::value>(z[k], threshold);
              kept |= static_cast<uint32_t>(keeps) << k;
            }
            store_mask<Lane>(args.mask, shape, p, kept);
          }
#pragma unroll
          for (int k = 0; k < kWidth; ++k) {
            z[k] = activate<decltype(activation)::value>(z[k], threshold, negative_slope);
          }
        });
        store_lane<Lane>(args.output, shape, p, z);
      });

  if (args.dead == nullptr) return;
#pragma unroll
  for (int k = 0; k < tile.kLaneChannels; ++k) {
    if (num_dead[k] > 0) atomicAdd(&dead_counts[tile.lane_channel() + k], num_dead[k]);
  }
  __syncthreads();
  for (int c = threadIdx.x; c < tile.num_channels(); c += kNormalizeBlockSize) {
    auto* const dead = reinterpret_cast<unsigned long long*>(args.dead + tile.first_channel() + c);
    atomicAdd(dead, static_cast<unsigned long long>(dead_counts[c]));
  }
}

}  // namespace fastremedy::cuda
