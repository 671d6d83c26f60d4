// Sums of every channel.
//
// Each block leaves its sums at a fixed place, and the last block of a tile adds those in a fixed
// order: the result is bitwise the same in every run.
#pragma once

#include "batch_norm_relu_tiles.cuh"
#include "block.cuh"

namespace fastremedy::cuda {

// A variable of the block for each type: kernels that differ in dtype alone share it.
template <class Type>
FASTREMEDY_DEVICE Type& block_variable() {
  FASTREMEDY_SHARED(Type, variable);
  return variable;
}

// Sums of the threads, each in its own column.
template <int kSize>
struct Totals {
  double of_thread[kSize][kNormalizeBlockSize];
};

// Two sums of every channel of the tile. Threads add in T and move on to double before rounding
// can be seen: after 64 terms of T, or 64 vectors whose elements are added pairwise.
template <class Lane, bool kChannelsLast>
class ChannelSums {
  using T = typename Lane::T;
  using TileOf = Tile<Lane, kChannelsLast>;
  static constexpr int kWidth = Lane::kWidth;
  static constexpr int kLaneChannels = TileOf::kLaneChannels;
  static constexpr int kMostTerms = 64;

 public:
  explicit FASTREMEDY_DEVICE ChannelSums(const TileOf& tile)
      : tile_(tile), totals_(block_variable<Totals<2 * kLaneChannels>>().of_thread) {
#pragma unroll
    for (int k = 0; k < 2 * kLaneChannels; ++k) totals_[k][threadIdx.x] = 0;
  }

  FASTREMEDY_DEVICE void add(const T (&first)[kWidth], const T (&second)[kWidth]) {
    if constexpr (kChannelsLast) {
#pragma unroll
      for (int k = 0; k < kWidth; ++k) {
        terms_[k] += first[k];
        terms_[kLaneChannels + k] += second[k];
      }
    } else {
      terms_[0] += pairwise_sum(first);
      terms_[1] += pairwise_sum(second);
    }
    if (++num_terms_ == kMostTerms) flush();
  }

  // finish(channel in the tile, first sum, second sum) in one thread for every channel, in the last
  // block of the tile.
  template <class Finish>
  FASTREMEDY_DEVICE void finish(uint32_t* counters, double* partials, Finish finish) {
    flush();
    const int64_t num_splits = tile_.tiling().num_splits;
    const int64_t channels = tile_.shape().channels;
    const int num_channels = tile_.num_channels();
    partials += tile_.first_channel();
    double* const mine = partials + 2 * channels * tile_.split();
    add_threads([&](int which, int c, double sum) { mine[which * channels + c] = sum; });
    __syncthreads();  // the fence below is for the writes of all threads
    if (!is_last_block(counters + tile_.index(), static_cast<uint32_t>(num_splits))) return;

    const int num_rows = kNormalizeBlockSize / num_channels;
    const int row = threadIdx.x / num_channels, c = threadIdx.x % num_channels;
    double first = 0, second = 0;
    if (row < num_rows) {
#pragma unroll 4
      for (int64_t s = row; s < num_splits; s += num_rows) {
        first += partials[2 * s * channels + c];
        second += partials[(2 * s + 1) * channels + c];
      }
    }
    totals_[0][threadIdx.x] = first;
    totals_[1][threadIdx.x] = second;
    __syncthreads();
    if (row > 0) return;
    const int used_rows = num_splits < num_rows ? static_cast<int>(num_splits) : num_rows;
    for (int r = 1; r < used_rows; ++r) {
      first += totals_[0][r * num_channels + c];
      second += totals_[1][r * num_channels + c];
    }
    finish(c, first, second);
  }

 private:
  static FASTREMEDY_DEVICE T pairwise_sum(const T (&values)[kWidth]) {
    if constexpr (kWidth == 8) {
      return ((values[0] + values[1]) + (values[2] + values[3])) +
             ((values[4] + values[5]) + (values[6] + values[7]));
    } else {
      return values[0];
    }
  }

  FASTREMEDY_DEVICE void flush() {
#pragma unroll
    for (int k = 0; k < 2 * kLaneChannels; ++k) {
      // One after the other: all at once would take 32 registers.
      volatile double& total = totals_[k][threadIdx.x];
      total = total + terms_[k];
      terms_[k] = 0;
    }
    num_terms_ = 0;
  }

  // put(which, channel in the tile, sum of all threads).
  template <class Put>
  FASTREMEDY_DEVICE void add_threads(Put put) const {
    if constexpr (kChannelsLast) {
      const int columns = tile_.tiling().columns, rows = tile_.tiling().rows();
      const int num_channels = tile_.num_channels();
      __syncthreads();
      for (int i = threadIdx.x; i < 2 * num_channels; i += kNormalizeBlockSize) {
        const int which = i / num_channels, c = i % num_channels;
        double sum = 0;
        for (int r = 0; r < rows; ++r) {
          sum += totals_[which * kLaneChannels + c % kWidth][r * columns + c / kWidth];
        }
        put(which, c, sum);
      }
    } else {
      for (int which = 0; which < 2; ++which) {
        const double sum = block_reduce<kNormalizeBlockSize>(
            totals_[which][threadIdx.x], 0, [](double a, double b) { return a + b; });
        if (threadIdx.x == 0) put(which, 0, sum);
      }
    }
  }

  const TileOf& tile_;
  double (*const totals_)[kNormalizeBlockSize];
  T terms_[2 * kLaneChannels] = {};
  int num_terms_ = 0;
};

}  // namespace fastremedy::cuda
